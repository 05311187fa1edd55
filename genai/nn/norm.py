"""Normalisation over the last dimension."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.precision import KeepPrecision


class BatchNorm(KeepPrecision, nn.BatchNorm2d):
    """Batch norm whose statistics and gains stay float32 in a half-precision network."""


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, with or without a bias (Ba et al., "Layer Normalization", 2016)."""

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """The normalisation x / sqrt(mean(x^2) + eps), with an optional gain (Zhang and Sennrich, 2019, eq. 4)."""

    def __init__(self, width: int, gain: bool = False, eps: float = 1e-6):
        super().__init__()
        self.shape, self.eps = (width,), eps
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width)."""
        return F.rms_norm(x, self.shape, self.weight, self.eps)
