"""The small judge that figures of digits are taken by: a multilayer perceptron of scikit-learn, whose last hidden layer serves
as features. Cards of checkpoints have another, `genai.evaluation.judge`. Figures by one and by the other do not compare,
so the names of those by this one end in `_mlp`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.data.base import Data
from genai.metrics.frechet import Moments, frechet

HIDDEN = 64, 32


class Judge:
    """A classifier of images (N, C, H, W) in [-1, 1] on so many grey levels, and the moments of their features."""

    def __init__(self, images: Tensor, label: Tensor, levels: int | None, seed: int = 0):
        from sklearn.neural_network import MLPClassifier

        self.half = ((levels or 256) - 1) / 2
        x = self.pixels(images)
        self.net: Any = MLPClassifier(HIDDEN, random_state=seed, max_iter=400).fit(x, label.numpy())
        self.real = Moments().add(self._hidden(x))

    @classmethod
    def of(cls, data: Data, splits: tuple[str, ...] = ("train", "val")) -> "Judge":
        """Trained on all images of some splits. Raises UserError for data without labels."""
        from genai.evaluation.baselines.base import known

        if len(data.shape) != 3 or data.classes is None:
            raise UserError(f"a judge needs labelled images, and this data is {data.field} of shape {data.shape}")
        found = known(data, splits)
        assert found.label is not None
        return cls(found.x, found.label, data.levels)

    def pixels(self, images: Tensor) -> np.ndarray:
        """(N, C, H, W) in [-1, 1] -> (N, D) in [0, 1], on the data's grey levels."""
        levels = ((images.flatten(1).double() + 1) * self.half).round().clamp(0, 2 * self.half)
        return levels.numpy() / (2 * self.half)

    def features(self, images: Tensor) -> Tensor:
        """float64 (N, 32)."""
        return self._hidden(self.pixels(images))

    def accuracy(self, images: Tensor, label: Tensor) -> float:
        return float(self.net.score(self.pixels(images), label.numpy()))

    def distance(self, images: Tensor) -> float:
        """Fréchet distance of images to those it was trained on."""
        return frechet(Moments().add(self.features(images)), self.real)

    def _hidden(self, x: np.ndarray) -> Tensor:
        for weight, bias in list(zip(self.net.coefs_, self.net.intercepts_, strict=True))[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        return torch.from_numpy(x)
