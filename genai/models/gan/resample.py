"""Resampling by 2 with the filter [1, 3, 3, 1] in both directions and zeros outside the image, as StyleGAN2 does at
every change of resolution (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from genai.core.precision import no_autocast


class UpFirDn(Function):
    """A symmetric kernel (1, 1, k, k) applied to each channel of x (B, C, H, W), or, if `spread`, its transpose.

    Each is the gradient of the other. Autograd's own second derivative would also compute that of the kernel, channel
    by channel.
    """

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
    """The filter applied to each channel: (B, C, H, W) -> (B, C, H', W').

    Args:
        padding: zeros at each edge, H' = (H + 2 padding - 4) / stride + 1.
        stride: 2 keeps every second pixel of the output; H and W must then be even.
        spread: the transpose: with stride 2 a zero follows each row and column first.
        gain: factor of a constant image at stride 1.
    """

    kernel: Tensor

    def __init__(self, padding: int, stride: int = 1, spread: bool = False, gain: float = 1.0):
        super().__init__()
        self.padding, self.stride, self.spread = padding, stride, spread
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", gain * torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Filter x (B, C, H, W)."""
        return UpFirDn.apply(x, self.kernel, self.stride, self.padding, self.spread)  # type: ignore[return-value]


def downsample() -> FIR:
    """Return the filter (B, C, 2H, 2W) -> (B, C, H, W)."""
    return FIR(padding=1, stride=2)


def upsample() -> FIR:
    """Return the filter (B, C, H, W) -> (B, C, 2H, 2W), which preserves constant images."""
    return FIR(padding=1, stride=2, spread=True, gain=4.0)
