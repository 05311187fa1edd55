"""Affine paths x = alpha x0 + sigma eps, and the one place where eps, x0 and v are converted into each other.

Every parameterisation is a linear target u x0 + v eps. Solving it together with the path for x0 gives

    x0 = p x + q out,   p = v / (alpha v - sigma u),   q = -sigma / (alpha v - sigma u).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from genai.core.errors import UserError

Parameterization = Literal["eps", "x0", "v", "flow"]
Spacing = Literal["trailing", "leading", "linspace", "karras", "log_snr"]
Number = TypeVar("Number", float, Tensor)


class Marginal(NamedTuple):
    """A point of a path: the network's time t, and alpha and sigma of the marginal q(x_t | x0) = N(alpha x0,
    sigma^2)."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """The noise-to-signal ratio sigma / alpha, which is the noise of x / alpha; infinite for pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def noise_fraction(self) -> float:
        """The fraction sigma / (alpha + sigma) of noise in the state: 0 for clean data, 1 for pure noise."""
        return self.sigma / (self.alpha + self.sigma)


CLEAN = Marginal(-1, 1.0, 0.0)
"""Clean data, the last point of every sampler. Its time -1 is never given to a network."""


class Path(Protocol):
    """A path from data to noise: alpha and sigma as functions of time. sigma / alpha grows from t_min to t_max."""

    spacing: ClassVar[Spacing]
    """Default spacing of a sampler's times on this path: the best of those that `benchmarks.solvers` measures."""

    @property
    def t_min(self) -> float:
        """The time of the least noise."""
        ...

    @property
    def t_max(self) -> float:
        """The time of the most noise."""
        ...

    @property
    def discrete(self) -> bool:
        """True if the network is trained at whole times only."""
        ...

    def marginal(self, t: float) -> Marginal:
        """Return alpha and sigma at time t."""
        ...

    def marginal_of_ratio(self, ratio: float) -> Marginal:
        """Return the point of the path where sigma / alpha is `ratio`."""
        ...


@dataclass(frozen=True)
class VarianceExploding:
    """The path x = x0 + sigma eps, whose time is sigma (Karras et al. 2022)."""

    t_min: float = 0.002
    t_max: float = 80.0
    discrete = False
    spacing: ClassVar[Spacing] = "karras"

    def marginal(self, t: float) -> Marginal:
        return Marginal(t, 1.0, t)

    def marginal_of_ratio(self, ratio: float) -> Marginal:
        return self.marginal(ratio)


@dataclass(frozen=True)
class LinearPath:
    """The path x = (1 - t) x0 + t eps from data at t = 0 to noise at t = 1 (rectified flow, Liu et al. 2023)."""

    t_min: float = 0.0
    t_max: float = 1.0
    discrete = False
    spacing: ClassVar[Spacing] = "trailing"

    def marginal(self, t: float) -> Marginal:
        return Marginal(t, 1.0 - t, t)

    def marginal_of_ratio(self, ratio: float) -> Marginal:
        return self.marginal(ratio / (1 + ratio))


def combination(kind: Parameterization, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """Return (u, v) of the training target u x0 + v eps, floats or tensors like alpha.

    v-prediction is Salimans & Ho 2022, appendix D; flow is eps - x0. Raises UserError for an unknown parameterization.
    """
    if kind == "eps":
        return 0 * alpha, 0 * alpha + 1
    if kind == "x0":
        return 0 * alpha + 1, 0 * alpha
    if kind == "v":
        return -sigma, alpha
    if kind == "flow":
        return 0 * alpha - 1, 0 * alpha + 1
    raise UserError(f"model.parameterization={kind!r} must be one of eps, x0, v, flow")


def to_x0(kind: Parameterization, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """Return the coefficients (p, q) of x0 = p x + q out, for floats or tensors of one shape; sigma > 0.

    `out` is the network's output, a prediction of the target of `combination`.

    Raises UserError for eps where alpha = 0: there the noise determines nothing about x0.
    """
    if kind == "eps" and not (alpha.all() if isinstance(alpha, Tensor) else alpha):
        raise UserError(
            "model.parameterization=eps cannot predict x0 from pure noise, and this schedule ends there (alpha = 0): "
            "use v or x0"
        )
    u, v = combination(kind, alpha, sigma)
    scale = 1 / (alpha * v - sigma * u)
    return v * scale, -sigma * scale
