"""Memorisation: distances of samples to the training items, compared with those of held-out items.

Samples of a model that has learned the distribution are as far from the training set as held-out items. A model that returns
training items has a perfect Fréchet distance, and is found only by this test. It works on pixels or on features; choose what a
copy should be invariant to.
"""

import bisect
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from genai.metrics.rows import Array, pair, squared_distances

RATIO, QUANTILE, SHARE = 0.5, 0.01, 0.05
ALARM = 0.01  # false-positive rate of each of the two tests


@dataclass(frozen=True)
class Memorisation:
    """The result of `memorisation` for N samples and M held-out items."""

    distances: Tensor  # (N,) of samples to their nearest training items
    nearest: Tensor  # (N,) indices of these training items
    held_out: Tensor  # (M,) distances of held-out items
    copies: int  # samples that equal a training item
    ratio: float  # of the median distance of samples to that of held-out items
    close: float  # share of samples nearer than all but 1 % of held-out items

    @property
    def is_memorised(self) -> bool | None:
        """True if the model memorises: `ratio` below 0.5 or `close` above 5 %; None where there are too few items to decide.

        The ratio finds models that mostly return training items, exact or blurred; `close` those that do so occasionally.
        Samples of the true distribution have a ratio near 1 and `close` near 1 %, but with few held-out items the 1 % quantile
        and the median are uncertain. A finding must therefore also be significant at 1 %, for any distribution of distances,
        see `limits`: with 20 held-out items 29 % of samples must be too close; with 200, and as many samples, 5.5 %. The result
        is None if nothing is found and 5 % of copies would not have been significant.
        """
        n = len(self.distances)
        needed, rank = limits(n, len(self.held_out))
        if self.close > SHARE and round(self.close * n) > needed:
            return True
        if self.ratio < RATIO and rank and self.distances.median() < self.held_out.sort().values[rank - 1]:
            return True
        return None if needed > SHARE * n else False

    @property
    def reason(self) -> str | None:
        """The reason why `is_memorised` is None, else None."""
        if self.is_memorised is not None:
            return None
        few = f"{len(self.distances)} samples and {len(self.held_out)} held-out items"
        return f"too few to tell: {few} cannot tell {SHARE:.0%} of copies from chance"

    def closest(self, count: int) -> list[tuple[int, int]]:
        """Return the `count` nearest pairs (sample, training item) as indices, nearest first."""
        order = self.distances.argsort(stable=True)[:count].tolist()
        return [(i, int(self.nearest[i])) for i in order]


def tails(n: int, m: int, rank: int) -> Tensor:
    """Compute P(more than k of n samples lie below the rank-th smallest of m held-out numbers) for k = 0, ..., n, (n + 1,).

    All n + m numbers are drawn from one continuous distribution. The count is then beta-binomial with parameters rank and
    m + 1 - rank, whatever the distribution.
    """
    x, a, b = torch.arange(n + 1, dtype=torch.float64), rank, m + 1 - rank
    inner = torch.lgamma(x + a) + torch.lgamma(n - x + b) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    outer = math.lgamma(n + 1) + math.lgamma(m + 1) - math.lgamma(n + m + 1) - math.lgamma(a) - math.lgamma(b)
    exactly = (inner + outer).exp()
    return exactly.flip(0).cumsum(0).flip(0) - exactly


@functools.cache
def limits(n: int, m: int) -> tuple[int, int]:
    """Return the critical values of the two tests for n samples and m held-out items, at the false-positive rate ALARM.

    They are the largest number of samples that may lie below the 1 % quantile of held-out distances, and the highest rank of
    a held-out distance such that it is significant if half of the samples lie below it (0 if there is none).
    """
    quantile = min(math.floor((m - 1) * QUANTILE) + 2, m)  # rank of a distance that is at least the quantile
    needed = int((tails(n, m, quantile) > ALARM).sum())
    rank = bisect.bisect_right(range(1, m + 1), ALARM, key=lambda k: tails(n, m, k)[math.ceil(n / 2) - 1].item())
    return needed, rank


def nearest_neighbours(x: Array, train: Array | Iterable[Array]) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance (N,) in float64 of items x (N, ...) to the nearest of train (M, ...), and its index (N,).

    `train` may be an iterable of parts, of which one at a time is in memory. Raises UserError for items of different sizes.
    """
    distance, index, first = (
        torch.full((len(x),), torch.inf, dtype=torch.float64),
        torch.zeros(len(x), dtype=torch.int64),
        0,
    )
    for part in [train] if isinstance(train, Array) else train:
        items, part = pair(x, part, ("items", "training items"))
        near = torch.cat([squared.argmin(1) for _, squared in squared_distances(items, part)])
        exact = torch.cat(
            [
                (a.double() - part[i].double()).norm(dim=1)
                for a, i in zip(items.split(1024), near.split(1024), strict=True)
            ]
        )
        closer = exact < distance
        distance, index = exact.where(closer, distance), (near + first).where(closer, index)
        first += len(part)
    return distance, index


def memorisation(samples: Array, train: Array | Iterable[Array], held_out: Array) -> Memorisation:
    """Compare samples (N, ...) with held-out items (M, ...) by their distances to the training items.

    Args:
        train: all training items, or an iterable of parts.
        held_out: items of the data's distribution that are not in `train`.

    Raises UserError for items of different sizes. The ratio is 1 if both medians are 0.
    """
    both = torch.cat(pair(samples, held_out, ("samples", "held-out items")))
    distances, nearest = nearest_neighbours(both, train)
    distances, reference = distances.split([len(samples), len(held_out)])
    ours, theirs = distances.quantile(0.5).item(), reference.quantile(0.5).item()
    ratio = ours / theirs if theirs else (1.0 if not ours else float("inf"))
    close = (distances < reference.quantile(QUANTILE)).double().mean().item()
    return Memorisation(distances, nearest[: len(samples)], reference, int((distances == 0).sum()), ratio, close)
