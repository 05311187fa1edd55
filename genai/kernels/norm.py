"""Group normalisation with what a U-Net does after it: scale and shift by an embedding, and SiLU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.kernels.affine_step import triton_obstacle


def normalize(norm: nn.GroupNorm, x: Tensor, scale_shift: Tensor | None = None, silu: bool = False) -> Tensor:
    """Return v, or v sigmoid(v) with silu, of v = norm(x) (1 + scale) + shift, fused where Triton runs; x (B, C,
    ...)."""
    if _can_fuse(norm, x):
        from genai.kernels.triton_norm import FusedNorm

        return FusedNorm.apply(x, norm.weight, norm.bias, scale_shift, norm.num_groups, norm.eps, silu)
    return reference(norm, x, scale_shift, silu)


def reference(norm: nn.GroupNorm, x: Tensor, scale_shift: Tensor | None = None, silu: bool = False) -> Tensor:
    """The formula in torch's operations."""
    h = norm(x)
    if scale_shift is not None:
        scale, shift = scale_shift[(...,) + (None,) * (x.ndim - 2)].chunk(2, 1)
        h = torch.addcmul(shift, h, 1 + scale)
    return F.silu(h) if silu else h


def _can_fuse(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Tell whether the fused kernels can take x: a non-empty tensor on a GPU, with fewer than 2^31 elements per sample."""
    if not x.is_cuda or torch.compiler.is_compiling() or type(x) is not Tensor or not x.numel() or not norm.affine:
        return False
    # Triton computes offsets within a sample in 32 bits.
    return triton_obstacle(x) is None and x[0].numel() < 2**31
