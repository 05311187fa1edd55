"""Elucidated diffusion (EDM, Karras et al. 2022): x = x0 + sigma eps with a preconditioned network, equations as there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Batch, Losses, Prediction
from genai.core.shapes import expand_like, mean_flat
from genai.models.diffusion.base import Diffusion
from genai.models.diffusion.latent import Latent
from genai.models.diffusion.paths import Number, VarianceExploding


class EDM(Diffusion):
    """Diffusion in continuous sigma: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (eq. 7).

    Args:
        net, shape, field, classes, label_dropout, guidance, clip, latent: see `Diffusion`. The time the network is told is affine
            in c_noise = ln(sigma) / 4, 0 at sigma_min and 1000 at sigma_max.
        sigma_data: standard deviation of the data; train.py measures it where the config says null.
        sigma_min, sigma_max: the levels that are sampled from.
        log_sigma_mean, log_sigma_std: of the normal that ln(sigma) is drawn from in training (P_mean and P_std of table 1).
    """

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        sigma_data: float,
        field: str = "image",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        log_sigma_mean: float = -1.2,
        log_sigma_std: float = 1.2,
        classes: int | None = None,
        label_dropout: float = 0.1,
        guidance: float = 1.0,
        clip: float | None = None,
        latent: Latent | None = None,
    ):
        super().__init__(net, shape, field, classes, label_dropout, guidance, clip, latent)
        if not sigma_data or sigma_data < 0:
            raise UserError(f"model.sigma_data={sigma_data} must be the standard deviation of the data, above 0")
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"model.sigma_min={sigma_min} must lie above 0 and below model.sigma_max={sigma_max}")
        self.sigma_data, self.path = sigma_data, VarianceExploding(sigma_min, sigma_max)
        self.log_sigma_mean, self.log_sigma_std = log_sigma_mean, log_sigma_std

    def preconditioning(self, sigma: Number) -> tuple[Number, Number, Number]:
        """c_skip, c_out, c_in (table 1)."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5  # type: ignore[return-value]

    def time(self, log_sigma: Number) -> Number:
        """ln(sigma) -> the network's time."""
        low, high = math.log(self.path.t_min), math.log(self.path.t_max)
        return (log_sigma - low) * (1000 / (high - low))

    def forward(self, batch: Batch, step: int) -> Losses:
        """The loss of eq. 8. Its weight lambda(sigma) = 1 / c_out^2 leaves a plain squared error of F."""
        x0 = self.clean(batch)
        u = self.uniforms(len(x0))
        log_sigma = self.log_sigma_mean + self.log_sigma_std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        sigma = expand_like(log_sigma.exp(), x0)
        x = x0 + sigma * torch.randn_like(x0)
        c_skip, c_out, c_in = self.preconditioning(sigma)
        out = self.answer(c_in * x, self.time(log_sigma), **self.conditions(batch))
        return self.losses(mean_flat((out - (x0 - c_skip * x) / c_out) ** 2), u)

    def denoise(self, x: Tensor, t: float, cond: Batch | None = None) -> Prediction:
        c_skip, c_out, c_in = self.preconditioning(t)
        return Prediction(self.call(c_in * x, self.time(math.log(t)), cond), p=c_skip, q=c_out)
