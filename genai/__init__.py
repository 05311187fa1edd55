"""A from-scratch research training framework for generative models; see README.md.

Its Python interface:

import genai

run = genai.train(genai.compose(["model=ddpm", "data=digits", "max_steps=1200"]))
loaded = genai.load(run)
batch = genai.sample(loaded, n=16, seed=0, label=7)
figures = genai.evaluate(loaded, metrics=["frechet"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from omegaconf import DictConfig

    from genai.checkpoint import Loaded
    from genai.core.protocols import Batch

    def train(cfg: DictConfig | Sequence[str]) -> Path:
        """Train as a config says and return the run directory; see `genai.train.Train`."""
        ...
else:
    from genai import train as train

__version__ = "0.1.0"


def compose(overrides: Sequence[str] = (), config: str = "train", config_dir: str | Path | None = None) -> DictConfig:
    """Return the checked config of a command, `genai.compose(["model=edm", "max_steps=100"])`; see `genai.cli.door.compose`."""
    from genai.cli.door import compose

    return compose(overrides, config, config_dir)


def load(
    ckpt: Any = None,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    trust: str | Sequence[str] | None = None,
    precision: str = "32-true",
    compile: bool = False,
) -> Loaded:
    """Return the model of a run directory or checkpoint file (default: the newest run); see `genai.checkpoint.load`."""
    from genai import checkpoint

    return checkpoint.load(ckpt, weights, device, trust, precision, compile)


def sample(loaded: Loaded, n: int = 16, seed: int = 0, label: Any = None, **arguments: Any) -> Batch:
    """Return n samples, with seeds seed, seed + 1, ...; see `genai.sampling.sample`."""
    from genai import sampling

    return sampling.sample(loaded, n, seed, label, **arguments)


def evaluate(loaded: Loaded, split: str = "test", metrics: Any = None, n: int | None = None, **settings: Any) -> dict:
    """Measure a loaded model on a split of its data, as `evaluate.py` does; see `genai.evaluation.door.evaluate`."""
    from genai.evaluation.door import evaluate

    return evaluate(loaded, split, metrics, n, **settings)


def texts(loaded: Loaded, batch: Batch) -> list[str]:
    """Return the texts of a language model's samples, without their prompts."""
    return loaded.modality.preview(batch)  # type: ignore[return-value]
