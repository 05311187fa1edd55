"""The file of a checkpoint: tensors and plain values, written whole or not at all, read without running anything.

A file is data somebody else may have written: `read` looks at all of it, and at its sizes, before anything is made of it, and
`build` says what its config may become.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai.core import archive, files, stored
from genai.core.errors import UserError
from genai.core.rng import RNG_VERSION

FORMAT = 3  # 1 knew no MOVED, 2 no modalities and no pretrained parts
DISK_HINT = "make room, then resume= goes on from the last good checkpoint"


class DamagedError(UserError):
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
    files.write(path, lambda file: torch.save(whole, file), hint=DISK_HINT)


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
            files.write(target, lambda file: shutil.copyfileobj(source, file), hint=DISK_HINT)


def read(path: Path) -> dict:
    """The content of a checkpoint on the CPU, checked: see `check` for what it is. MOVED has brought its plain values up to
    date, and `written` is the config as it lies in the file.

    Raises DamagedError if it is torn, and UserError if it cannot be read now, is not a checkpoint, holds code, or claims
    to be larger than it is.
    """
    try:
        content = archive.read(path)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: name a run, or a file in its checkpoints/") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint file") from None
    except archive.DamagedArchive as error:
        raise DamagedError(
            f"{path} is damaged, torn or no checkpoint ({error}): use another file of its folder"
        ) from error
    except archive.UnsafeArchive as error:
        raise UserError(f"{path} is refused, it holds more than tensors and plain values ({error})") from error
    except (OSError, MemoryError, RuntimeError) as error:  # torch's lack of memory has no type of its own
        why = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise UserError(f"{path} cannot be read now ({why}): try again when it can") from error
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is not a checkpoint of this project: it has no format number")
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
        except DamagedError as error:
            print(f"warning: {error}")
    found, problem = [], None
    for name in sorted(names.difference(lasting)):
        try:
            found.append((read(folder / name), folder / name))
        except DamagedError as error:
            problem = error
            print(f"warning: {error}")
    if names and not found:
        raise UserError(f"{run} is left as it is: all its {len(names)} checkpoints are damaged") from problem
    return max(found, key=lambda item: item[0]["step"], default=None)


def folder_of(ckpt: Path) -> Path:
    """The run of a checkpoint file, or the folder that it lies in."""
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent


def locate(ckpt: str | None) -> tuple[dict, Path]:
    """The checkpoint that `ckpt` names: a file, a run directory (its newest), a folder of runs, of which the newest is
    taken, or None for the newest run.

    Raises UserError if there is none.
    """
    run = Path("runs" if ckpt is None else ckpt).expanduser()
    if ckpt is not None and not os.path.isdir(run):
        return read(run), run
    if run.name == "checkpoints":
        run = run.parent
    if ckpt is None or not (run / "checkpoints").exists():
        folders = {path.parent.parent for path in run.glob("**/checkpoints/last.ckpt")}
        if not folders and ckpt is None:
            raise UserError("there is no run below runs/ yet: train one with python train.py, or name one with ckpt=")
        if folders:
            run = max(folders, key=lambda folder: (folder / "checkpoints" / "last.ckpt").stat().st_mtime)
            print(f"newest run: {run}")
    found = newest(run)
    if found is None:
        raise UserError(f"{run} holds no readable checkpoint (looked for checkpoints/*.ckpt): give ckpt= another one")
    return found
