"""Deep convolutional GANs (Radford et al., "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", 2016, section 3), for images whose sides are multiples of 2^len(multipliers)."""

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from genai.core.precision import downcast
from genai.models.gan.nets import LabelledLatents, halve_shape, projection
from genai.nn.norm import BatchNorm


class Generator(nn.Module):
    """The generator: z (B, latents) and the label's embedding -> images (B, *shape) in [-1, 1].

    A linear map to the smallest maps is followed by one transposed convolution per doubling, with batch norm and ReLU
    between them.

    Args:
        shape: (C, H, W).
        latents: number of latents.
        classes: number of labels, None for none.
        channels: width of the largest maps.
        multipliers: multiples of `channels`, from the largest maps to the smallest, one per halving.
        label_width: width of a label's embedding.

    Raises UserError if the sizes do not divide.
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
        """Return images (B, *shape) in [-1, 1] of z (B, latents) and label int64 (B,)."""
        return self.net(self.flat(downcast(self.inputs(z, label), self.flat)).view(-1, *self.start))


class Discriminator(nn.Module):
    """The discriminator: images (B, *shape) -> logits (B,) by one strided convolution per halving, leaky ReLUs,
    `Projection`.

    Args:
        shape: (C, H, W).
        classes: number of labels, None for none.
        channels: width of the largest maps.
        multipliers: multiples of `channels`, one per halving.
        norm: `norm(channels)` after all but the first convolution: the paper has batch norm; `layer_norm`,
            `instance_norm` or None do not mix samples, as penalties on gradients need.

    Raises UserError if the sizes do not divide.
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
        """Return logits (B,) of images (B, *shape) with label int64 (B,)."""
        return self.head(self.net(downcast(x, self)), label)


def batch_norm(channels: int) -> nn.Module:
    """Return a norm over batch, height and width; a function, so that a config can name it."""
    return BatchNorm(channels)


def layer_norm(channels: int) -> nn.Module:
    """Return a norm over channels, height and width of each sample."""
    return nn.GroupNorm(1, channels)


def instance_norm(channels: int) -> nn.Module:
    """Return a norm over height and width of each map."""
    return nn.GroupNorm(channels, channels)


def initialise(module: nn.Module) -> None:
    """Draw weights of layers from N(0, 0.02) and gains of batch norm from N(1, 0.02); set biases to 0."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
