"""Encoders and decoders: MLPs for anything, convolutions for images of any size."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.precision import downcast


class MLPEncoder(nn.Module):
    """An MLP from x (B, *shape) to means and log variances (B, 2 latents)."""

    def __init__(self, shape: Sequence[int], latents: int, width: int = 256, layers: int = 2, dropout: float = 0.0):
        super().__init__()
        self.net = mlp(math.prod(shape), width, layers, 2 * latents, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Encode x (B, *shape) -> (B, 2 latents)."""
        return self.net(downcast(x, self).flatten(1))


class MLPDecoder(nn.Module):
    """An MLP from z (B, latents) to (B, outputs C, ...), `outputs` parameters per element of the data."""

    def __init__(
        self, shape: Sequence[int], latents: int, outputs: int, width: int = 256, layers: int = 2, dropout: float = 0.0
    ):
        super().__init__()
        self.shape = (outputs * shape[0], *shape[1:])
        self.net = mlp(latents, width, layers, math.prod(self.shape), dropout)

    def forward(self, z: Tensor) -> Tensor:
        """Decode z (B, latents) -> (B, outputs C, ...)."""
        return self.net(downcast(z, self)).view(-1, *self.shape)


def mlp(inputs: int, width: int, layers: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Return `layers` hidden layers, each with layer norm and SiLU, and a linear output."""
    net: list[nn.Module] = []
    for i in range(layers):
        net += [nn.Linear(inputs if i == 0 else width, width), nn.LayerNorm(width), nn.SiLU()]
        net += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*net, nn.Linear(width if layers else inputs, outputs))


class ConvEncoder(nn.Module):
    """A convolutional encoder of images (B, *shape) to (B, 2 latents): `MapEncoder`, then one linear map."""

    def __init__(self, shape: Sequence[int], latents: int, channels: int = 32, multipliers: Sequence[int] = (1, 2)):
        super().__init__()
        widths, sizes = pyramid(shape, channels, multipliers)
        flat = nn.Linear(widths[-1] * math.prod(sizes[-1]), 2 * latents)
        self.net = nn.Sequential(*down(shape[0], widths), norm_act(widths[-1]), nn.Flatten(), flat)

    def forward(self, x: Tensor) -> Tensor:
        """Encode x (B, *shape) -> (B, 2 latents)."""
        return self.net(downcast(x, self))


class ConvDecoder(nn.Module):
    """The mirror image of ConvEncoder, through the same sizes: z (B, latents) -> (B, outputs C, H, W)."""

    def __init__(
        self, shape: Sequence[int], latents: int, outputs: int, channels: int = 32, multipliers: Sequence[int] = (1, 2)
    ):
        super().__init__()
        widths, sizes = pyramid(shape, channels, multipliers)
        self.start = (widths[-1], *sizes[-1])
        self.flat = nn.Linear(latents, math.prod(self.start))
        self.net = nn.Sequential(*up(outputs * shape[0], widths, sizes))

    def forward(self, z: Tensor) -> Tensor:
        """Decode z (B, latents) -> (B, outputs C, H, W)."""
        return self.net(self.flat(downcast(z, self)).view(-1, *self.start))


class MapEncoder(nn.Module):
    """A convolutional encoder of images (B, *shape) to maps (B, outputs, h, w).

    It halves the size once per multiplier, with `blocks` residual blocks each. Raises UserError if (h, w) differs from
    `latent_shape`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent_shape: Sequence[int],
        outputs: int,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
    ):
        super().__init__()
        widths, _ = check_pyramid(shape, latent_shape, channels, multipliers)
        head = nn.Conv2d(widths[-1], outputs, 3, padding=1)
        self.net = nn.Sequential(*down(shape[0], widths, blocks), norm_act(widths[-1]), head)

    def forward(self, x: Tensor) -> Tensor:
        """Encode x (B, *shape) -> (B, outputs, h, w)."""
        return self.net(downcast(x, self))


class MapDecoder(nn.Module):
    """The mirror image of MapEncoder: maps (B, *latent_shape) -> images (B, *shape)."""

    def __init__(
        self,
        shape: Sequence[int],
        latent_shape: Sequence[int],
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
    ):
        super().__init__()
        widths, sizes = check_pyramid(shape, latent_shape, channels, multipliers)
        self.stem = nn.Conv2d(latent_shape[0], widths[-1], 3, padding=1)
        self.net = nn.Sequential(*(ResBlock(widths[-1]) for _ in range(blocks)), *up(shape[0], widths, sizes, blocks))

    def forward(self, z: Tensor) -> Tensor:
        """Decode z (B, *latent_shape) -> (B, *shape)."""
        return self.net(self.stem(downcast(z, self)))


class ResBlock(nn.Module):
    """The residual block x + conv(act(norm(conv(act(norm(x)))))), whose last convolution is zero at first."""

    def __init__(self, channels: int):
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.net = nn.Sequential(
            norm_act(channels), nn.Conv2d(channels, channels, 3, padding=1), norm_act(channels), last
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        return x + self.net(x)


def down(inputs: int, widths: Sequence[int], blocks: int = 0) -> list[nn.Module]:
    """Return the layers from images to maps of each width in turn, each half the size of the one before."""
    stages: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1)]
    for a, b in itertools.pairwise(widths):
        halve = nn.Conv2d(a, b, 3, stride=2, padding=1)
        stages += [
            norm_act(a),
            halve,
            norm_act(b),
            nn.Conv2d(b, b, 3, padding=1),
            *(ResBlock(b) for _ in range(blocks)),
        ]
    return stages


def up(outputs: int, widths: Sequence[int], sizes: Sequence[tuple[int, int]], blocks: int = 0) -> list[nn.Module]:
    """Return the mirror image of `down` through the same sizes, with `outputs` channels at the end."""
    stages: list[nn.Module] = []
    for a, b, size in zip(widths[:0:-1], widths[-2::-1], sizes[-2::-1], strict=True):
        widen = nn.Conv2d(a, b, 3, padding=1)
        stages += [norm_act(a), nn.Upsample(size), widen, norm_act(b), nn.Conv2d(b, b, 3, padding=1)]
        stages += [ResBlock(b) for _ in range(blocks)]
    return [*stages, norm_act(widths[0]), nn.Conv2d(widths[0], outputs, 3, padding=1)]


def check_pyramid(
    shape: Sequence[int], latent_shape: Sequence[int], channels: int, multipliers: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return `pyramid`. Raises UserError if it does not end at the size of the latents."""
    widths, sizes = pyramid(shape, channels, multipliers)
    if len(latent_shape) != 3 or tuple(latent_shape[1:]) != sizes[-1]:
        raise UserError(
            f"latents of shape {list(latent_shape)} were asked for, but {list(shape)} halved {len(multipliers)} times is "
            f"[channels, {sizes[-1][0]}, {sizes[-1][1]}]: correct the shape in model=, or the number of multipliers"
        )
    return widths, sizes


def pyramid(shape: Sequence[int], channels: int, multipliers: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return channels and (height, width) before the first halving and after each; sizes round up.

    Raises UserError for data that are not images.
    """
    if len(shape) != 3:
        raise UserError(
            f"this network takes images of shape [C, H, W], got {list(shape)}: choose another data=, or MLPs"
        )
    widths, sizes = [channels], [(shape[1], shape[2])]
    for multiplier in multipliers:
        widths.append(channels * multiplier)
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return widths, sizes


def norm_act(channels: int) -> nn.Sequential:
    """Return group norm and SiLU."""
    return nn.Sequential(nn.GroupNorm(math.gcd(8, channels), channels), nn.SiLU())
