"""Load a model from a checkpoint: its weights, its config and the modalities of its output and conditions."""

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genai.checkpoint.build import build_modality, build_stored, reason
from genai.checkpoint.file import locate
from genai.core import precision as precisions
from genai.core.errors import UserError, show
from genai.core.protocols import Batch
from genai.core.spellings import canonical
from genai.core.stored import Node
from genai.modalities.base import Modality
from genai.modalities.stored import legacy_nodes


@dataclass
class Loaded:
    """A loaded model in evaluation mode, without gradients, with what its checkpoint holds of it.

    Attributes:
        config: the run's config, as plain values.
        modality: the modality of the model's output.
        conditions: the modalities of the model's conditions (label, caption), by name.
        step: training steps of the checkpoint.
        path: the checkpoint file.
        trust: the user's packages that its config was allowed to build from.
        precision: the precision of the networks, one of `core.precision.PRECISIONS`.
        weights: which of the checkpoint's weights these are, "ema" or "raw".
    """

    model: nn.Module
    config: dict
    modality: Modality
    conditions: dict[str, Modality]
    step: int
    path: Path
    trust: tuple[str, ...] = ()
    precision: str = "32-true"
    weights: str = "ema"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """Precision as metric cards record it; TF32 counts as float32."""
        return "float32" if self.precision == "32-true" else self.precision

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context in which to call the model; a null context unless the precision is mixed."""
        return precisions.autocast(self.precision, self.device)


def device_of(name: object) -> str:
    """Return the name of a device: "auto" is cuda if there is a GPU, else cpu. Raises UserError for one that is not available."""
    name = canonical("device", str(name) if isinstance(name, torch.device) else name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(name, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device={name} must be one of auto, cpu, cuda, cuda:0, ...")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={name}, but torch sees no GPU here: use device=cpu or auto")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}, but torch sees {torch.cuda.device_count()} GPUs here: count from cuda:0")
    return name


def trusted_packages(trust: Any) -> tuple[str, ...]:
    """Return the packages that trust= names, one or a list. Raises UserError for an invalid package name."""
    several = isinstance(trust, Sequence) and not isinstance(trust, str)
    names = trust if several else [] if trust is None else [trust]
    for name in names:
        if not (isinstance(name, str) and all(part.isidentifier() for part in name.split("."))):
            raise UserError(
                f"trust={name} is not a name of a Python package: name one, such as trust=my_lab, or a list"
            )
    return tuple(names)


def load(
    ckpt: str | Path | None = None,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    trust: str | Sequence[str] | None = None,
    precision: str = "32-true",
    compile: bool = False,
) -> Loaded:
    """Build the model of a run or checkpoint file and load its weights.

    Args:
        ckpt: a checkpoint file, a run directory, a folder of runs, or None for the newest run; see `locate`.
        weights: "ema" for the averaged weights, "raw" for those that were trained.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        trust: packages of your own that the checkpoint's config may build from.
        precision: the precision of the networks, one of `core.precision.PRECISIONS`.
        compile: compile each network with torch.compile at its first call, which takes up to minutes.

    Raises UserError if there is no such checkpoint, it is damaged or refused, or an argument is invalid.
    """
    check_weights(weights)
    device, trust = device_of(device), trusted_packages(trust)
    precision = precisions.precision_of(precision, device)
    if not isinstance(compile, bool):
        raise UserError(f"compile={compile} must be true or false")
    if isinstance(ckpt, Loaded | nn.Module):
        raise UserError(f"ckpt must be a run or a checkpoint, got {show(ckpt)}")
    if ckpt == "":
        raise UserError("ckpt= is empty: name a run or a checkpoint, or leave it out for the newest run")
    content, path = locate(None if ckpt is None else str(ckpt))
    model = restore_model(content, path, weights, trust)
    precisions.cast_for_inference(model, precision).eval().requires_grad_(False).to(device)
    if sentence := precisions.allow_tf32(torch.device(device), precision):
        precisions.print_once(sentence)
    if compile:
        for net in model.nets().values():  # type: ignore[operator]
            net.compile()
    kinds = modalities(content, model)
    output = build_modality(kinds["output"], trust)
    conditions = {name: build_modality(node, trust) for name, node in kinds["conditions"].items()}
    if wrong := [name for name, modality in conditions.items() if modality.field != name]:
        raise UserError(f"{path} is refused: its condition {wrong[0]} is a {conditions[wrong[0]].field}")
    return Loaded(model, content["config"], output, conditions, content["step"], path, trust, precision, weights)


def modalities(content: dict, model: object = None) -> Node:
    """Return the nodes of a file's modalities: `output`, and `conditions` by name.

    Files up to format 2 have none; theirs follow from the config, and from the model's null conditions for captions.
    """
    if "modalities" in content:
        return content["modalities"]
    return legacy_nodes(content["assets"], content["config"], null_conditions(model))


def null_conditions(model: Any) -> Batch:
    """Return a model's null conditions, by name (see `Diffusion.null`); empty for a model without any."""
    return model.null() if hasattr(model, "null") else {}


