"""Fidelity and diversity apart, by balls around features that reach to a near neighbour of the same set.

A ball holds its own edge, so that copies count also where the data hold an item more than k times.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.metrics.rows import Array, pair, squared_distances

NAMES = ("real features", "fake features")


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


def squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each of x (N, D) to its k-th nearest other one, in float64."""
    found = []
    for start, squared in squared_distances(x, x):
        row = torch.arange(len(squared), device=x.device)
        squared[row, start + row] = torch.inf  # not its own neighbour
        found.append(squared.topk(k, largest=False).values[:, -1])
    return torch.cat(found)


def precision_recall(real: Array, fake: Array, k: int = 3) -> PrecisionRecall:
    """Share of fakes in some real one's ball, and of reals in some fake one's (Kynkäänniemi et al. 2019, eq. 1 and 2).

    From features (N, D) of as many real as fake items: with unequal numbers the balls of the two sets differ in size.
    Raises UserError for unequal numbers, sets of different D, or not more than k items.
    """
    x, y = pair(real, fake, NAMES, least=at_least(k, 1, "k") + 1)
    if len(x) != len(y):
        raise UserError(f"{len(x)} real and {len(y)} fake features: precision and recall need as many of both")
    radii_x, radii_y = squared_radii(x, k), squared_radii(y, k)
    recalled, precise = 0, torch.zeros(len(y), dtype=torch.bool, device=y.device)
    for start, squared in squared_distances(x, y):
        recalled += int((squared <= radii_y).any(1).sum())
        precise |= (squared <= radii_x[start : start + len(squared), None]).any(0)
    return PrecisionRecall(precise.double().mean().item(), recalled / len(x))


def density_coverage(real: Array, fake: Array, k: int = 5) -> DensityCoverage:
    """Real balls that hold a fake one, over k, on average; share of them that hold any (Naeem et al. 2020, section 3).

    Only the reals have balls, so that an outlier among the fakes covers nothing. Density is 1 in expectation if the
    distributions are the same, and not bounded by it; coverage is then near 1 - 2^-k for many of both, 0.97 at
    k = 5. Raises UserError for sets of different D or not more than k items.
    """
    x, y = pair(real, fake, NAMES, least=at_least(k, 1, "k") + 1)
    radii, inside, covered = squared_radii(x, k), 0, 0
    for start, squared in squared_distances(x, y):
        hold = squared <= radii[start : start + len(squared), None]
        inside, covered = inside + int(hold.sum()), covered + int(hold.any(1).sum())
    return DensityCoverage(inside / (k * len(y)), covered / len(x))
