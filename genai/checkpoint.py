"""Checkpoints: tensors and plain values in one file, written whole or not at all, read without running anything.

A file is data somebody else may have written: `read` looks at all of it, and at its sizes, before anything is made of it, and
`build` says what its config may become.
"""

import contextlib
import hashlib
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genai.build import build_modality, build_stored, reason
from genai.core import archive, files, stored
from genai.core import precision as precisions
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.core.rng import RNG_VERSION
from genai.core.stored import MOVED as MOVED
from genai.modalities.base import Modality
from genai.modalities.stored import of_older

FORMAT = 3  # 1 knew no MOVED, 2 no modalities and no pretrained parts
ROOM = "make room, then resume= goes on from the last good checkpoint"


class Damaged(UserError):
    """A checkpoint file that is torn or was changed, so that an older one may take its place."""


def save(content: dict, path: Path) -> None:
    """Write `content` to `path` as files.write does.

    Raises UserError if that cannot be done, or a floating point tensor of `model` or `ema` is not finite; what was there
    stays.
    """
    for part in ("model", "ema"):
        for name, tensor in content[part].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(f"{part} weight {name} is not finite: {path} is not written, the last good one stays")
    whole = {"format": FORMAT, "rng_version": RNG_VERSION, **content}
    files.write(path, lambda file: torch.save(whole, file), hint=ROOM)


def link(path: Path, name: str) -> None:
    """Give `path` a second name in its folder, atomically; a copy where the file system has no hard links.

    Raises UserError if that cannot be written.
    """
    import shutil

    target = path.with_name(name)
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, target)  # which does nothing where both are one file already
        temporary.unlink(missing_ok=True)
    except OSError:
        temporary.unlink(missing_ok=True)
        with path.open("rb") as source:
            files.write(target, lambda file: shutil.copyfileobj(source, file), hint=ROOM)


def read(path: Path) -> dict:
    """The content of a checkpoint on the CPU, checked: see `check` for what it is. MOVED has brought its plain values up to
    date, and `written` is the config as it lies in the file.

    Raises Damaged if it is torn, and UserError if it cannot be read now, is no checkpoint, holds code, or claims to be larger
    than it is.
    """
    try:
        content = archive.read(path)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: give ckpt= (or resume=, init_from=) a run or a file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint file") from None
    except archive.Damaged as error:
        raise Damaged(f"{path} is damaged, torn or no checkpoint ({error}): use another file of its folder") from error
    except archive.Refused as error:
        raise UserError(f"{path} is refused, it holds more than tensors and plain values ({error})") from error
    except (OSError, MemoryError, RuntimeError) as error:  # torch's lack of memory has no type of its own
        why = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise UserError(f"{path} cannot be read now ({why}): try again when it can") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is no checkpoint of this project: it has no format number")
    if type(content["format"]) is int and content["format"] > FORMAT:
        raise UserError(f"{path} has checkpoint format {content['format']}, this version reads up to {FORMAT}: update")
    try:
        check(content)
    except ValueError as error:
        raise UserError(f"{path} is refused, its content is not a checkpoint's: {error}") from None
    current = {part: stored.up_to_date(content[part]) for part in PLAIN & content.keys()}
    return {**content, "written": content["config"], **current}


