"""Layers whose weight, as a matrix, is divided by its largest singular value (Miyato et al., "Spectral Normalization
for Generative Adversarial Networks", 2018, section 2.1).

The left singular vector is a buffer `u`. In training every call moves it by one step of power iteration (algorithm 1);
in evaluation the same step is computed and discarded.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.precision import KeepBufferPrecision, no_autocast, upcast


def spectral_normalize(weight: Tensor, u: Tensor, keep: bool) -> Tensor:
    """Return weight (rows, ...) / sigma; u (rows,) is updated in place if `keep`.

    Gradients treat u and v as constants (eq. 12). They use a copy of u, so that it may be updated again before the
    backward pass.
    """
    with no_autocast(weight.device):
        matrix = upcast(weight).flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.T @ u, dim=0)
            left = F.normalize(matrix @ v, dim=0)
            if keep:
                u.copy_(left)
        # A zero weight has norm 0: the bound keeps it zero instead of nan.
        return (weight / (left @ (matrix @ v)).clamp_min(1e-12)).to(weight.dtype)


def random_direction(weight: Tensor) -> Tensor:
    """Return a random unit vector for u, (rows,)."""
    return F.normalize(torch.randn(len(weight), dtype=weight.dtype), dim=0)


class SpectralLinear(KeepBufferPrecision, nn.Linear):
    """A linear layer x (..., inputs) -> (..., outputs) with a normalised weight."""

    u: Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.register_buffer("u", random_direction(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., inputs) to (..., outputs)."""
        return F.linear(x, spectral_normalize(self.weight, self.u, self.training), self.bias)


class SpectralConv2d(KeepBufferPrecision, nn.Conv2d):
    """A convolution (B, inputs, H, W) -> (B, outputs, H, W) with an odd kernel; the matrix is (outputs, inputs
    kernel^2)."""

    u: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.register_buffer("u", random_direction(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, inputs, H, W) to (B, outputs, H, W)."""
        return self._conv_forward(x, spectral_normalize(self.weight, self.u, self.training), self.bias)


class SpectralEmbedding(KeepBufferPrecision, nn.Embedding):
    """An embedding of labels int64 (B,) -> (B, width), normalised as a whole table."""

    u: Tensor

    def __init__(self, count: int, width: int):
        super().__init__(count, width)
        self.register_buffer("u", random_direction(self.weight))

    def forward(self, label: Tensor) -> Tensor:
        """Embed labels int64 (B,) -> (B, width)."""
        return F.embedding(label, spectral_normalize(self.weight, self.u, self.training))
