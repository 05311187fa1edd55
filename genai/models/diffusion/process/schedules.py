"""Noise schedules in float64: alpha_t and sigma_t of the path x_t = alpha_t x0 + sigma_t eps, t = 0, ..., T-1.

All are variance preserving, alpha^2 + sigma^2 = 1; t = 0 has the least noise.
"""

import bisect
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.models.diffusion.process.paths import Marginal, Spacing


@dataclass(frozen=True)
class Schedule:
    """A discrete path: alpha and sigma, float64 (T,); alpha falls and sigma rises with t = 0, ..., T - 1."""

    alpha: Tensor
    sigma: Tensor

    discrete = True
    spacing: ClassVar[Spacing] = "trailing"
    t_min = 0

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def t_max(self) -> int:
        """The last time, T - 1."""
        return len(self) - 1

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Return (alpha_t, sigma_t); t = -1 is clean data, (1, 0).

        Between whole times log(sigma / alpha) is interpolated linearly, or alpha / sigma if the later time is pure
        noise, where that logarithm is infinite.
        """
        if t < 0:
            return 1.0, 0.0
        if t == int(t):
            return self._pairs[int(t)]
        low, high = self._log_ratios[int(t)], self._log_ratios[int(t) + 1]
        fraction = t - int(t)
        return _variance_preserving(
            math.exp(low) / (1 - fraction) if math.isinf(high) else math.exp(low + fraction * (high - low))
        )

    def marginal(self, t: float) -> Marginal:
        """Return the point of the path at time t, whole or between two steps."""
        return Marginal(t, *self.alpha_sigma(t))

    def marginal_of_ratio(self, ratio: float) -> Marginal:
        """Return the point where sigma / alpha is `ratio`; its time is in general not whole."""
        logs, log = self._log_ratios, math.log(ratio)
        # logs rise with t; the last one is infinite where the schedule ends in pure noise.
        i = min(max(bisect.bisect_right(logs, log) - 1, 0), max(len(logs) - 2, 0))
        if len(logs) == 1:
            t = i
        elif math.isinf(logs[i + 1]):
            t = i + 1 - math.exp(logs[i] - log)
        else:
            t = i + (log - logs[i]) / (logs[i + 1] - logs[i])
        return Marginal(min(max(t, 0), self.t_max), *_variance_preserving(ratio))

    @functools.cached_property
    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.alpha.tolist(), self.sigma.tolist(), strict=True))

    @functools.cached_property
    def _log_ratios(self) -> list[float]:
        return (self.sigma / self.alpha).log().tolist()

    def snr(self) -> Tensor:
        """Return the signal-to-noise ratio alpha^2 / sigma^2, (T,)."""
        return (self.alpha / self.sigma) ** 2


def _variance_preserving(ratio: float) -> tuple[float, float]:
    """Return (alpha, sigma) with sigma / alpha = ratio and alpha^2 + sigma^2 = 1."""
    alpha = (1 + ratio**2) ** -0.5
    return alpha, ratio * alpha


def from_alpha_bar(alpha_bar: Tensor) -> Schedule:
    """Return the schedule alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) of alpha_bar float64 (T,)."""
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def _check_steps(steps: int) -> int:
    """Return steps. Raises UserError below 1."""
    if steps < 1:
        raise UserError(f"a schedule needs at least 1 step, got {steps} (model.schedule.steps)")
    return steps


def linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Return the schedule with beta_t linear from beta_start to beta_end, scaled by 1000 / T (Ho et al. 2020,
    section 4)."""
    # Fewer steps take proportionally larger betas; 0.999 keeps each below 1, so that alpha stays above 0.
    scale = 1000 / _check_steps(steps)
    beta = torch.linspace(beta_start * scale, beta_end * scale, steps, dtype=torch.float64).clamp_max(0.999)
    return from_alpha_bar(torch.cumprod(1 - beta, 0))


def cosine(steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Schedule:
    """Return the cosine schedule (Nichol & Dhariwal 2021, eq. 17).

    abar_t = f(t) / f(0) with f(t) = cos^2((t / T + offset) / (1 + offset) * pi / 2), and beta_t at most beta_max.
    """
    u = torch.arange(_check_steps(steps) + 1, dtype=torch.float64) / steps
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(0, beta_max)
    return from_alpha_bar(torch.cumprod(1 - beta, 0))


def karras(steps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """Return a schedule evenly spaced in the rho-th root of sigma / alpha (Karras et al. 2022, eq. 5).

    The path is variance preserving, unlike that of EDM.
    """
    ramp = torch.linspace(0, 1, _check_steps(steps), dtype=torch.float64)
    ratio = (sigma_min ** (1 / rho) + ramp * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho
    return from_alpha_bar(1 / (1 + ratio**2))


def log_snr(steps: int = 1000, log_snr_max: float = 9.0, log_snr_min: float = -9.0) -> Schedule:
    """Return the schedule whose log SNR falls linearly in t (Variational Diffusion Models, Kingma et al. 2021, sec.
    3)."""
    log_snrs = torch.linspace(log_snr_max, log_snr_min, _check_steps(steps), dtype=torch.float64)
    return from_alpha_bar(torch.sigmoid(log_snrs))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Return the schedule with sqrt(abar) shifted and scaled so that the last t is pure noise (Lin et al. 2024, alg.
    1).

    Raises UserError for a schedule of one step, which would be nothing but noise.
    """
    if len(schedule) < 2:
        raise UserError(
            f"a schedule that ends in pure noise needs at least 2 steps, got {len(schedule)}: "
            "set model.schedule.schedule.steps="
        )
    first, last = schedule.alpha[0], schedule.alpha[-1]
    return from_alpha_bar(((schedule.alpha - last) * first / (first - last)) ** 2)