def check(content: dict) -> None:
    """Raise ValueError unless the content of a file is what a checkpoint holds.

    `format` and `step` whole numbers, `model` and `ema` tensors by name, `trainer` whatever Lightning keeps, and `config` and
    `modalities` plain values without tuples and tensors: what a person could have typed.
    """
    names = "modalities" if "modalities" in content else "assets"
    for key, kind in {**SCHEMA, names: dict}.items():
        if type(content.get(key)) is not kind:
            raise ValueError(f"{key} must be of type {kind.__name__}, not {type(content.get(key)).__name__}")
    if content["format"] < 1 or content["step"] < 0:
        raise ValueError(f"format={content['format']}, step={content['step']} count from 1 and 0")
    for part in ("model", "ema"):
        for name, tensor in content[part].items():
            if type(name) is not str or type(tensor) is not Tensor:
                raise ValueError(f"{part} must hold tensors by name, and {name!r} is a {type(tensor).__name__}")
    for part in PLAIN & content.keys():
        _check_plain(content[part], part)
    for part in ("model", "data", "sampler"):
        node = content["config"].get(part)
        if type(node) is not dict or type(node.get("_target_")) is not str:
            raise ValueError(f"config.{part} must be a dict with a _target_")
    classes = content["config"]["model"].get("classes")
    if classes is not None and (type(classes) is not int or classes < 1):
        raise ValueError(f"config.model.classes={classes!r} must be a whole number, at least 1, or null")
    kinds = content.get("modalities", {"output": {"_target_": "", "state": {}}, "conditions": {}})
    if kinds.keys() != {"output", "conditions"} or type(kinds["conditions"]) is not dict:
        raise ValueError("modalities must hold output and conditions")
    for node in (kinds["output"], *kinds["conditions"].values()):
        if type(node) is not dict or node.keys() != {"_target_", "state"} or type(node["state"]) is not dict:
            raise ValueError("each of modalities must be a dict of a _target_ and its state")


SCHEMA = {"format": int, "step": int, "config": dict, "model": dict, "ema": dict, "trainer": dict}
PLAIN = {"config", "modalities", "assets"}  # the last in the place of modalities, up to format 2


def _check_plain(node: Any, key: str) -> None:
    """Raise ValueError unless the node is of dicts, lists, strings, numbers, booleans and None alone."""
    if type(node) is dict:
        for name, value in node.items():
            if type(name) is not str:
                raise ValueError(f"{key} has the key {name!r}, and only texts may be keys")
            _check_plain(value, f"{key}.{name}")
    elif type(node) is list:
        for i, value in enumerate(node):
            _check_plain(value, f"{key}[{i}]")
    elif type(node) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{key} is a {type(node).__name__}, and only plain values may be stored there")


