"""Fréchet distance of two sets of features, from mean and covariance of each (Heusel et al. 2017, equation 6).

The caller must make figures comparable: the same features, the same number of samples (the distance has a bias that falls with
n), and samples on the grey levels and at the size of the data.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.metrics.rows import Array, rows


def _empty() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class Moments:
    """Mean (D,) and covariance (D, D) in float64 of vectors that come in batches, in constant memory.

    Batches are merged by their means and centred sums of squares (Chan et al. 1979), which avoids the cancellation of sums of
    raw squares. Two objects are merged the same way.
    """

    n: int = 0
    mean: Tensor = field(default_factory=_empty)
    scatter: Tensor = field(default_factory=_empty)  # (D, D), sum of outer products of deviations from the mean

    def add(self, features: Array) -> "Moments":
        """Add features (B, D); returns itself. Raises UserError for another D, or numbers that are not finite."""
        x = rows(features).double()
        mean = x.mean(0)
        return self.merge(Moments(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other: "Moments") -> "Moments":
        """Add the vectors of `other`, which is unchanged; returns itself. Raises UserError for another D."""
        if not other.n:
            return self
        if not self.n:
            self.n, self.mean, self.scatter = other.n, other.mean, other.scatter
            return self
        _same_size(self, other)
        total, shift = self.n + other.n, other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.n * other.n / total)
        self.mean = self.mean + shift * (other.n / total)
        self.n = total
        return self

    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D); it is singular for n <= D. Raises UserError for fewer than two vectors."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 samples, and {self.n} were added")
        return self.scatter / (self.n - 1)


def frechet(a: Moments, b: Moments) -> float:
    """Compute |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared 2-Wasserstein distance of Gaussians (Dowson & Landau 1982).

    The eigenvalues of A B are the squared singular values of A^(1/2) B^(1/2), so their roots add up to its nuclear
    norm. That is real by construction, and avoids the roots of rounding errors that singular covariances cause.

    Raises UserError for fewer than two samples, sets of different D, or a result that is not finite.
    """
    A, B = a.covariance(), b.covariance()
    _same_size(a, b)
    if not (A.isfinite().all() and B.isfinite().all()):
        raise UserError("the covariance of the features is not finite: they are too large for float64")
    trace = torch.linalg.svdvals(_root(A) @ _root(B)).sum()  # of (A B)^(1/2)
    value = ((a.mean - b.mean) ** 2).sum() + A.trace() + B.trace() - 2 * trace
    if not math.isfinite(value):
        raise UserError(f"the Fréchet distance came out as {value.item()}: the features are too large for float64")
    return max(value.item(), 0.0)


def _same_size(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of dimension {len(a.mean)} and {len(b.mean)} cannot be compared")


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric root of a covariance (D, D); eigenvalues within rounding of 0 count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    least = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors * values.where(values > least, 0.0).sqrt() @ vectors.T
