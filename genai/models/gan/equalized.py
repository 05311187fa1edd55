"""Layers whose weights are drawn at variance 1 and scaled as they are used, so that one learning rate suits all ("equalised
learning rate", Karras et al., "Progressive Growing of GANs", 2018, section 4.1), and the activation that goes with them.

Activations are leaky ReLUs of slope 0.2 times sqrt(2), which keeps the variance. They are positively homogeneous, so that
factor, and the residual blocks' 1 / sqrt(2), are multiplied into weights and biases, which are smaller than maps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GAIN = math.sqrt(2)


def leaky(x: Tensor) -> Tensor:
    """Apply the activation without its gain; x is overwritten, since nothing else needs it."""
    return F.leaky_relu_(x, 0.2)


def unit(x: Tensor) -> Tensor:
    """Scale x (B, D) to mean square 1."""
    # 1e-8 as in the paper: a zero vector stays zero.
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class EqualizedLinear(nn.Module):
    """The linear map gain (W x / sqrt(inputs) + b) of x (B, inputs).

    Args:
        bias: initial bias.
        rate: learning rate of this layer relative to the others'.
        gain: factor of the output.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.weight_scale, self.bias_scale = gain * rate / math.sqrt(inputs), gain * rate

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, inputs) to (B, outputs)."""
        return torch.addmm(self.bias, x, self.weight.mT, beta=self.bias_scale, alpha=self.weight_scale)


class EqualizedConv(nn.Module):
    """A convolution of maps (B, C, H, W) with the same scaling of weights and biases."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        gain: float = 1.0,
        bias: bool = True,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.gain, self.stride, self.padding = gain / math.sqrt(inputs * kernel**2), gain, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, inputs, H, W) to (B, outputs, H', W')."""
        bias = None if self.bias is None else self.bias * self.gain
        return F.conv2d(x, self.weight * self.scale, bias, self.stride, self.padding)