def newest(run: Path) -> tuple[dict, Path] | None:
    """(content, path) of a run directory's last checkpoint, or if that is damaged of the one with the highest step that is
    not; damaged ones are named. None if there is no checkpoint at all.

    Raises UserError if all are damaged, or one cannot be read for another reason.
    """
    folder = run / "checkpoints"
    try:
        names = {name for name in os.listdir(folder) if name.endswith(".ckpt")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{folder} cannot be read now ({error.strerror}): try again when it can") from error
    lasting = [name for name in ("last.ckpt", "previous.ckpt") if name in names]
    for name in lasting:
        try:
            return read(folder / name), folder / name
        except Damaged as error:
            print(f"warning: {error}")
    found, problem = [], None
    for name in sorted(names.difference(lasting)):
        try:
            found.append((read(folder / name), folder / name))
        except Damaged as error:
            problem = error
            print(f"warning: {error}")
    if names and not found:
        raise UserError(f"{run} is left as it is: all its {len(names)} checkpoints are damaged") from problem
    return max(found, key=lambda item: item[0]["step"], default=None)


def locate(ckpt: str | None, runs: Path = Path("runs")) -> tuple[dict, Path]:
    """The checkpoint that `ckpt` names: a file, a run directory (its newest), a folder of runs, of which the newest is
    taken, or None for the newest run.

    Raises UserError if there is none.
    """
    run = runs if ckpt is None else Path(ckpt).expanduser()
    if ckpt is not None and not os.path.isdir(run):
        return read(run), run
    if run.name == "checkpoints":
        run = run.parent
    if ckpt is None or not (run / "checkpoints").exists():
        folders = {path.parent.parent for path in run.glob("**/checkpoints/last.ckpt")}
        if not folders and ckpt is None:
            raise UserError(
                f"there is no run below {runs}/ yet: train one with python train.py, or name one with ckpt="
            )
        if folders:
            run = max(folders, key=lambda folder: (folder / "checkpoints" / "last.ckpt").stat().st_mtime)
            print(f"newest run: {run}")
    found = newest(run)
    if found is None:
        raise UserError(f"{run} holds no readable checkpoint (looked for checkpoints/*.ckpt): give ckpt= another one")
    return found


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

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """The precision as a card records it; TF32 counts as float32."""
        return "float32" if self.precision == "32-true" else self.precision

    def computing(self) -> contextlib.AbstractContextManager:
        """The autocast context to call the model in; no context where the precision is not mixed."""
        return precisions.computing(self.precision, self.device)


def device_of(name: Any) -> str:
    """A device to compute on, where "auto" is the GPU if there is one. Raises UserError for what is none here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(name, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device={name} is none of auto, cpu, cuda, cuda:0, ...")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={name}, but torch sees no GPU here: use device=cpu or auto")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}, but torch sees {torch.cuda.device_count()} GPUs here: count from cuda:0")
    return name


def packages(trust: Any) -> tuple[str, ...]:
    """The packages that trust= names, one or a list. Raises UserError for what is no name of one."""
    names = (
        [trust]
        if isinstance(trust, str)
        else trust
        if isinstance(trust, Sequence)
        else []
        if trust is None
        else [trust]
    )
    for name in names:
        if not (isinstance(name, str) and all(part.isidentifier() for part in name.split("."))):
            raise UserError(f"trust={name} is no name of a Python package: name one, such as trust=my_lab, or a list")
    return tuple(names)


def load(
    ckpt: str | Path | None = None, weights: str = "ema", device: str = "cpu",
    trust: str | Sequence[str] | None = None, precision: str = "32-true", compile: bool = False,
) -> Loaded:  # fmt: skip
    """Build the model of a run or checkpoint file and load its weights, "ema" or "raw"; see `locate` for `ckpt`.

    Args:
        precision: of its networks, one of core.precision.PRECISIONS.
        compile: let torch.compile have each network at its first call, which takes a while.
    """
    _check_weights(weights)
    device, trust = device_of(device), packages(trust)
    precision = precisions.precision_of(precision, device)
    if not isinstance(compile, bool):
        raise UserError(f"compile={compile} must be true or false")
    content, path = locate(None if ckpt is None else str(ckpt))
    model = _filled(content, path, weights, trust)
    precisions.halved(model, precision).eval().requires_grad_(False).to(device)
    if sentence := precisions.allow_tf32(torch.device(device), precision):
        precisions.say(sentence)
    if compile:
        for net in model.nets().values():  # type: ignore[operator]
            net.compile()
    kinds = modalities(content, model)
    output = build_modality(kinds["output"], trust)
    told = {name: build_modality(node, trust) for name, node in kinds["conditions"].items()}
    if wrong := [name for name, modality in told.items() if modality.field != name]:
        raise UserError(f"{path} is refused: it tells its model a {told[wrong[0]].field} by the name of {wrong[0]}")
    return Loaded(model, content["config"], output, told, content["step"], path, trust, precision)


def modalities(content: dict, model: Any = None) -> dict[str, Any]:
    """What a file keeps of its output's modality and of its conditions'; in an older one captions are known by the model."""
    if "modalities" in content:
        return content["modalities"]
    return of_older(content["assets"], content["config"], nulls(model))


def nulls(model: Any) -> Batch:
    """The null of each condition of a model that can be told nothing."""
    return model.null() if hasattr(model, "null") else {}


def told(model: Any, config: dict, conditions: dict[str, Modality]) -> dict[str, Modality]:
    """Of a data set's conditions those that a model of this config is told: what it has a null for, labels if it has classes."""
    names = {*nulls(model), *(() if config["model"].get("classes") is None else ("label",))}
    return {name: modality for name, modality in conditions.items() if name in names}


def weights_of(content: dict, weights: str = "ema") -> dict[str, Tensor]:
    """All tensors of a file's model by name, with the averaged parameters for "ema", the trained ones for "raw"."""
    return content["model"] if weights == "raw" else {**content["model"], **content["ema"]}


def _check_weights(weights: Any, key: str = "weights") -> None:
    if weights not in ("ema", "raw"):
        raise UserError(f"{key}={weights} is none of ema, raw")


def _filled(content: dict, path: Path, weights: str, trust: Sequence[str]) -> nn.Module:
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
            f"the checkpoint's config.model is refused: {node.get('_target_')} is no model, but a part of one"
        )
    return model


