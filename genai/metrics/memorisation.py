"""Whether samples are new: how near they lie to the training items, beside how near items do that were held out.

A model that learned the distribution makes samples that lie from the training set as held-out items do. One that gives
training items back has a perfect Fréchet distance and is found only here. Pixels or features will do; choose what a
copy should be invariant to.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from genai.metrics.rows import Array, pair, squared_distances

RATIO, QUANTILE, SHARE = 0.5, 0.01, 0.05


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
    def flagged(self) -> bool:
        """Whether this is more than generalisation explains: ratio below 0.5, or more than 5 % of samples too close.

        The first finds a model that gives training items back, blurred or not; the second one that does so now and
        then. Samples of the data's own distribution have a ratio near 1 and `close` near 1 %; above 5 % comes by chance
        about once in 400 choices of 200 held-out items, and once in 25 of 100: hold out enough of them.
        """
        return self.ratio < RATIO or self.close > SHARE

    def closest(self, count: int) -> list[tuple[int, int]]:
        """The `count` pairs (sample, training item) that lie nearest, to be looked at, nearest first."""
        order = self.distances.argsort(stable=True)[:count].tolist()
        return [(i, int(self.nearest[i])) for i in order]


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
        exact = torch.cat([
            (a.double() - part[i].double()).norm(dim=1)
            for a, i in zip(items.split(1024), near.split(1024), strict=True)
        ])  # fmt: skip
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
