"""Kernel distance of two sets of features, without bias at any number of them (Binkowski et al. 2018, equation 4)."""

from typing import NamedTuple

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.metrics.rows import BLOCK, Array, pair


class Kid(NamedTuple):
    """Mean and standard deviation over subsets; the mean's own error is smaller, if the subsets overlap little."""

    mean: float
    std: float


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 of every pair of x (N, D) and y (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(real: Array, fake: Array) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D): the unbiased estimate from all, in float64.

    Mean of the kernel over pairs of two different reals, plus that of the fakes, less twice that between the sets. Its
    mean is 0 where the distributions are the same, so it may be below; for two copies of one set it is never above.
    Raises UserError for fewer than two samples of either, or sets of different D.
    """
    x, y = pair(real, fake, ("real features", "fake features"), least=2)
    n, m = len(x), len(y)
    value = _sum(x, x, True) / (n * (n - 1)) + _sum(y, y, True) / (m * (m - 1)) - 2 * _sum(x, y, False) / (n * m)
    return value.item()


def kid_of_subsets(real: Array, fake: Array, subsets: int = 100, size: int = 1000, seed: int = 0) -> Kid:
    """`kid` of random subsets of `size` of each, none twice in a subset: the customary form, unbiased like the whole.

    The draws depend on `seed` and the two numbers of samples alone. Raises UserError for a size below 2 or above these.
    """
    x, y = pair(real, fake, ("real features", "fake features"), least=2)
    if at_least(size, 2, "size") > min(len(x), len(y)):
        raise UserError(f"size={size} is more than the {len(x)} real and {len(y)} fake features: give a smaller size")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(at_least(subsets, 1, "subsets")):
        one, other = (torch.randperm(len(s), generator=generator)[:size].to(s.device) for s in (x, y))
        values.append(kid(x[one], y[other]))
    found = torch.tensor(values, dtype=torch.float64)
    return Kid(found.mean().item(), found.std(correction=0).item())


def _sum(x: Tensor, y: Tensor, without_diagonal: bool) -> Tensor:
    """Of the kernel over all pairs, or over those of two different rows of one set, a block at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for i, left in enumerate(x.split(BLOCK)):
        for j, right in enumerate(y.split(BLOCK)):
            k = kernel(left.double(), right.double())
            total += k.sum() - k.trace() if without_diagonal and i == j else k.sum()
    return total
