"""Baselines that treat images as vectors: Gaussian mixtures and training copies to sample; PCA and neighbours to reconstruct."""

import math
from typing import Any

import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch
from genai.evaluation.baselines.base import Baseline, TrainingData
from genai.evaluation.baselines.pixels import inverse


class GMM(Baseline):
    """A mixture of Gaussians with full covariances in pixel space, fitted by scikit-learn.

    Args:
        components: number of components, for each class with `by_class`.
        by_class: fit a mixture for each class, with at most as many components as it has images. A class with fewer than two
            images has no mixture of its own; its samples come from all.
        regularisation: added to the variances of pixels in [-1, 1].
    """

    def __init__(self, components: int = 10, by_class: bool = False, regularisation: float = 4e-3):
        self.components = at_least(components, 1, "baseline.components")
        self.regularisation = number(regularisation, "baseline.regularisation", 0)
        self.by_class, self.needs, self.random_fit = by_class, ("classes",) if by_class else (), components > 1
        self.what = f"Gaussian mixture of {components}" if components > 1 else "one Gaussian"
        self.what += " for each class" if by_class else ""

    def fit(self, data: TrainingData, seed: int) -> "GMM":
        """Fit weight (K,), mean (K, D), Cholesky factor of the covariance (K, D, D) and class (K,) of each component."""
        self.shape, parts = data.shape, []
        for y in range(data.classes or 0) if self.by_class else (-1,):
            mine = data.x if data.label is None or y < 0 else data.x[data.label == y]
            components = min(self.components, len(mine)) if self.by_class else self.components
            if len(mine) >= max(2, components):
                weight, mean, root = self.mixture(mine.flatten(1).double(), components, seed)
                parts.append((weight * (len(mine) / len(data.x)), mean, root, torch.full((components,), y)))
        if not parts:
            raise UserError(
                f"baseline.components={self.components}, but there are only {len(data.x)} images to fit: give fewer"
            )
        self.weight, self.mean, self.root, self.label = (torch.cat(part) for part in zip(*parts, strict=True))
        return self

    def mixture(self, x: Tensor, components: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        from sklearn.mixture import GaussianMixture

        fitted: Any = GaussianMixture(components, reg_covar=self.regularisation, random_state=seed).fit(x.numpy())
        roots = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_))
        return torch.from_numpy(fitted.weights_), torch.from_numpy(fitted.means_), roots

    def sample(self, n: int, seed: int, label: Tensor | None = None) -> Tensor:
        seeds = rng.seed_range(seed, n)
        weight = self.weight.expand(n, -1)
        if label is not None and self.by_class:
            mine = self.label == label[:, None]
            weight = weight * mine.where(mine.any(1, keepdim=True), True)
        chosen = inverse(weight.cumsum(-1), rng.uniform(seeds, (1,))[:, 0].double())
        x = rng.normal(seeds, (math.prod(self.shape),), stream=rng.INITIAL).double()
        for k in range(len(self.mean)):
            mine = chosen == k
            x[mine] = self.mean[k] + x[mine] @ self.root[k].T
        return x.float().clamp(-1, 1).view(n, *self.shape)


class TrainingCopy(Baseline):
    """Training images drawn at random, of the class asked for: near-perfect distances to real data without any new image."""

    what = "copies of training images"

    def fit(self, data: TrainingData, seed: int) -> "TrainingCopy":
        self.x, self.label = data.x, data.label
        return self

    def sample(self, n: int, seed: int, label: Tensor | None = None) -> Tensor:
        u = rng.uniform(rng.seed_range(seed, n), (1,))[:, 0].double()
        if label is None or self.label is None:
            return self.x[(u * len(self.x)).long().clamp_max(len(self.x) - 1)]
        all_of = {y: (self.label == y).nonzero()[:, 0] for y in set(label.tolist())}
        found = [all_of[y] if len(all_of[y]) else torch.arange(len(self.x)) for y in label.tolist()]
        return self.x[torch.stack([of[min(int(v * len(of)), len(of) - 1)] for v, of in zip(u, found, strict=True)])]


class PCA(Baseline):
    """Principal component analysis by scikit-learn; reconstructions are clipped to [-1, 1].

    Args:
        components: dimension of the code; with 0 the reconstruction is the mean image.
    """

    def __init__(self, components: int = 8):
        self.components = at_least(components, 0, "baseline.components")
        self.what = f"PCA with {components} components" if components else "mean image"

    def fit(self, data: TrainingData, seed: int) -> "PCA":
        from sklearn.decomposition import PCA as Fitted

        x, most = data.x.flatten(1), min(len(data.x), math.prod(data.shape))
        if self.components > most:
            raise UserError(f"baseline.components={self.components}, but these images have at most {most}: give fewer")
        self.mean = x.mean(0)
        self.basis = torch.zeros(0, x.shape[1])  # (K, D), orthonormal
        if self.components:
            fitted: Any = Fitted(self.components, svd_solver="full").fit(x.numpy())
            self.basis = torch.from_numpy(fitted.components_).float()
        return self

    def reconstruct(self, batch: Batch) -> Tensor:
        x = batch["image"].flatten(1) - self.mean
        return (self.mean + x @ self.basis.T @ self.basis).clamp(-1, 1).view_as(batch["image"])


class KNN(Baseline):
    """The mean of the k nearest training images, by scikit-learn.

    Args:
        k: number of neighbours.
    """

    def __init__(self, k: int = 1):
        self.k = at_least(k, 1, "baseline.k")
        self.what = f"mean of {k} nearest training images" if k > 1 else "nearest training image"

    def fit(self, data: TrainingData, seed: int) -> "KNN":
        from sklearn.neighbors import NearestNeighbors

        if self.k > len(data.x):
            raise UserError(f"baseline.k={self.k}, but there are only {len(data.x)} images to fit: give fewer")
        self.x = data.x
        self.nearest: Any = NearestNeighbors(n_neighbors=self.k).fit(data.x.flatten(1).numpy())
        return self

    def reconstruct(self, batch: Batch) -> Tensor:
        index = self.nearest.kneighbors(batch["image"].flatten(1).numpy(), return_distance=False)
        return self.x[torch.from_numpy(index)].mean(1)
