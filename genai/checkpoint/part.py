"""A checkpoint as a part of another model: a first stage, a draft, a teacher."""

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


class Origin(NamedTuple):
    """Where the weights of a module are from, its attribute `pretrained_from`."""

    sha256: str | None
    weights: str
    frozen: bool


def pretrained(
    ckpt: str | None = None,
    sha256: str | None = None,
    weights: str = "ema",
    frozen: bool = True,
    shape: Sequence[int] | None = None,
    model: nn.Module | None = None,
) -> nn.Module:
    """A model of another checkpoint as a module of this one; nothing is read here.

    When a run starts `adopt_all` reads the file that the config names and completes the node with what it found, and `fill` gives
    the module its weights. From then on they are part of the run's own checkpoints, and the node builds without the file.

    Args:
        ckpt: run or checkpoint, see `locate`; None for a model that needs no training.
        sha256: see `digest`; noted when a run starts, and another is refused from then on.
        weights: "ema" or "raw", which of the file's.
        frozen: it gets no gradient, and stays in evaluation mode.
        shape: of its latents where it is a Codec, noted when a run starts for the rest of the config to use.
        model: what it is, noted when a run starts.

    Raises UserError for a node that no run has completed.
    """
    check_weights(weights)
    if ckpt is None and model is None:
        raise UserError(f"a node of {stored.PRETRAINED} has no ckpt: give it the run or checkpoint that it is to be")
    if not isinstance(model, nn.Module):
        raise UserError(
            f"ckpt={ckpt} was not read: another checkpoint is read where a new run or a call names it, "
            "to be part of a model, never because a file does"
        )
    if frozen:
        model.requires_grad_(False).eval()
        model.train = types.MethodType(_stays, model)  # type: ignore[method-assign]
    model.pretrained_from = Origin(sha256, weights, frozen)  # type: ignore[assignment]
    return model


pretrained.__module__ = "genai.checkpoint"  # where configs name it


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a frozen module."""
    return type(module).train(module, False)


def pretrained_nodes(node: Any, key: str) -> Iterator[tuple[str, dict]]:
    """The nodes of `pretrained` in a config node of this key, with their own keys; not those within another one, for all their
    weights are in its file."""
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
    """SHA-256 of what decides what a checkpoint's model does: its config, as it was written, and its averaged or raw weights."""
    sha = hashlib.sha256(json.dumps(content.get("written", content["config"])["model"], sort_keys=True).encode())
    for name, tensor in sorted(weights_of(content, weights).items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Part(NamedTuple):
    """A checkpoint that was read to be a part of another model: the node that says so, completed, the content of its file, and
    its model with its weights."""

    node: dict[str, Any]
    content: dict
    path: Path
    model: nn.Module


def adopt(node: dict, key: str, trust: Sequence[str] = ()) -> Part:
    """Read the checkpoint that a node of `pretrained` names; `key` is where the node is.

    Raises UserError if there is none, it is no longer what it was, or it holds what may not be built.
    """
    ckpt, weights, frozen = str(node["ckpt"]), node.get("weights", "ema"), node.get("frozen", True)
    check_weights(weights, f"{key}.weights")
    if not isinstance(frozen, bool):
        raise UserError(f"{key}.frozen={frozen} must be true or false")
    try:
        content, path = locate(ckpt)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    found, noted = digest(content, weights), node.get("sha256")
    if noted not in (None, found):
        raise UserError(
            f"{key}.ckpt={ckpt} has changed: its SHA-256 is {found[:16]}..., and {key}.sha256 says {str(noted)[:16]}...; what "
            f"was learned with another means something else, so bring the old file back or train anew ({key}.sha256=null)"
        )
    node = {**node, "sha256": found, "weights": weights, "model": content["config"]["model"]}
    whole = restore_model(content, path, weights, trust)
    model = pretrained(sha256=found, weights=weights, frozen=frozen, model=whole)
    if node.get("shape") is not None:
        node["shape"] = list(getattr(model, "latent_shape", node["shape"]))  # type: ignore[call-overload]
    return Part(node, content, path, model)


def adopt_all(cfg: DictConfig, build: Callable[[Any], Any], trust: Sequence[str], resumed: bool) -> dict[str, Part]:
    """The checkpoints that are to be parts of a run's model, by key; cfg notes what they are.

    A run that is resumed has them in its own: nothing is noted then, and none returned. Raises UserError if a file is no longer
    what it was.
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
        else:  # one that needs no training may still be asked for its shape
            shape = getattr(build(node.get("model")), "latent_shape", None)
            noted = {"shape": list(shape)} if shape is not None and node.get("shape") is not None else {}
        for name, value in ({} if resumed else noted).items():
            OmegaConf.update(cfg, _key_of(cfg, at, name), value, merge=False, force_add=True)
    return {} if resumed else adopted


def _key_of(cfg: DictConfig, node: DictConfig, name: str) -> str:
    """The dotted key that gives a node's value of this name: that of another where it is taken from there."""
    if not OmegaConf.is_interpolation(node, name):
        return node._get_full_key(name)
    parent, _, last = str(node._get_node(name)._value())[2:-1].rpartition(".")  # type: ignore[union-attr]
    return _key_of(cfg, OmegaConf.select(cfg, parent), last)


def pretrained_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of a model that are parts, by name; not those within another one."""
    if hasattr(model, "pretrained_from"):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from pretrained_modules(child, f"{prefix}.{name}".lstrip("."))


def fill(model: nn.Module, adopted: Mapping[str, Part]) -> None:
    """Give the modules of a model that are adopted parts, by key, their weights. Raises UserError for a part that is not a module of
    the model."""
    found = [module for _, module in pretrained_modules(model)]
    for key, part in adopted.items():
        mine = [module for module in found if module.pretrained_from == part.model.pretrained_from]
        if not mine:
            raise UserError(f"{key} is not a module of this model, which must have it as an attribute to store it")
        for module in mine:
            module.load_state_dict(part.model.state_dict())
