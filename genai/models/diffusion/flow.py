"""Flow matching on straight paths: rectified flow (Liu et al. 2023) with logit-normal times (Esser et al. 2024).

Time runs from data at t = 0 to noise at t = 1, x = (1 - t) x0 + t eps, and the network predicts dx/dt = eps - x0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Batch, Losses, Prediction
from genai.core.shapes import expand_like, mean_flat
from genai.models.diffusion.base import Diffusion, NetInputs
from genai.models.diffusion.process.paths import LinearPath, to_x0
from genai.nn.latent_space import Latent


class Flow(Diffusion):
    """A velocity field that carries noise to data.

    Args:
        net, shape, field, classes, label_dropout, guidance, clip, latent, speakers: see `Diffusion`; the network's time is 1000
            t.
        logit_mean, logit_std: mean and standard deviation of logit(t) in training (Esser et al. 2024, eq. 19). A
            positive mean trains more on noise; logit_std 0 draws t uniformly.

    Raises UserError if logit_std is negative.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        field: str = "image",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        classes: int | None = None,
        label_dropout: float = 0.1,
        guidance: float = 1.0,
        clip: float | None = None,
        latent: Latent | None = None,
        speakers: int | None = None,
    ):
        super().__init__(net, shape, field, classes, label_dropout, guidance, clip, latent, speakers)
        if logit_std < 0:
            raise UserError(f"model.logit_std={logit_std} must be at least 0 (0 draws t uniformly)")
        self.path, self.logit_mean, self.logit_std = LinearPath(), logit_mean, logit_std

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the squared error of the velocity (conditional flow matching, Lipman et al. 2023, eq. 9)."""
        x0 = self.encode_data(batch)
        u = self.uniforms(len(x0))
        # By inverse CDF from stratified uniforms; clamped, since the normal quantile of 0 or 1 is infinite.
        t = self.logit_mean + self.logit_std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        t = torch.sigmoid(t) if self.logit_std else u  # std 0 would give every sample one t; it selects uniform times
        eps, t_ = torch.randn_like(x0), expand_like(t, x0)
        out = self.predict((1 - t_) * x0 + t_ * eps, 1000 * t, **self.training_conditions(batch))
        return self.losses(mean_flat((out - (eps - x0)) ** 2), u)

    def denoise(self, x: Tensor, t: float, cond: NetInputs | None = None) -> Prediction:
        """Predict x0 = x - t v from x (B, *shape) at time t in [0, 1]; see `Diffusion`."""
        p, q = to_x0("flow", 1 - t, t)
        return Prediction(self.call_net(x, 1000 * t, cond), p=p, q=q)
