"""The checkpoint file: tensors and plain values, written atomically and read without executing anything in it.

A file may come from anywhere: `read` checks all of its content and sizes before anything is built from it; what its config
may build is decided in `genai.checkpoint.build`.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from genai.core import archive, files, stored
from genai.core.errors import UserError
from genai.core.rng import RNG_VERSION

FORMAT = 3  # 2 added targets under newer names (stored.MOVED), 3 modalities and pretrained parts
DISK_HINT = "make room, then resume= goes on from the last good checkpoint"


class DamagedError(UserError):
    """Raised for a checkpoint file that is incomplete or corrupted, so that an older one may be read instead."""


def save(content: dict, path: Path) -> None:
    """Write `content` to `path`, atomically (see `files.write`).

    Raises UserError if the file cannot be written, or if a floating-point tensor of `model` or `ema` is not finite; the file
    that was at `path` then stays.
    """
    for part in ("model", "ema"):
        for name, tensor in content[part].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(f"{part} weight {name} is not finite: {path} is not written, the last good one stays")
    whole = {"format": FORMAT, "rng_version": RNG_VERSION, **content}
    files.write(path, lambda file: torch.save(whole, file), hint=DISK_HINT)


def link(path: Path, name: str) -> None:
    """Give `path` a second name in its folder, atomically: a hard link, or a copy where the file system has none.

    Raises UserError if it cannot be written.
    """
    import shutil

    target = path.with_name(name)
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, target)  # does nothing where both names are one file already: remove the temporary then
        temporary.unlink(missing_ok=True)
    except OSError:
        temporary.unlink(missing_ok=True)
        with path.open("rb") as source:
            files.write(target, lambda file: shutil.copyfileobj(source, file), hint=DISK_HINT)


def read(path: Path) -> dict:
    """Read a checkpoint onto the CPU and check it; see `check` for its content.

    Targets in its plain values have their current names (`stored.MOVED`); `written` holds the config as it is in the file.

    Raises DamagedError if the file is incomplete or corrupted, and UserError if it cannot be read, is not a checkpoint, holds
    code, or claims to be larger than it is.
    """
    try:
        content = archive.read(path)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: name a run, or a file in its checkpoints/") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint file") from None
    except archive.DamagedArchive as error:
        raise DamagedError(
            f"{path} is damaged, cut off or not a checkpoint ({error}): use another file of its folder"
        ) from error
    except archive.UnsafeArchive as error:
        raise UserError(f"{path} is refused, it holds more than tensors and plain values ({error})") from error
    except (OSError, MemoryError, RuntimeError) as error:  # torch raises RuntimeError where CPU memory is short
        why = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise UserError(f"{path} cannot be read ({why}): try again when that is fixed") from error
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
    """Raise ValueError unless the content of a file is that of a checkpoint.

    A checkpoint holds `format` and `step` (whole numbers), `model` and `ema` (tensors by name), `trainer` (Lightning's state),
    and `config` and `modalities` (plain values: dicts, lists, strings, numbers, booleans and None).
    """
    names = "modalities" if "modalities" in content else "assets"
    for key, kind in {**SCHEMA, names: dict}.items():
        if type(content.get(key)) is not kind:
            raise ValueError(f"{key} must be of type {kind.__name__}, not {type(content.get(key)).__name__}")
    if content["format"] < 1 or content["step"] < 0:
        raise ValueError(f"format={content['format']}, step={content['step']} must be at least 1 and 0")
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
PLAIN = {"config", "modalities", "assets"}  # up to format 2, files had `assets` instead of `modalities`


def _check_plain(node: object, key: str) -> None:
    """Raise ValueError unless a node consists of dicts, lists, strings, numbers, booleans and None."""
    if type(node) is dict:
        for name, value in node.items():
            if type(name) is not str:
                raise ValueError(f"{key} has the key {name!r}, and only strings may be keys")
            _check_plain(value, f"{key}.{name}")
    elif type(node) is list:
        for i, value in enumerate(node):
            _check_plain(value, f"{key}[{i}]")
    elif type(node) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{key} is a {type(node).__name__}, and only plain values may be stored there")


def newest(run: Path) -> tuple[dict, Path] | None:
    """Read the last checkpoint of a run directory; returns (content, path), or None if there is no checkpoint.

    If last.ckpt is damaged it is previous.ckpt, then the intact file with the highest step; a warning names each damaged one.

    Raises UserError if all are damaged, or if one cannot be read for another reason.
    """
    folder = run / "checkpoints"
    try:
        names = {name for name in os.listdir(folder) if name.endswith(".ckpt")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): try again when that is fixed") from error
    recent = [name for name in ("last.ckpt", "previous.ckpt") if name in names]
    for name in recent:
        try:
            return read(folder / name), folder / name
        except DamagedError as error:
            print(f"warning: {error}")
    found, problem = [], None
    for name in sorted(names.difference(recent)):
        try:
            found.append((read(folder / name), folder / name))
        except DamagedError as error:
            problem = error
            print(f"warning: {error}")
    if names and not found:
        raise UserError(f"{run} cannot be used: all its {len(names)} checkpoints are damaged") from problem
    return max(found, key=lambda item: item[0]["step"], default=None)


def folder_of(ckpt: Path) -> Path:
    """Return the run directory of a checkpoint file, or the folder of a file that is in none."""
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent


def locate(ckpt: str | None, key: str = "ckpt") -> tuple[dict, Path]:
    """Find and read the checkpoint that `ckpt` names; returns (content, path).

    `ckpt` is a checkpoint file, a run directory (its last checkpoint), a folder of runs (the newest run in it), or None for the
    newest run below runs/. `key` is the config key that names it, for the error.

    Raises UserError if there is no checkpoint.
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
        raise UserError(f"{run} holds no readable checkpoint (looked for checkpoints/*.ckpt): give {key}= another one")
    return found
