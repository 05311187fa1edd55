"""Precision, recall, density and coverage: fidelity and diversity of samples, from k-nearest-neighbour balls of features.

The ball of an item reaches to its k-th neighbour in the same set and includes its surface, so that copies count as inside even
where the data contain an item more than k times.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.metrics.rows import Array, pair, squared_distances

NAMES = ("real features", "fake features")


class PrecisionRecall(NamedTuple):
    """Share of fakes inside the real manifold, and of reals inside the fake one."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Average number of real balls around a fake, over k, and share of real balls with a fake inside."""

    density: float
    coverage: float


def squared_radii(x: Tensor, k: int) -> Tensor:
    """Return the squared distance (N,) of each of x (N, D) to its k-th nearest neighbour, in float64."""
    found = []
    for start, squared in squared_distances(x, x):
        row = torch.arange(len(squared), device=x.device)
        squared[row, start + row] = torch.inf  # not its own neighbour
        found.append(squared.topk(k, largest=False).values[:, -1])
    return torch.cat(found)


def precision_recall(real: Array, fake: Array, k: int = 3) -> PrecisionRecall:
    """Compute precision and recall of features (N, D) (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Both sets must have equal N, as the size of the balls depends on it.

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
    """Compute density and coverage of features (N, D) and (M, D) (Naeem et al. 2020, section 3).

    Only the real items have balls, so that outliers among the fakes cover nothing. For equal distributions density is 1 in
    expectation (it is not bounded by 1), and coverage near 1 - 2^-k for large N and M, 0.97 at k = 5.

    Raises UserError for sets of different D or not more than k items.
    """
    x, y = pair(real, fake, NAMES, least=at_least(k, 1, "k") + 1)
    radii, inside, covered = squared_radii(x, k), 0, 0
    for start, squared in squared_distances(x, y):
        hold = squared <= radii[start : start + len(squared), None]
        inside, covered = inside + int(hold.sum()), covered + int(hold.any(1).sum())
    return DensityCoverage(inside / (k * len(y)), covered / len(x))
