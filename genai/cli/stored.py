"""Reads the config.yaml of a run without torch."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai.core.errors import UserError
from genai.core.runs import is_run, newest_run
from genai.core.stored import up_to_date

CONFIG_BYTES = 2**22  # largest size of a config.yaml that is read


def find_run(folder: Path, key: str) -> Path | None:
    """Return the folder if it is a run directory, else the newest one below it, which is printed, or None if there is none."""
    if is_run(folder) or (found := newest_run(folder)) is None:
        return folder if is_run(folder) else None
    print(f"{key}={folder}: the newest run there is {found}", file=sys.stderr, flush=True)
    return found


def stored_config(path: Path, groups: Sequence[str] = ("model", "data", "sampler")) -> dict[str, Any]:
    """Return the config.yaml of a run, with keys and targets of older versions renamed. Its author need not be trusted.

    Raises UserError unless it can be read, holds plain values alone, and has these groups of keys.
    """
    try:
        reason = "" if path.stat().st_size <= CONFIG_BYTES else f"it has more than {CONFIG_BYTES // 2**20} MiB"
        text = "" if reason else path.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        if "${" in text or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            reason = "it has references (${...} or *), which no run writes"
        found: Any = {} if reason else up_to_date(OmegaConf.to_container(OmegaConf.create(text)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason, found = " ".join(str(error).split())[:200], {}
    if not reason and not (isinstance(found, dict) and found):
        reason = "it holds no keys"
    for group in groups if not reason else ():
        node = found.get(group)
        if not isinstance(node, dict):
            reason = f"it has no {group}"
        elif group in ("model", "data", "sampler") and not isinstance(node.get("_target_"), str):
            reason = f"its {group} has no _target_"
        if reason:
            break
    logger = found.get("logger") if not reason else None
    if logger is not None and not (isinstance(logger, dict) and isinstance(logger.get("_target_"), str)):
        reason = "its logger has no _target_"
    if reason:
        raise UserError(
            f"{path} is not a config of a run ({reason}): restore the file, or name a checkpoint file below it with ckpt="
        )
    return found
