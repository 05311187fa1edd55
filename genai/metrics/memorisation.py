"""Whether samples are new: how near they lie to the training items, beside how near items do that were held out.

A model that learned the distribution makes samples that lie from the training set as held-out items do. One that gives
training items back has a perfect Fréchet distance and is found only here. Pixels or features will do; choose what a
copy should be invariant to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from genai.metrics.rows import Array, pair, rows, squared_distances

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


def nearest_neighbours(x: Array, train: Array) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) in float64 of items x (N, ...) to the nearest of train (M, ...), and its index (N,).

    Raises UserError for items of different sizes.
    """
    x, train = pair(x, train, ("items", "training items"))
    index = torch.cat([squared.argmin(1) for _, squared in squared_distances(x, train)])
    exact = [
        (a.double() - train[i].double()).norm(dim=1) for a, i in zip(x.split(1024), index.split(1024), strict=True)
    ]
    return torch.cat(exact), index


def memorisation(samples: Array, train: Array, held_out: Array) -> Memorisation:
    """Compare samples (N, ...) with held-out items (M, ...) by their distances to the training items.

    Held-out items are from the data's own distribution and in no way in `train`. The ratio is 1 where both medians are
    0. Raises UserError for items of different sizes.
    """
    distances, nearest = nearest_neighbours(samples, train)
    reference, _ = nearest_neighbours(held_out, train)
    copies = int((rows(samples) == rows(train)[nearest]).all(1).sum())
    ours, theirs = distances.quantile(0.5).item(), reference.quantile(0.5).item()
    ratio = ours / theirs if theirs else (1.0 if not ours else float("inf"))
    close = (distances < reference.quantile(QUANTILE)).double().mean().item()
    return Memorisation(distances, nearest, reference, copies, ratio, close)
