"""Checks of sets of vectors, and distances between two sets without the matrix of all pairs."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError

Array = Tensor | np.ndarray
BLOCK = 1024  # vectors of the second set converted to float64 at a time
ELEMENTS = 2_000_000  # distances in memory at a time, 8 bytes each


def rows(x: Array, name: str = "features") -> Tensor:
    """Return x (N, ...) as a tensor (N, D) of the same type.

    Raises UserError if x is not a set of vectors, is empty, or has a number that is not finite.
    """
    x = torch.as_tensor(x)
    if x.ndim < 2 or not x.numel() or x.is_complex():
        raise UserError(f"{name} of shape {tuple(x.shape)} must be real numbers, one item a row: (N, D) with N, D > 0")
    if not x.isfinite().all():
        raise UserError(f"{name} have values that are not finite: check the samples they were computed from")
    return x.flatten(1)


def pair(a: Array, b: Array, names: tuple[str, str], least: int = 1) -> tuple[Tensor, Tensor]:
    """Return two sets as (N, D) and (M, D). Raises UserError for different D or fewer than `least` items in a set."""
    x, y = rows(a, names[0]), rows(b, names[1])
    if x.shape[1] != y.shape[1]:
        raise UserError(f"{names[0]} have {x.shape[1]} numbers each and {names[1]} {y.shape[1]}: they must be the same")
    if min(len(x), len(y)) < least:
        raise UserError(f"{len(x)} {names[0]} and {len(y)} {names[1]}: at least {least} of each are needed")
    return x, y


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, squared distances (n, M) in float64) of blocks of n rows of x (N, D) to y (M, D).

    |x|^2 + |y|^2 - 2 x.y is inexact where it is small compared to |x|^2: values below 1e-13 of the sum are set to 0, which are
    vectors that float32 can hardly distinguish. For multiples of a power of two, such as grey levels of digits, all distances
    are exact.
    """
    y_norms = torch.cat([part.double().square().sum(1) for part in y.split(BLOCK)])
    step = max(1, min(BLOCK, ELEMENTS // len(y)))
    for start in range(0, len(x), step):
        part = x[start : start + step].double()
        sums = part.square().sum(1, keepdim=True) + y_norms
        products = torch.cat([part @ columns.double().T for columns in y.split(BLOCK)], 1)
        squared = products.mul_(-2).add_(sums)
        yield start, squared.masked_fill_(squared <= sums.mul_(1e-13), 0.0)
