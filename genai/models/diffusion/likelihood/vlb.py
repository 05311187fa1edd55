"""The discrete variational bound of a DDPM (Ho et al. 2020, eq. 5), term by term, for data on L grey levels."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genai.models.diffusion.process.schedules import Schedule

Variance = Literal["small", "large"]


class BoundTerms(NamedTuple):
    """The terms of the bound in nats: prior (B,), one KL per t = T - 1, ..., 1 (B, T - 1), decoder (B,)."""

    prior: Tensor
    kl: Tensor
    decoder: Tensor

    def total(self) -> Tensor:
        """Return the bound on -log p in nats, (B,)."""
        return self.prior + self.kl.sum(1) + self.decoder


def prior_kl(schedule: Schedule, x0: Tensor) -> Tensor:
    """Return KL(q(x_{T-1} | x0) || N(0, I)) of x0 (B, ...) in nats, (B,)."""
    alpha, sigma = schedule.alpha_sigma(len(schedule) - 1)
    return 0.5 * ((alpha * x0) ** 2 + sigma**2 - 1 - math.log(sigma**2)).flatten(1).sum(1)


def posterior(schedule: Schedule, t: int) -> tuple[float, float, float]:
    """Return (a, b, var) of q(x_{t-1} | x_t, x0) = N(a x_t + b x0, var) (eq. 6 and 7), t >= 1."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(t - 1)
    ratio = alpha_t / alpha_s
    beta = sigma_t**2 - (ratio * sigma_s) ** 2
    return ratio * sigma_s**2 / sigma_t**2, alpha_s * beta / sigma_t**2, beta * sigma_s**2 / sigma_t**2


def reverse_variance(schedule: Schedule, t: int, variance: Variance) -> float:
    """Return the variance of p(x_{t-1} | x_t): the posterior's for "small", beta_t for "large".

    The posterior at t = 0 is degenerate, so t = 0 takes the variance of t = 1; a schedule of one step takes beta_t.
    """
    if variance == "small" and len(schedule) > 1:
        return posterior(schedule, max(t, 1))[2]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(t - 1)
    return sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2


def step_kl(schedule: Schedule, t: int, x0: Tensor, x0_hat: Tensor, variance: Variance) -> Tensor:
    """Return KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) of two Gaussians in nats, (B,), t >= 1."""
    _, b, var = posterior(schedule, t)
    var_p = reverse_variance(schedule, t, variance)
    per_dim = var / var_p - 1 - math.log(var / var_p) + (b * (x0 - x0_hat)) ** 2 / var_p
    return 0.5 * per_dim.flatten(1).sum(1)


def discretized_gaussian(x0: Tensor, mean: Tensor, std: float, levels: int) -> Tensor:
    """Return -log of the mass that N(mean, std^2) gives to the bin of x0, in nats, (B,) (eq. 13).

    x0 and mean are (B, ...). Bins are centred on the levels in [-1, 1] and reach 1 / (levels - 1) to each side; the
    outer two extend to infinity.
    """
    half = 1 / (levels - 1)
    upper = torch.where(x0 > 1 - half, torch.inf, (x0 + half - mean) / std)
    lower = torch.where(x0 < -1 + half, -torch.inf, (x0 - half - mean) / std)
    # In logarithms, and mirrored where both ends are positive: a bin far from the mean costs what it must, for a mass
    # that underflows, or is bounded from below, makes a bad decoder look cheap.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    high, low = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return -(high + torch.log(-torch.expm1(low - high))).flatten(1).sum(1)
