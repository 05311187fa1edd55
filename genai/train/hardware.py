"""The device and the precision that a run trains with."""

import os
from typing import Any

import torch
from omegaconf import DictConfig

from genai.core import precision
from genai.core.errors import UserError
from genai.train.strategy import Ranks

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true")  # fp16 would need its loss scaled


def choose_hardware(trainer: DictConfig, ranks: Ranks) -> dict[str, Any]:
    """Return Lightning's arguments for the accelerator, devices, nodes, precision and strategy.

    Raises:
        UserError: an accelerator, a precision or a number of devices that this machine does not have.
    """
    accelerator = trainer.accelerator
    if trainer.precision not in PRECISIONS:
        raise UserError(f"trainer.precision={trainer.precision} must be one of {', '.join(PRECISIONS)}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={accelerator}, but torch sees no GPU here: use trainer.accelerator=cpu or auto"
        )
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):  # Apple's has no float64, which tables and means need
        raise UserError(f"trainer.accelerator={accelerator} must be one of auto, cpu, gpu, cuda")
    gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if gpu and ranks.here > torch.cuda.device_count():
        raise UserError(f"trainer.devices={ranks.here}, but there are {torch.cuda.device_count()} GPUs here")
    most = max(2, os.cpu_count() or 1)
    if not gpu and not ranks.launcher and ranks.here > most:
        raise UserError(
            f"trainer.devices={ranks.here} would be as many processes on a CPU of {most} cores: use at most {most}"
        )
    return {
        "accelerator": "gpu" if gpu else "cpu",
        "devices": ranks.here,
        "num_nodes": ranks.world // ranks.here,
        "precision": precision.precision_of(trainer.precision, "cuda" if gpu else "cpu", "trainer.precision"),
        "strategy": "ddp" if ranks.world > 1 else "auto",
    }


def choose_device(hardware: dict[str, Any], ranks: Ranks) -> torch.device:
    """Return the device on which this rank trains."""
    return torch.device("cuda", ranks.local) if hardware["accelerator"] == "gpu" else torch.device("cpu")