@contextlib.contextmanager
def blamed(loaded: Loaded) -> Iterator[None]:
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
        raise UserError(
            f"{path} does not fit this model: {len(wrong)} weights differ, the first is {min(wrong)} "
            "(give the model= it was trained with, or init_strict=false to skip what differs)"
        )
    return sorted(wrong)


# A checkpoint as a part of another model


class Origin(NamedTuple):
    """Where the weights of a module are from, its attribute `pretrained_from`."""

    sha256: str | None
    weights: str
    frozen: bool


def pretrained(
    ckpt: str | None = None, sha256: str | None = None, weights: str = "ema", frozen: bool = True,
    shape: Sequence[int] | None = None, model: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """A model of another checkpoint as a module of this one; nothing is read here.

    When a run starts `adopt` reads the file that the config names and completes the node with what it found, and `fill` gives the
    module its weights. From then on they are part of the run's own checkpoints, and the node builds without the file.

    Args:
        ckpt: run or checkpoint, see `locate`; None for a model that needs no training.
        sha256: see `digest`; noted when a run starts, and another is refused from then on.
        weights: "ema" or "raw", which of the file's.
        frozen: it gets no gradient, and stays in evaluation mode.
        shape: of its latents where it is a Codec, noted when a run starts for the rest of the config to use.
        model: what it is, noted when a run starts.

    Raises UserError for a node that no run has completed.
    """
    _check_weights(weights)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"ckpt={ckpt} was not read: another checkpoint is read where a new run or a call names it, never because a file does"
        )
    if frozen:
        model.requires_grad_(False).eval()
        model.train = types.MethodType(_stays, model)  # type: ignore[method-assign]
    model.pretrained_from = Origin(sha256, weights, frozen)  # type: ignore[assignment]
    return model


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a frozen module."""
    return type(module).train(module, False)


def parts(node: Any, key: str) -> Iterator[tuple[str, dict]]:
    """The nodes of `pretrained` in a config node of this key, with their own keys; not those within another one, for all their
    weights are in its file."""
    if isinstance(node, dict):
        if node.get("_target_") == stored.PRETRAINED:
            yield key, node
        else:
            for name, value in node.items():
                yield from parts(value, f"{key}.{name}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from parts(value, f"{key}[{i}]")


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
    ckpt, weights = str(node["ckpt"]), node.get("weights", "ema")
    _check_weights(weights, f"{key}.weights")
    content, path = locate(ckpt)
    found, noted = digest(content, weights), node.get("sha256")
    if noted not in (None, found):
        raise UserError(
            f"{key}.ckpt={ckpt} has changed: its SHA-256 is {found[:16]}..., and {key}.sha256 says {str(noted)[:16]}...; what "
            f"was learned with another means something else, so bring the old file back or train anew ({key}.sha256=null)"
        )
    node = {**node, "sha256": found, "weights": weights, "model": content["config"]["model"]}
    filled = _filled(content, path, weights, trust)
    model = pretrained(sha256=found, weights=weights, frozen=node.get("frozen", True), model=filled)
    if node.get("shape") is not None:
        node["shape"] = list(getattr(model, "latent_shape", node["shape"]))  # type: ignore[call-overload]
    return Part(node, content, path, model)


def placed(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of a model that are parts, by name; not those within another one."""
    if hasattr(model, "pretrained_from"):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from placed(child, f"{prefix}.{name}".lstrip("."))


def fill(model: nn.Module, adopted: Mapping[str, Part]) -> None:
    """Give the modules of a model that are adopted parts, by key, their weights. Raises UserError for a part that is no module of
    the model."""
    found = [module for _, module in placed(model)]
    for key, part in adopted.items():
        mine = [module for module in found if module.pretrained_from == part.model.pretrained_from]
        if not mine:
            raise UserError(f"{key} is no module of this model, which must have it as an attribute to store it")
        for module in mine:
            module.load_state_dict(part.model.state_dict())
