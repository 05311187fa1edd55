"""A from-scratch research training framework for generative models; see README.md.

import genai

m = genai.load("runs/ddpm_digits/2026-01-01_12-00-00")
batch = genai.sample(m, n=16, seed=0, label=7)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genai.checkpoint import Loaded
    from genai.core.protocols import Batch

__version__ = "0.1.0"


def load(
    ckpt: Any = None,
    weights: str = "ema",
    device: str = "cpu",
    trust: str | Sequence[str] | None = None,
    precision: str = "32-true",
    compile: bool = False,
) -> Loaded:
    """The model of a run directory or checkpoint file (default: the newest run), ready to sample; see `genai.checkpoint.load`."""
    from genai import checkpoint

    return checkpoint.load(ckpt, weights, device, trust, precision, compile)


def sample(loaded: Loaded, n: int = 16, seed: int = 0, label: Any = None, **arguments: Any) -> Batch:
    """n samples with seeds seed, seed + 1, ...; see `genai.sampling.sample`."""
    from genai import sampling

    return sampling.sample(loaded, n, seed, label, **arguments)


def texts(loaded: Loaded, batch: Batch) -> list[str]:
    """What a model of text wrote, without the prompts."""
    return loaded.modality.preview(batch)  # type: ignore[return-value]
