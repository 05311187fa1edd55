"""Baselines with a likelihood of discrete images: uniform, a mixture of independent pixels, a Markov chain over pixels."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import at_least, number
from genai.core.protocols import Batch
from genai.evaluation.baselines.base import Baseline, TrainingData
from genai.nn.grey_levels import from_levels, to_levels


def inverse(cumulative: Tensor, u: Tensor) -> Tensor:
    """Sample by inversion: cumulative probabilities (..., L) and u (...), uniform in [0, 1] -> int64 (...)."""
    return (cumulative <= u[..., None] * cumulative[..., -1:]).sum(-1).clamp_max(cumulative.shape[-1] - 1)


class Uniform(Baseline):
    """The uniform distribution over all grey levels of all pixels."""

    needs = ("levels",)
    what = "uniform grey levels"

    def fit(self, data: TrainingData, seed: int) -> "Uniform":
        self.shape, self.levels = data.shape, data.levels or 0
        return self

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        nats = math.prod(self.shape) * math.log(self.levels)
        return torch.full((len(batch["image"]),), -nats, dtype=torch.float64)

    def sample(self, n: int, seed: int, label: Tensor | None = None) -> Tensor:
        u = rng.uniform(rng.seed_range(seed, n), (math.prod(self.shape),))
        return from_levels((u * self.levels).long().clamp_max(self.levels - 1), self.shape, self.levels)


class Mixture(Baseline):
    """A mixture of products of categoricals, one for each pixel, fitted by EM (Dempster et al. 1977).

    With one component it is the histogram of each pixel.

    Args:
        components: number of components.
        smoothing: count added to every grey level of every pixel of each component (a Dirichlet prior).
        iterations: of EM.
    """

    needs = ("levels",)

    def __init__(self, components: int = 10, smoothing: float = 0.5, iterations: int = 100):
        self.components = at_least(components, 1, "baseline.components")
        self.smoothing = number(smoothing, "baseline.smoothing", 0, open_low=True)
        self.iterations = at_least(iterations, 1, "baseline.iterations")
        self.random_fit = components > 1
        many = f"mixture of {components} multinomials, smoothing {smoothing:g}"
        self.what = many if components > 1 else "independent pixels"
        self.objective: list[float] = []

    def fit(self, data: TrainingData, seed: int) -> "Mixture":
        """Fit by EM. `objective` collects ln p of data and prior up to a constant, once an iteration: it never decreases."""
        self.shape, self.levels = data.shape, data.levels or 0
        hot = self.one_hot(to_levels(data.x, self.levels).numpy())
        share = np.random.default_rng(seed).dirichlet(np.ones(self.components), hot.shape[0])  # (N, K)
        self.objective = []
        for _ in range(self.iterations if self.components > 1 else 1):
            self.maximise(hot, share)
            joint = self.joint(hot)  # (N, K)
            each = np.logaddexp.reduce(joint, 1)
            self.objective.append(each.sum() + self.smoothing * self.log_p.sum())
            share = np.exp(joint - each[:, None])
        return self

    def one_hot(self, level: np.ndarray) -> Any:
        """Encode grey levels (N, D) as a sparse matrix (N, D L) with one 1 for each pixel."""
        from scipy import sparse  # scikit-learn brings it

        n, d = level.shape
        columns = (level + np.arange(d) * self.levels).ravel()
        return sparse.csr_matrix((np.ones(n * d), columns, np.arange(n + 1) * d), shape=(n, d * self.levels))

    def maximise(self, hot: Any, share: np.ndarray) -> None:
        """M step: weights and level probabilities from the responsibilities `share` (N, K)."""
        counts = (hot.T @ share).T.reshape(self.components, -1, self.levels) + self.smoothing
        self.log_p = np.log(counts / counts.sum(-1, keepdims=True))  # (K, D, L)
        with np.errstate(divide="ignore"):
            self.log_weight = np.log(share.mean(0))  # -inf for a component without images

    def joint(self, hot: object) -> np.ndarray:
        """Return ln(weight * probability) of each component for each image, (N, K)."""
        return hot @ self.log_p.reshape(self.components, -1).T + self.log_weight

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        joint = self.joint(self.one_hot(to_levels(batch["image"], self.levels).numpy()))
        return torch.from_numpy(np.logaddexp.reduce(joint, 1))

    def sample(self, n: int, seed: int, label: Tensor | None = None) -> Tensor:
        u = rng.uniform(rng.seed_range(seed, n), (1 + math.prod(self.shape),))
        chosen = inverse(torch.from_numpy(np.exp(self.log_weight)).cumsum(0), u[:, 0])
        cumulative = torch.from_numpy(np.exp(self.log_p)).cumsum(-1)
        levels = torch.stack([inverse(cumulative[k], row) for k, row in zip(chosen.tolist(), u[:, 1:], strict=True)])
        return from_levels(levels, self.shape, self.levels)


class Markov(Baseline):
    """A Markov chain over the pixels, row by row, with transition probabilities for each position.

    They are interpolated with the histogram of the position by Witten-Bell smoothing (Witten and Bell 1991, method C).
    """

    needs = ("levels",)
    what = "Markov chain over pixels"

    def __init__(self, smoothing: float = 0.5):
        self.smoothing = number(smoothing, "baseline.smoothing", 0, open_low=True)

    def fit(self, data: TrainingData, seed: int) -> "Markov":
        self.shape, self.levels = data.shape, data.levels or 0
        level = to_levels(data.x, self.levels)  # (N, D)
        d, count = level.shape[1], self.levels
        place = torch.arange(d) * count
        alone = torch.bincount((level + place).flatten(), minlength=d * count).view(d, count).double() + self.smoothing
        alone = alone / alone.sum(-1, keepdim=True)
        pairs = (level[:, :-1] + place[1:]) * count + level[:, 1:]  # for positions 1, ..., d - 1
        both = torch.bincount(pairs.flatten(), minlength=d * count**2).view(d, count, count).double()
        kinds, total = (both > 0).sum(-1, keepdim=True), both.sum(-1, keepdim=True)
        mixed = (both + kinds * alone[:, None]) / (kinds + total).clamp_min(1)
        # (D, level before, level); the first has no level before
        self.p = torch.where(total > 0, mixed, alone[:, None])
        return self

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        level = to_levels(batch["image"], self.levels)
        before = torch.nn.functional.pad(level[:, :-1], (1, 0))
        return self.p[torch.arange(level.shape[1]), before, level].log().sum(1)

    def sample(self, n: int, seed: int, label: Tensor | None = None) -> Tensor:
        u = rng.uniform(rng.seed_range(seed, n), (len(self.p),))
        level = torch.zeros(n, len(self.p), dtype=torch.int64)
        for j, p in enumerate(self.p):
            level[:, j] = inverse(p[level[:, j - 1] if j else level[:, 0]].cumsum(-1), u[:, j])
        return from_levels(level, self.shape, self.levels)
