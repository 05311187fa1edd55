"""Weights of the training loss per time step, float64 (T,).

The loss is a squared error in the network's own parameterisation. With x0 = p x + q out (`paths.to_x0`), that error is 1 / q^2
of the squared error in x0, so a weight stated for x0 is multiplied by q^2 (T,) and serves eps, x0 and v alike.
"""

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.models.diffusion.process.schedules import Schedule


def simple(schedule: Schedule, q: Tensor) -> Tensor:
    """Weight every t by 1: the simple loss (Ho et al. 2020, eq. 14). Returns (T,)."""
    return torch.ones_like(q)


def min_snr(schedule: Schedule, q: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight the squared error in x0 by min(SNR, gamma) (Hang et al. 2023, section 3.4). Returns (T,).

    In eps that is min(SNR, gamma) / SNR, in v min(SNR, gamma) / (SNR + 1).
    """
    return schedule.snr().clamp_max(gamma) * q**2


def vlb(schedule: Schedule, q: Tensor) -> Tensor:
    """Weight the squared error in x0 by T/2 (SNR(s) - SNR(t)), for the step from t to s = t - 1. Returns (T,).

    The loss is then the T - 1 KL terms of the variational bound in nats per dimension (Kingma et al. 2021, eq. 13); the
    decoder's term, t = 0, takes the weight of t = 1. Raises UserError for a schedule of one step.
    """
    if len(schedule) < 2:
        raise UserError(
            "model.weighting=vlb weights steps between two times: "
            f"model.schedule.steps={len(schedule)} must be at least 2"
        )
    snr = schedule.snr()
    weight = len(schedule) / 2 * (snr[:-1] - snr[1:])
    return torch.cat([weight[:1], weight]) * q**2
