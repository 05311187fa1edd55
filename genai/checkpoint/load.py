"""A model from a checkpoint, with its weights and with what it was stored with."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genai.checkpoint.build import build_modality, build_stored, reason
from genai.checkpoint.file import locate
from genai.core import precision as precisions
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.modalities.base import Modality
from genai.modalities.stored import legacy_nodes


@dataclass
class Loaded:
    """A model ready to sample: in evaluation mode, with what it was stored with: its config, the modality of what it makes and
    those of what it is told, by name."""

    model: nn.Module
    config: dict
    modality: Modality
    conditions: dict[str, Modality]
    step: int
    path: Path
    trust: tuple[str, ...] = ()
    precision: str = "32-true"
    """Precision of the networks, one of `core.precision.PRECISIONS`."""
    weights: str = "ema"
    """Which of the checkpoint's weights these are, ema or raw."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """The precision as a card records it; TF32 counts as float32."""
        return "float32" if self.precision == "32-true" else self.precision

    def computing(self) -> contextlib.AbstractContextManager:
        """The autocast context to call the model in; no context where the precision is not mixed."""
        return precisions.autocast(self.precision, self.device)


def device_of(name: Any) -> str:
    """A device to compute on, where "auto" is the GPU if there is one. Raises UserError for what is none here."""
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
    """The packages that trust= names, one or a list. Raises UserError for what is not a name of one."""
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
    device: str = "cpu",
    trust: str | Sequence[str] | None = None,
    precision: str = "32-true",
    compile: bool = False,
) -> Loaded:
    """Build the model of a run or checkpoint file and load its weights, "ema" or "raw"; see `locate` for `ckpt`.

    Args:
        precision: of its networks, one of core.precision.PRECISIONS.
        compile: let torch.compile have each network at its first call, which takes a while.
    """
    check_weights(weights)
    device, trust = device_of(device), trusted_packages(trust)
    precision = precisions.precision_of(precision, device)
    if not isinstance(compile, bool):
        raise UserError(f"compile={compile} must be true or false")
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
    told = {name: build_modality(node, trust) for name, node in kinds["conditions"].items()}
    if wrong := [name for name, modality in told.items() if modality.field != name]:
        raise UserError(f"{path} is refused: it tells its model a {told[wrong[0]].field} by the name of {wrong[0]}")
    return Loaded(model, content["config"], output, told, content["step"], path, trust, precision, weights)


def modalities(content: dict, model: Any = None) -> dict[str, Any]:
    """What a file keeps of its output's modality and of its conditions'; in an older one captions are known by the model."""
    if "modalities" in content:
        return content["modalities"]
    return legacy_nodes(content["assets"], content["config"], null_conditions(model))


def null_conditions(model: Any) -> Batch:
    """The null of each condition of a model that can be told nothing."""
    return model.null() if hasattr(model, "null") else {}


def model_conditions(model: Any, config: dict, conditions: dict[str, Modality]) -> dict[str, Modality]:
    """Of a data set's conditions those that a model of this config is told: what it has a null for, labels if it has classes."""
    names = {*null_conditions(model), *(() if config["model"].get("classes") is None else ("label",))}
    return {name: modality for name, modality in conditions.items() if name in names}


def weights_of(content: dict, weights: str = "ema") -> dict[str, Tensor]:
    """All tensors of a file's model by name, with the averaged parameters for "ema", the trained ones for "raw"."""
    return content["model"] if weights == "raw" else {**content["model"], **content["ema"]}


def check_weights(weights: Any, key: str = "weights") -> None:
    if weights not in ("ema", "raw"):
        raise UserError(f"{key}={weights} must be one of ema, raw")


def restore_model(content: dict, path: Path, weights: str, trust: Sequence[str]) -> nn.Module:
    """The model of a file with its weights."""
    state = weights_of(content, weights)
    model = build_model(content["config"]["model"], state, trust)
    load_weights(model, state, path)
    return model


def build_model(node: Any, state: dict[str, Tensor], trust: Sequence[str] = ()) -> nn.Module:
    """The model that a file's config says, not yet with its weights `state`.

    Raises UserError if that builds no model, or one far larger than its weights.
    """
    model = build_stored(node, trust, weights=state)
    if not isinstance(model, nn.Module) or not callable(getattr(model, "nets", None)):
        raise UserError(
            f"the checkpoint's config.model is refused: {node.get('_target_')} is not a model, but a part of one"
        )
    return model


@contextlib.contextmanager
def explain_errors(loaded: Loaded) -> Iterator[None]:
    """Say of an error that a loaded model raises in use which file it is of; the error itself is the cause.

    Code of the user's own, admitted with `trust=`, and a lack of memory speak for themselves.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if loaded.trust:
            raise
        raise UserError(
            f"{loaded.path} fails with what its config and this call say ({type(error).__name__}: {reason(error)}): use another "
            "checkpoint, or other arguments"
        ) from error


def load_weights(model: nn.Module, state: dict, path: Path, strict: bool = True) -> list[str]:
    """Load what fits into model; returns the keys that did not.

    Raises UserError if strict and some did not, or if none did.
    """
    own = model.state_dict()
    other = {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape}
    misfit = model.load_state_dict({k: v for k, v in state.items() if k not in other}, strict=False)
    wrong = other.union(misfit.missing_keys, misfit.unexpected_keys)  # modules know what older states of theirs mean
    if wrong and (strict or len(wrong) >= len(own.keys() | state.keys())):
        skip = ", or init_strict=false to skip what differs" if len(wrong) < len(own.keys() | state.keys()) else ""
        raise UserError(
            f"{path} does not fit this model: {len(wrong)} weights differ, the first is {min(wrong)} "
            f"(give the model= it was trained with{skip})"
        )
    return sorted(wrong)
