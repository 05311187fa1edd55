"""Deep convolutional GANs (Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", 2016, section 3), for images whose sides are multiples of 2^len(multipliers)."""

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from genai.core.precision import downcast
from genai.models.gan.nets import BatchNorm, LabelledLatents, halve_shape, projection


class Generator(nn.Module):
    """z (B, latents) and the label's embedding -> images (B, *shape) in [-1, 1]: a linear map to the smallest maps, then
    one transposed convolution for each doubling; batch norm and ReLU between them.

    Args:
        shape: (C, H, W).
        latents: numbers in z.
        classes: number of labels, None for none.
        channels: width of the largest maps.
        multipliers: of `channels`, from the largest maps to the smallest, one for each halving.
        label_width: numbers in a label's embedding.

    Raises UserError if the sizes do not come out even.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latents: int,
        classes: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        label_width: int = 32,
    ):
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        self.start = (widths[0], *halve_shape(shape, len(widths)))
        self.inputs = LabelledLatents(latents, classes, label_width)
        self.flat = nn.Linear(self.inputs.outputs, math.prod(self.start), bias=False)
        net: list[nn.Module] = [BatchNorm(widths[0]), nn.ReLU()]
        for a, b in itertools.pairwise(widths):
            net += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), BatchNorm(b), nn.ReLU()]
        self.net = nn.Sequential(*net, nn.ConvTranspose2d(widths[-1], shape[0], 4, 2, 1), nn.Tanh())
        self.apply(initialise)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.net(self.flat(downcast(self.inputs(z, label), self.flat)).view(-1, *self.start))


class Discriminator(nn.Module):
    """Images (B, *shape) -> logits (B,): a strided convolution for each halving, leaky ReLUs, `Projection`.

    Args:
        shape: (C, H, W).
        classes: number of labels, None for none.
        channels: width of the largest maps.
        multipliers: of `channels`, one for each halving.
        norm: `norm(channels)` of all but the first convolution: batch norm is the paper's; `layer_norm`, `instance_norm` or
            None keep samples apart, which penalties on gradients need.

    Raises UserError if the sizes do not come out even.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        norm: Callable[[int], nn.Module] | None = BatchNorm,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        features = widths[-1] * math.prod(halve_shape(shape, len(widths)))
        net: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b in itertools.pairwise(widths):
            net += [
                nn.Conv2d(a, b, 4, 2, 1, bias=norm is None),
                *([] if norm is None else [norm(b)]),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*net, nn.Flatten())
        self.head = projection(features, classes)
        self.apply(initialise)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(self.net(downcast(x, self)), label)


def batch_norm(channels: int) -> nn.Module:
    """Over batch, height and width: under a name that a config may give."""
    return BatchNorm(channels)


def layer_norm(channels: int) -> nn.Module:
    """Over channels, height and width of each sample."""
    return nn.GroupNorm(1, channels)


def instance_norm(channels: int) -> nn.Module:
    """Over height and width of each map."""
    return nn.GroupNorm(channels, channels)


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for weights of layers, N(1, 0.02) for the gain of batch norm, 0 for biases."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
