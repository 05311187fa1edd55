"""Checkpoints as parts of other models: a first stage, a teacher, a draft model."""

import hashlib
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from genai.checkpoint.file import locate
from genai.checkpoint.load import check_weights, restore_model, weights_of
from genai.core import stored
from genai.core.errors import UserError
from genai.core.stored import Node


class Origin(NamedTuple):
    """The origin of a module's weights; the module keeps it as its attribute `pretrained_from`.

    Attributes:
        sha256: see `digest`; None for a model that needs no training.
        weights: "ema" or "raw", which of the checkpoint's weights these are.
        frozen: whether the weights are kept as they are.
        part: dotted name of the module in the checkpoint's model; None for the model itself.
    """

    sha256: str | None
    weights: str
    frozen: bool
    part: str | None = None


def pretrained(
    ckpt: str | None = None,
    sha256: str | None = None,
    weights: str = "ema",
    frozen: bool = True,
    shape: Sequence[int] | None = None,
    model: nn.Module | None = None,
    part: str | None = None,
) -> nn.Module:
    """Return the model of another checkpoint, or a module of it, to be a module of this one; reads no file.

    When a run starts, `adopt_all` reads the file that the config names and completes the config's node, and `fill` loads the
    weights into the module. From then on they are in the run's own checkpoints, and the file is no longer needed.

    Args:
        ckpt: a run or checkpoint, see `locate`; None for a model that needs no training.
        sha256: SHA-256 of the checkpoint, see `digest`; filled in when a run starts; if given, a file with another is refused.
        weights: "ema" or "raw", which of the file's weights to take.
        frozen: keep its weights: no gradients, always in evaluation mode.
        shape: shape of the latents of a Codec; filled in when a run starts, so that other keys can refer to it.
        model: the built model; its node is filled in when a run starts.
        part: dotted name of a module of that model, such as encoders.text.text of a `Contrastive`; None for all of it.

    Raises UserError if the node was not completed by a run, and for a part that the model does not have.
    """
    check_weights(weights)
    if ckpt is None and model is None:
        raise UserError(f"a node of {stored.PRETRAINED} has no ckpt: name the run or checkpoint whose model it is")
    if not isinstance(model, nn.Module):
        raise UserError(
            f"ckpt={ckpt} must be named in the config of a new run or in a call, which reads it: a checkpoint's own "
            "config cannot make another file be read"
        )
    if part is not None:
        try:
            model = model.get_submodule(part)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_modules() if 0 < len(name.split(".")) < 4)
            raise UserError(
                f"part={part} must be a module of the {type(model).__name__} in ckpt={ckpt}: {names}"
            ) from None
    if frozen:
        model.requires_grad_(False).eval()
        model.train = types.MethodType(_stay_frozen, model)  # type: ignore[method-assign]
    model.pretrained_from = Origin(sha256, weights, frozen, part)  # type: ignore[assignment]
    return model


pretrained.__module__ = "genai.checkpoint"  # the target in configs is genai.checkpoint.pretrained


