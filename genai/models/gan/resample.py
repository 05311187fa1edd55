"""Resampling by 2 with the filter [1, 3, 3, 1] in both directions, zeros outside the image: what StyleGAN2 puts around every
change of resolution (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from genai.core.precision import no_autocast


class UpFirDn(Function):
    """A symmetric kernel (1, 1, k, k) over each channel of x, or, `spread`, the transpose of that: each is the other's
    gradient. Left to autograd, the gradient's gradient would also ask for the kernel's, channel by channel."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, stride: int, padding: int, spread: bool) -> Tensor:
        convolve = F.conv_transpose2d if spread else F.conv2d
        each = kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        with no_autocast(x.device):
            return convolve(x, each, None, stride, padding, groups=x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, kernel, ctx.stride, ctx.padding, ctx.spread = inputs
        ctx.save_for_backward(kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        (kernel,) = ctx.saved_tensors
        return UpFirDn.apply(gradient, kernel, ctx.stride, ctx.padding, not ctx.spread), None, None, None, None


class FIR(nn.Module):
    """The filter on each channel: (B, C, H, W) -> (B, C, H', W').

    Args:
        padding: zeros at each edge, H' = (H + 2 padding - 4) / stride + 1.
        stride: 2 takes every second place of the answer; H and W must be even then.
        spread: the other way round, a zero after each row and column first where stride is 2.
        gain: factor of a constant image where nothing is left out or put in.
    """

    kernel: Tensor

    def __init__(self, padding: int, stride: int = 1, spread: bool = False, gain: float = 1.0):
        super().__init__()
        self.padding, self.stride, self.spread = padding, stride, spread
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", gain * torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return UpFirDn.apply(x, self.kernel, self.stride, self.padding, self.spread)  # type: ignore[return-value]


def downsample() -> FIR:
    """(B, C, 2H, 2W) -> (B, C, H, W)."""
    return FIR(padding=1, stride=2)


def upsample() -> FIR:
    """(B, C, H, W) -> (B, C, 2H, 2W), constant images kept."""
    return FIR(padding=1, stride=2, spread=True, gain=4.0)
