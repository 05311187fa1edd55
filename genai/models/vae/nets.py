"""Encoders and decoders: MLPs for anything, convolutions for images of any size."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLPEncoder(nn.Module):
    """x (B, *shape) -> (B, 2 latents)."""

    def __init__(self, shape: Sequence[int], latents: int, width: int = 256, layers: int = 2, dropout: float = 0.0):
        super().__init__()
        self.net = mlp(math.prod(shape), width, layers, 2 * latents, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


class MLPDecoder(nn.Module):
    """z (B, latents) -> (B, outputs C, ...), `outputs` numbers for each of the data's."""

    def __init__(
        self, shape: Sequence[int], latents: int, outputs: int, width: int = 256, layers: int = 2, dropout: float = 0.0
    ):
        super().__init__()
        self.shape = (outputs * shape[0], *shape[1:])
        self.net = mlp(latents, width, layers, math.prod(self.shape), dropout)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z).view(-1, *self.shape)


def mlp(inputs: int, width: int, layers: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """`layers` hidden layers, each normalised, with SiLU."""
    net: list[nn.Module] = []
    for i in range(layers):
        net += [nn.Linear(inputs if i == 0 else width, width), nn.LayerNorm(width), nn.SiLU()]
        net += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*net, nn.Linear(width if layers else inputs, outputs))


class ConvEncoder(nn.Module):
    """Images (B, *shape) -> (B, 2 latents): halved once for each multiplier, then one linear map."""

    def __init__(self, shape: Sequence[int], latents: int, channels: int = 32, multipliers: Sequence[int] = (1, 2)):
        super().__init__()
        widths, sizes = pyramid(shape, channels, multipliers)
        stem = nn.Conv2d(shape[0], widths[0], 3, padding=1)
        stages = [
            nn.Sequential(
                norm_act(a), nn.Conv2d(a, b, 3, stride=2, padding=1), norm_act(b), nn.Conv2d(b, b, 3, padding=1)
            )
            for a, b in itertools.pairwise(widths)
        ]
        flat = nn.Linear(widths[-1] * math.prod(sizes[-1]), 2 * latents)
        self.net = nn.Sequential(stem, *stages, norm_act(widths[-1]), nn.Flatten(), flat)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ConvDecoder(nn.Module):
    """z (B, latents) -> (B, outputs C, H, W): the encoder's way back, to the very sizes it came by."""

    def __init__(
        self, shape: Sequence[int], latents: int, outputs: int, channels: int = 32, multipliers: Sequence[int] = (1, 2)
    ):
        super().__init__()
        widths, sizes = pyramid(shape, channels, multipliers)
        self.start, stages = (widths[-1], *sizes[-1]), []
        for a, b, size in zip(widths[:0:-1], widths[-2::-1], sizes[-2::-1], strict=True):
            stages += [
                norm_act(a),
                nn.Upsample(size),
                nn.Conv2d(a, b, 3, padding=1),
                norm_act(b),
                nn.Conv2d(b, b, 3, padding=1),
            ]
        self.flat = nn.Linear(latents, math.prod(self.start))
        self.net = nn.Sequential(*stages, norm_act(widths[0]), nn.Conv2d(widths[0], outputs * shape[0], 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(self.flat(z).view(-1, *self.start))


def pyramid(shape: Sequence[int], channels: int, multipliers: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Channels and (height, width) before the first and after each halving, which rounds up."""
    widths, sizes = [channels], [(shape[1], shape[2])]
    for multiplier in multipliers:
        widths.append(channels * multiplier)
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return widths, sizes


def norm_act(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(math.gcd(8, channels), channels), nn.SiLU())
