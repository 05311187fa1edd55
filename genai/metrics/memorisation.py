"""Whether samples are new: how near they lie to the training items, beside how near items do that were held out.

A model that learned the distribution makes samples that lie from the training set as held-out items do. One that gives
training items back has a perfect Fréchet distance and is found only here. Pixels or features will do; choose what a
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
ALARM = 0.01  # how often at most an honest model is called a memoriser, by each of two tests


@dataclass(frozen=True)
class Memorisation:
    """What `memorisation` found: of N samples and M held-out items, each with its nearest training item."""

    distances: Tensor  # (N,) of samples
    nearest: Tensor  # (N,) indices of their training items
    held_out: Tensor  # (M,) distances of held-out items
    copies: int  # samples that equal a training item
    ratio: float  # of the median distance of samples to that of held-out items
    close: float  # share of samples nearer than all but 1 % of held-out items

    @property
    def flagged(self) -> bool | None:
        """Whether this is more than generalisation explains: ratio below 0.5, or more than 5 % of samples too close; None where
        there are too few items to tell.

        The first finds a model that gives training items back, blurred or not; the second one that does so now and
        then. Samples of the data's own distribution have a ratio near 1 and `close` near 1 %, but of few held-out items the 1 %
        quantile and the median are uncertain. So what is found must also be rarer than once in 100 such models, whatever the
        distribution of distances, see `limits`: with 20 held-out items 29 % of samples must be too close, with 200, and as many
        samples, 5.5 %. The answer is None where nothing is found and a share of 5 % could not have been told from chance.
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
        """Why `flagged` is None, in words."""
        if self.flagged is not None:
            return None
        few = f"{len(self.distances)} samples and {len(self.held_out)} held-out items"
        return f"too few to tell: {few} cannot tell {SHARE:.0%} of copies from chance"

    def closest(self, count: int) -> list[tuple[int, int]]:
        """The `count` pairs (sample, training item) that lie nearest, to be looked at, nearest first."""
        order = self.distances.argsort(stable=True)[:count].tolist()
        return [(i, int(self.nearest[i])) for i in order]


def tails(n: int, m: int, rank: int) -> Tensor:
    """Probability that of n samples more than 0, ..., n lie below the rank-th smallest of m held-out numbers, all n + m drawn
    from one continuous distribution, whichever: beta-binomial with parameters rank and m + 1 - rank; float64 (n + 1,)."""
    x, a, b = torch.arange(n + 1, dtype=torch.float64), rank, m + 1 - rank
    inner = torch.lgamma(x + a) + torch.lgamma(n - x + b) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    outer = math.lgamma(n + 1) + math.lgamma(m + 1) - math.lgamma(n + m + 1) - math.lgamma(a) - math.lgamma(b)
    exactly = (inner + outer).exp()
    return exactly.flip(0).cumsum(0).flip(0) - exactly


@functools.cache
def limits(n: int, m: int) -> tuple[int, int]:
    """Of n samples and m held-out items: how many samples at most lie below the 1 % quantile, and the highest rank of a held-out
    distance that half of the samples lie below (0: none), each but for one honest model in 100."""
    quantile = min(math.floor((m - 1) * QUANTILE) + 2, m)  # the rank of a distance that is no smaller
    needed = int((tails(n, m, quantile) > ALARM).sum())
    rank = bisect.bisect_right(range(1, m + 1), ALARM, key=lambda k: tails(n, m, k)[math.ceil(n / 2) - 1].item())
    return needed, rank


def nearest_neighbours(x: Array, train: Array | Iterable[Array]) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) in float64 of items x (N, ...) to the nearest of train (M, ...), and its index (N,).

    `train` may come in parts, one after the other, in memory that does not grow with their number. Raises UserError for items of
    different sizes.
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
    """Compare samples (N, ...) with held-out items (M, ...) by their distances to the training items, whole or in parts.

    Held-out items are from the data's own distribution and in no way in `train`. The ratio is 1 where both medians are
    0. Raises UserError for items of different sizes.
    """
    both = torch.cat(pair(samples, held_out, ("samples", "held-out items")))
    distances, nearest = nearest_neighbours(both, train)
    distances, reference = distances.split([len(samples), len(held_out)])
    ours, theirs = distances.quantile(0.5).item(), reference.quantile(0.5).item()
    ratio = ours / theirs if theirs else (1.0 if not ours else float("inf"))
    close = (distances < reference.quantile(QUANTILE)).double().mean().item()
    return Memorisation(distances, nearest[: len(samples)], reference, int((distances == 0).sum()), ratio, close)
