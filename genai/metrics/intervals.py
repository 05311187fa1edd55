"""Uncertainty of figures: the spread over seeds of generation, and the bootstrap interval of a mean.

The spread over seeds estimates what another set of samples of the same model would give; the bootstrap, for means over
independent items, what another set of items would. Neither covers the variation between trainings.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from genai.core.errors import UserError, at_least
from genai.metrics.rows import Array


class Spread(NamedTuple):
    """Mean, least and greatest of n values."""

    mean: float
    min: float
    max: float
    n: int


class Interval(NamedTuple):
    """A mean with the ends of its interval."""

    mean: float
    low: float
    high: float


def over_seeds(values: Iterable[float]) -> Spread:
    """Summarise a figure over several seeds. Raises UserError without values, or for one that is not finite."""
    found = [float(value) for value in values]
    if not found or not all(map(math.isfinite, found)):
        raise UserError(f"{found} must be finite numbers, one for each seed")
    return Spread(math.fsum(found) / len(found), min(found), max(found), len(found))


def bootstrap(values: Array, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Compute the mean of values (N,) with its bootstrap percentile interval (Efron 1979), deterministic by `seed`.

    It is not valid for a Fréchet distance, which is not a mean over samples: repeated samples bias it. Raises UserError for
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


def interval(values: torch.Tensor) -> Interval:
    """Return the bootstrap interval of the mean of values (N,); a point for one value or infinite ones."""
    if len(values) < 2 or not values.isfinite().all():
        return Interval(*[values.double().mean().item()] * 3)
    return bootstrap(values)
