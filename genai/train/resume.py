"""Checks before a run is resumed: its checkpoint is complete, and its data has the same items and the same meaning."""

from pathlib import Path
from typing import Any

from genai import checkpoint
from genai.core.errors import UserError
from genai.modalities.base import Modality
from genai.modalities.stored import difference

Modalities = tuple[Modality, dict[str, Modality]]
"""The modality of what a model generates, and those of its conditions."""

STATE = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "ema_updates": int,
    "means": dict,
}


def check_state(content: dict, path: Path) -> None:
    """Raise UserError unless a checkpoint has all of the trainer's state that resuming needs."""
    trainer = content["trainer"]
    wrong = [key for key, kind in STATE.items() if type(trainer.get(key)) is not kind]
    split = trainer.get("train_split")
    if split is not None and not (type(split) is dict and split.keys() == {"items", "checksum"}):
        wrong.append("train_split")
    if wrong:
        raise UserError(
            f"{path} cannot be resumed, its trainer state has no {', '.join(wrong)}: sample from it, or "
            f"start a new run with init_from={path}"
        )


def check_same_modalities(
    content: dict, path: Path, output: Modality, conditions: dict[str, Modality], other: str = ""
) -> None:
    """Raise UserError if tokens or labels of this data mean something other than those of a checkpoint.

    Args:
        output, conditions: modalities of this run's data.
        other: an alternative remedy, appended to the sentence of the error.
    """
    if what := difference(checkpoint.modalities(content), output, conditions):
        raise UserError(
            f"the {what} of this data is not that of {path}: give the data= it was trained on{other and ', ' + other}"
        )


def check_same_items(stored: dict[str, Any] | None, found: dict[str, Any], path: Path) -> None:
    """Raise UserError if the training items differ from the `stored` ones, which old checkpoints lack (None)."""
    if stored is not None and stored != found:
        number = found["items"]
        what = f"{number}" if number != stored["items"] else f"as many, but different ones ({found['checksum']})"
        raise UserError(
            f"{path} was trained on {stored['items']} items ({stored['checksum']}), and data= now has {what}: restore "
            "the old data (data.root= if they moved), or start a new run from these weights with init_from="
        )
