"""Kernel distance (KID) of two sets of features, unbiased for any number of them (Bińkowski et al. 2018, equation 4)."""

import torch
from torch import Tensor

from genai.metrics.rows import BLOCK, Array, pair


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """Compute (x.y / D + 1)^3 for all pairs of x (N, D) and y (M, D), (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(real: Array, fake: Array) -> float:
    """Compute the squared maximum mean discrepancy of features (N, D) and (M, D): the unbiased estimate, in float64.

    It is the mean of the kernel over pairs of different reals, plus that of the fakes, minus twice that between the sets. Its
    expectation is 0 for equal distributions, so a single value can be negative.

    Raises UserError for fewer than two samples in a set, or sets of different D.
    """
    x, y = pair(real, fake, ("real features", "fake features"), least=2)
    n, m = len(x), len(y)
    value = _sum(x, x, True) / (n * (n - 1)) + _sum(y, y, True) / (m * (m - 1)) - 2 * _sum(x, y, False) / (n * m)
    return value.item()


def _sum(x: Tensor, y: Tensor, without_diagonal: bool) -> Tensor:
    """Sum the kernel over all pairs, without the diagonal where both sets are the same, a block at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for i, left in enumerate(x.split(BLOCK)):
        for j, right in enumerate(y.split(BLOCK)):
            k = kernel(left.double(), right.double())
            total += k.sum() - k.trace() if without_diagonal and i == j else k.sum()
    return total
