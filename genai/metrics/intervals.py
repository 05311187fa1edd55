"""How far a figure can be trusted: its spread over seeds of generation, and the interval of a mean over samples.

These are different doubts. Seeds say what another set of samples from the same model would give; the bootstrap, for
figures that are means over independent samples, what another set of items would. Neither says what another training
would.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from genai.core.errors import UserError, at_least
from genai.metrics.rows import Array


class Spread(NamedTuple):
    mean: float
    min: float
    max: float
    n: int


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def over_seeds(values: Iterable[float]) -> Spread:
    """Mean, least and greatest of one figure from several seeds. Raises UserError for none or one not finite."""
    found = [float(value) for value in values]
    if not found or not all(map(math.isfinite, found)):
        raise UserError(f"{found} must be finite numbers, one for each seed")
    return Spread(math.fsum(found) / len(found), min(found), max(found), len(found))


def bootstrap(values: Array, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of per-sample values (N,) and its percentile interval (Efron 1979); the same for the same seed, always.

    Not for a Fréchet distance, which is no mean over samples: drawing samples twice biases it. Raises UserError for
    fewer than two values, one that is not finite, or a level not between 0 and 1.
    """
    x = torch.as_tensor(values).double().flatten().cpu()
    if len(x) < 2 or not x.isfinite().all():
        raise UserError(f"{len(x)} values: at least two finite ones are needed for an interval")
    if not 0 < level < 1:
        raise UserError(f"level={level} must be between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(x), (len(x),), generator=generator) for _ in range(at_least(resamples, 1, "resamples")))
    means = torch.stack([x[draw].mean() for draw in draws])
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(x.mean().item(), low, high)