def model_conditions(model: object, config: dict, conditions: dict[str, Modality]) -> dict[str, Modality]:
    """Return those of a data set's conditions that a model takes: each with a null condition, and labels if it has classes."""
    names = {*null_conditions(model), *(() if config["model"].get("classes") is None else ("label",))}
    return {name: modality for name, modality in conditions.items() if name in names}


def weights_of(content: dict, weights: str = "ema") -> dict[str, Tensor]:
    """Return a file's tensors by name: with the averaged parameters for "ema", the trained ones for "raw"."""
    return content["model"] if weights == "raw" else {**content["model"], **content["ema"]}


def check_weights(weights: object, key: str = "weights") -> None:
    """Raise UserError unless `weights` is "ema" or "raw"."""
    if weights not in ("ema", "raw"):
        raise UserError(f"{key}={show(weights)} must be one of ema, raw")


def restore_model(content: dict, path: Path, weights: str, trust: Sequence[str]) -> nn.Module:
    """Build the model of a file's content and load its weights."""
    state = weights_of(content, weights)
    with torch.random.fork_rng(devices=[]):  # draws the first weights of networks, which the file's replace
        model = build_model(content["config"]["model"], state, trust)
    load_weights(model, state, path)
    return model


def build_model(node: Any, state: dict[str, Tensor], trust: Sequence[str] = ()) -> nn.Module:
    """Build the model of a file's config, without loading its weights `state`.

    Raises UserError if the config does not build a model, or builds one that is far larger than its weights.
    """
    model = build_stored(node, trust, weights=state)
    if not isinstance(model, nn.Module) or not callable(getattr(model, "nets", None)):
        raise UserError(
            f"the checkpoint's config.model is refused: {node.get('_target_')} is not a model, but a part of one"
        )
    return model


@contextlib.contextmanager
def explain_errors(loaded: Loaded, own: Collection[Exception] = ()) -> Iterator[None]:
    """Turn an error inside a loaded model into a UserError that names its file; the error itself is the cause.

    An error with the user's own code (`trust=`, or in the list `own`) and a lack of GPU memory are passed on unchanged.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if loaded.trust or error in own:
            raise
        raise UserError(
            f"{loaded.path} fails with its config and the arguments of this call ({type(error).__name__}: {reason(error)}): use "
            "another checkpoint, or other arguments"
        ) from error


def load_weights(model: nn.Module, state: dict, path: Path, strict: bool = True) -> list[str]:
    """Load those tensors of `state` that fit into a model; returns the keys that did not fit, sorted.

    Raises UserError if none fits, or if `strict` and one does not.
    """
    own = model.state_dict()
    other = {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape}
    misfit = model.load_state_dict({k: v for k, v in state.items() if k not in other}, strict=False)
    # Keys of older versions do not count: modules convert them while loading.
    wrong = other.union(misfit.missing_keys, misfit.unexpected_keys)
    if wrong and (strict or len(wrong) >= len(own.keys() | state.keys())):
        skip = ", or init_strict=false to skip what differs" if len(wrong) < len(own.keys() | state.keys()) else ""
        raise UserError(
            f"{path} does not fit this model: {len(wrong)} weights differ, the first is {min(wrong)} "
            f"(give the model= it was trained with{skip})"
        )
    return sorted(wrong)
