"""EDM (Karras et al. 2022): x = x0 + sigma eps with a preconditioned network. Equation numbers are those of the
paper."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Batch, Losses, Prediction
from genai.core.shapes import expand_like, mean_flat
from genai.models.diffusion.base import Diffusion, NetInputs
from genai.models.diffusion.process.paths import Number, VarianceExploding
from genai.nn.latent_space import Latent


class EDM(Diffusion):
    """Diffusion in continuous sigma: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (eq. 7).

    Args:
        net, shape, field, classes, label_dropout, guidance, clip, latent, speakers: see `Diffusion`. The network's time is affine
            in c_noise = ln(sigma) / 4: 0 at sigma_min, 1000 at sigma_max.
        sigma_data: standard deviation of the data; None until `prepare` has measured it.
        sigma_min, sigma_max: range of sigma in sampling.
        log_sigma_mean, log_sigma_std: mean and standard deviation of ln(sigma) in training (P_mean and P_std of table
            1).

    Raises UserError if sigma_min, sigma_max or sigma_data are out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        sigma_data: float | None,
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
        speakers: int | None = None,
    ):
        super().__init__(net, shape, field, classes, label_dropout, guidance, clip, latent, speakers)
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"model.sigma_min={sigma_min} must lie above 0 and below model.sigma_max={sigma_max}")
        self.sigma_data = None if sigma_data is None else _positive(sigma_data)
        self.path = VarianceExploding(sigma_min, sigma_max)
        self.log_sigma_mean, self.log_sigma_std = log_sigma_mean, log_sigma_std

    def prepare(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Prepare as `Diffusion` does, then measure sigma_data to four digits unless it is given; in latents it is 1.

        Returns {"sigma_data": ...} if it was measured, for the stored config. Raises UserError for data that never
        vary.
        """
        first = next(stream := iter(batches))
        found = super().prepare(itertools.chain([first], stream))
        if self.sigma_data is not None:
            return found
        if self.latent is not None:
            self.sigma_data = 1.0  # `Latent` scales its latents to unit variance
        else:
            n, total, squares = 0, 0.0, 0.0
            for batch in itertools.chain([first], stream):
                x = batch[self.field].double()
                n, total, squares = n + x.numel(), total + x.sum().item(), squares + x.square().sum().item()
            # Rounding errors make the variance of constant data slightly negative: the maximum lets `_positive` refuse it.
            self.sigma_data = _positive(round(max(squares / n - (total / n) ** 2, 0.0) ** 0.5, 4))
        return {**found, "sigma_data": self.sigma_data}

    def preconditioning(self, sigma: Number) -> tuple[Number, Number, Number]:
        """Return c_skip, c_out and c_in at sigma (table 1). Raises UserError while sigma_data is None."""
        if self.sigma_data is None:
            raise UserError("model.sigma_data=null is measured by prepare(batches) of training data: call that first")
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5  # type: ignore[return-value]

    def time(self, log_sigma: Number) -> Number:
        """Map ln(sigma) to the network's time in [0, 1000]."""
        low, high = math.log(self.path.t_min), math.log(self.path.t_max)
        return (log_sigma - low) * (1000 / (high - low))

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the loss of eq. 8 on x0 = batch[field] (B, *shape).

        Its weight lambda(sigma) = 1 / c_out^2 cancels c_out, which leaves the squared error of F alone.
        """
        x0 = self.encode_data(batch)
        u = self.uniforms(len(x0))
        # By inverse CDF from stratified uniforms; clamped, since the normal quantile of 0 or 1 is infinite.
        log_sigma = self.log_sigma_mean + self.log_sigma_std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        sigma = expand_like(log_sigma.exp(), x0)
        x = x0 + sigma * torch.randn_like(x0)
        c_skip, c_out, c_in = self.preconditioning(sigma)
        out = self.predict(c_in * x, self.time(log_sigma), **self.training_conditions(batch))
        return self.losses(mean_flat((out - (x0 - c_skip * x) / c_out) ** 2), u)

    def denoise(self, x: Tensor, t: float, cond: NetInputs | None = None) -> Prediction:
        """Predict x0 from x (B, *shape) at sigma = t (eq. 7); see `Diffusion`."""
        c_skip, c_out, c_in = self.preconditioning(t)
        return Prediction(self.call_net(c_in * x, self.time(math.log(t)), cond), p=c_skip, q=c_out)


def _positive(sigma_data: float) -> float:
    """Return sigma_data. Raises UserError if it is not positive, as for data that never vary."""
    if not sigma_data > 0:
        raise UserError(f"model.sigma_data={sigma_data} must be the standard deviation of the data, above 0")
    return sigma_data