def _stay_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replace the method `train` of a frozen module, which stays in evaluation mode."""
    return type(module).train(module, False)


def pretrained_nodes(node: object, key: str) -> Iterator[tuple[str, dict]]:
    """Yield (key, node) of every node of `pretrained` in the config node of this key.

    Nodes inside such a node are left out: the outer one's file holds their weights.
    """
    if isinstance(node, dict):
        if node.get("_target_") == stored.PRETRAINED:
            yield key, node
        else:
            for name, value in node.items():
                yield from pretrained_nodes(value, f"{key}.{name}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from pretrained_nodes(value, f"{key}[{i}]")


def digest(content: dict, weights: str = "ema") -> str:
    """Return the SHA-256 of a checkpoint's model: its config as it was written, and its averaged or raw weights."""
    sha = hashlib.sha256(json.dumps(content.get("written", content["config"])["model"], sort_keys=True).encode())
    for name, tensor in sorted(weights_of(content, weights).items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Part(NamedTuple):
    """A checkpoint that was read to be a part of another model.

    Attributes:
        node: the node of `pretrained`, completed.
        content, path: the checkpoint file.
        model: the built model, with its weights.
    """

    node: Node
    content: dict
    path: Path
    model: nn.Module


def adopt(node: dict, key: str, trust: Sequence[str] = ()) -> Part:
    """Read the checkpoint that a node of `pretrained` names; `key` is the node's dotted key.

    Raises UserError if there is no such checkpoint, its SHA-256 differs from the node's, or it may not be built.
    """
    ckpt, weights, frozen = str(node["ckpt"]), node.get("weights", "ema"), node.get("frozen", True)
    check_weights(weights, f"{key}.weights")
    if not isinstance(frozen, bool):
        raise UserError(f"{key}.frozen={frozen} must be true or false")
    try:
        content, path = locate(ckpt)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    found, expected = digest(content, weights), node.get("sha256")
    if expected not in (None, found):
        raise UserError(
            f"{key}.ckpt={ckpt} has changed: its SHA-256 is {found[:16]}..., and {key}.sha256 says {str(expected)[:16]}...; this "
            f"model was trained with the old file, so restore that, or train a new model ({key}.sha256=null)"
        )
    node = {**node, "sha256": found, "weights": weights, "model": content["config"]["model"]}
    whole = restore_model(content, path, weights, trust)
    model = pretrained(ckpt, found, weights, frozen, None, whole, node.get("part"))
    if node.get("shape") is not None:
        node["shape"] = list(getattr(model, "latent_shape", node["shape"]))  # type: ignore[call-overload]
    return Part(node, content, path, model)


def adopt_all(cfg: DictConfig, build: Callable[[Any], Any], trust: Sequence[str], resumed: bool) -> dict[str, Part]:
    """Read the checkpoints that are to be parts of a run's model, and complete their nodes in `cfg`; returns them by key.

    A resumed run has their weights in its own checkpoint: it changes no node and returns an empty dict, but still checks the
    files that exist.

    Raises UserError if a file has changed (see `adopt`).
    """
    adopted = {}
    for path, node in pretrained_nodes(OmegaConf.to_container(cfg.model, resolve=True), "model"):
        ckpt = node.get("ckpt")
        if resumed and (ckpt is None or not Path(str(ckpt)).expanduser().exists()):
            continue
        at = OmegaConf.select(cfg, path)
        if ckpt is not None:
            key = _key_of(cfg, at, "ckpt").removesuffix(".ckpt")
            part = adopted[key] = adopt(node, key, trust)
            noted = {name: part.node[name] for name in ("sha256", "model", "shape") if name in part.node}
        else:  # a codec without training, such as SpaceToDepth, still determines the shape of its latents
            shape = getattr(build(node.get("model")), "latent_shape", None)
            noted = {"shape": list(shape)} if shape is not None and node.get("shape") is not None else {}
        for name, value in ({} if resumed else noted).items():
            OmegaConf.update(cfg, _key_of(cfg, at, name), value, merge=False, force_add=True)
    return {} if resumed else adopted


def _key_of(cfg: DictConfig, node: DictConfig, name: str) -> str:
    """Return the dotted key under which a node's value was given: another one's where the value is an interpolation of that."""
    if not OmegaConf.is_interpolation(node, name):
        return node._get_full_key(name)
    parent, _, last = str(node._get_node(name)._value())[2:-1].rpartition(".")  # type: ignore[union-attr]
    return _key_of(cfg, OmegaConf.select(cfg, parent), last)


def pretrained_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of a model's modules that come from other checkpoints; not those inside another such module."""
    if hasattr(model, "pretrained_from"):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from pretrained_modules(child, f"{prefix}.{name}".lstrip("."))


def fill(model: nn.Module, adopted: Mapping[str, Part]) -> None:
    """Load the weights of adopted parts, by key, into the modules of a model.

    Raises UserError for a part that is not a module of the model.
    """
    found = [module for _, module in pretrained_modules(model)]
    for key, part in adopted.items():
        mine = [module for module in found if module.pretrained_from == part.model.pretrained_from]
        if not mine:
            raise UserError(f"{key} must be a submodule of this model: the weights of anything else are not saved")
        for module in mine:
            module.load_state_dict(part.model.state_dict())
