"""Scalar quantisation of waveforms: a value in [-1, 1] becomes one of a few levels, its code."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least

MAX_LEVELS = 2**16


class Companding(Protocol):
    """A map between values in [-1, 1] and codes 0, ..., levels - 1."""

    levels: int

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes, int64, of floats in [-1, 1]; others are clipped."""
        ...

    def decode(self, code: Tensor) -> Tensor:
        """Return the values, float32, of codes."""
        ...


class MuLaw:
    """Mu-law companding (ITU-T G.711; van den Oord et al. 2016, section 2.2): finer steps for quieter values.

    f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu) with mu = levels - 1, rounded to the nearest of `levels` equal steps of [-1, 1].
    """

    def __init__(self, levels: int = 256):
        self.levels = at_least(levels, 2, "data.levels", most=MAX_LEVELS)

    def encode(self, x: Tensor) -> Tensor:
        mu, x = self.levels - 1, x.clamp(-1, 1)
        y = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
        return ((y + 1) * (mu / 2)).round().long()

    def decode(self, code: Tensor) -> Tensor:
        mu = self.levels - 1
        y = code.float() * (2 / mu) - 1
        return y.sign() * torch.expm1(y.abs() * math.log1p(mu)) / mu


class Linear:
    """Equal steps: code k is the value 2 k / levels - 1, so that 65,536 levels are those of 16 bits."""

    def __init__(self, levels: int = 2**16):
        self.levels = at_least(levels, 2, "data.levels", most=MAX_LEVELS)

    def encode(self, x: Tensor) -> Tensor:
        return ((x + 1) * (self.levels / 2)).round().clamp(0, self.levels - 1).long()

    def decode(self, code: Tensor) -> Tensor:
        return code.float() * (2 / self.levels) - 1


COMPANDINGS: dict[str, Callable[[int], Companding]] = {"mu_law": MuLaw, "linear": Linear}


def companding(name: str, levels: int) -> Companding:
    """Build a companding by name. Raises UserError for an unknown one, and for a number of levels out of range."""
    if name not in COMPANDINGS:
        raise UserError(f"data.companding={name!r} must be one of {', '.join(COMPANDINGS)}")
    return COMPANDINGS[name](levels)
