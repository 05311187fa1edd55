"""Checkpoints: tensors and plain values in one file, written whole or not at all, read without running anything.

The one place where a config becomes a Model. A config inside a checkpoint is data somebody else may have written, so
every `_target_` must be a class or function defined exactly where its name says, in a room that holds what models are
built from, or in a package the user admits with `trust=`.
"""

import importlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genai.core import files
from genai.core.errors import UserError
from genai.core.rng import RNG_VERSION

FORMAT = 1
ROOM = "make room, then resume= goes on from the last good checkpoint"
BUILDABLE = ("genai.models.", "genai.nn.", "genai.losses.", "genai.data.")


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
    """The content of a checkpoint on the CPU.

    Raises UserError if it cannot be read now, is no checkpoint, or holds code, and Damaged if it is torn.
    """
    try:
        _check_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: give ckpt= (or resume=, init_from=) a run or a file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint file") from None
    except UserError:
        raise
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise UserError(f"{path} cannot be read now ({reason}): try again when it can") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if "not enough memory" in reason:  # torch's own error has no type of its own
            raise UserError(f"{path} cannot be read now ({reason}): try again when it can") from error
        raise UserError(f"{path} is refused, it holds more than tensors and plain values ({reason})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is no checkpoint of this project: it has no format number")
    if content["format"] > FORMAT:
        raise UserError(f"{path} has checkpoint format {content['format']}, this version reads up to {FORMAT}: update")
    return content


def _check_whole(path: Path) -> None:
    """Raise Damaged unless the file is an archive whose checksums hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile has many words for damaged bytes
        raise Damaged(f"{path} is torn or no checkpoint ({error}): use another file of its folder") from error
    if torn is not None:
        raise Damaged(f"{path} is damaged at {torn}: use another file of its folder")


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
    """The checkpoint that `ckpt` names: a file, a run directory (its newest), or None for the newest run.

    Raises UserError if there is none.
    """
    if ckpt is not None and not Path(ckpt).is_dir():
        return read(Path(ckpt)), Path(ckpt)
    if ckpt is None:
        folders = {path.parent.parent for path in runs.glob("**/checkpoints/last.ckpt")}
        if not folders:
            raise UserError(
                f"there is no run below {runs}/ yet: train one with python train.py, or name one with ckpt="
            )
        run = max(folders, key=lambda folder: (folder / "checkpoints" / "last.ckpt").stat().st_mtime)
        print(f"newest run: {run}")
    else:
        run = Path(ckpt)
    found = newest(run)
    if found is None:
        raise UserError(f"{run} holds no readable checkpoint (looked for checkpoints/*.ckpt): give ckpt= another one")
    return found


def _targets(node: Any) -> Iterator[str]:
    """Every `_target_` below node. Raises UserError for anything that is more than data."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(key, str) and key.startswith("_") and key not in ("_target_", "_partial_"):
                raise UserError(
                    f"the checkpoint's config is refused: it uses {key}, and only _target_ and _partial_ may be"
                )
            if key == "_target_":
                yield value
            else:
                yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)
    elif isinstance(node, str) and "${" in node:
        raise UserError(
            f"the checkpoint's config is refused: {node!r} is an interpolation, and only values may be stored"
        )


def check_target(target: Any, trust: Sequence[str] = ()) -> None:
    """Raise UserError unless `target` is the true name of a class or function that a checkpoint may build."""
    rooms = (*BUILDABLE, *(f"{package}." for package in trust))
    module, _, name = str(target).rpartition(".")
    if not f"{module}.".startswith(rooms):
        package = str(target).partition(".")[0]
        hint = f"; if you trust it, add trust={package}" if package not in ("genai", "os", "builtins") else ""
        raise UserError(f"the checkpoint wants to build {target}, which is outside genai's models and data{hint}")
    try:
        found = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError):
        raise UserError(
            f"the checkpoint wants to build {target}, which is not defined in a module of that name"
        ) from None
    if not callable(found) or f"{found.__module__}.{found.__qualname__}" != target:
        raise UserError(f"the checkpoint wants to build {target}, which is not defined there but only imported")


def build(node: Any, trust: Sequence[str] | None = None) -> Any:
    """Instantiate a config node, everything inside it first.

    With `trust` (possibly empty) the node comes from a file: all of it is checked before anything is built, see the
    module's head. Without, it is what the user typed. Raises UserError for an argument that a target does not take.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for target in _targets(node) if trust is not None else ():
        check_target(target, trust or ())
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause, message = error.__cause__, str(error).splitlines()
        while cause is not None and isinstance(cause.__cause__, Exception) and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if (isinstance(cause, TypeError) and "argument" in str(cause)) or "locating" in message[0]:
            raise UserError(f"{node.get('_target_')} cannot be built: {cause or message[0]}") from error
        raise (cause or error) from None


@dataclass
class Loaded:
    """A model ready to sample: in evaluation mode, with the config, sampler node and assets it was stored with."""

    model: nn.Module
    config: dict
    assets: dict
    step: int
    path: Path
    trust: tuple[str, ...] = ()


def load(
    ckpt: str | Path | None = None, weights: str = "ema", device: str = "cpu", trust: Sequence[str] = ()
) -> Loaded:
    """Build the model of a run or checkpoint file and load its weights, "ema" or "raw"; see `locate` for `ckpt`."""
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights} is none of ema, raw")
    content, path = locate(None if ckpt is None else str(ckpt))
    model = build(content["config"]["model"], trust)
    state = content["model"] if weights == "raw" else {**content["model"], **content["ema"]}
    load_weights(model, state, path)
    model.eval().requires_grad_(False).to(device)
    return Loaded(model, content["config"], content["assets"], content["step"], path, tuple(trust))


def load_weights(model: nn.Module, state: dict, path: Path, strict: bool = True) -> list[str]:
    """Load what fits into model; returns the keys that did not.

    Raises UserError if strict and some did not, or if none did.
    """
    own = model.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong and (strict or len(wrong) >= len(own.keys() | state.keys())):
        raise UserError(
            f"{path} does not fit this model: {len(wrong)} weights differ, the first is {min(wrong)} "
            "(give the model= it was trained with, or init_strict=false to skip what differs)"
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in wrong}, strict=False)
    return sorted(wrong)
