"""x0-prediction for data on grey levels: a learned categorical per pixel, combined with the pixel's own likelihood."""

import torch
from torch import Tensor, nn

from genai.models.diffusion.schedules import Schedule


class LevelPosterior(nn.Module):
    """The posterior mean of x0 under a categorical prior per pixel that the network predicts from the whole of x_t.

        x0_hat = sum_k l_k w_k,   w = softmax_k(logits_k(x_t, t) + log N(x_t; alpha_t l_k, sigma_t^2)),

    the levels l_k spread evenly over [-1, 1]. Given x0 the noise is independent per pixel, so the exact posterior
    mean has this form. Once sigma_t is far below the spacing of the levels the likelihood alone decides, and the error
    vanishes whatever the network says. The Gaussian likelihood of a discrete value is that of Variational Diffusion
    Models (Kingma et al. 2021, section 3, p(x | z_0)), here at every t; predicting x0 as a categorical is that of D3PM
    (Austin et al. 2021, section 3.3).

    Args:
        net: `net(x, time, label) -> logits`, x (B, C, H, W), logits (B, C * levels, H, W) with the level as the faster
            of the two.
        levels: number of grey levels.
        schedule: that of the DDPM around it, whose parameterization is x0.
    """

    level: Tensor
    alpha: Tensor
    precision: Tensor

    def __init__(self, net: nn.Module, levels: int, schedule: Schedule):
        super().__init__()
        self.net, self.levels, self.steps = net, levels, len(schedule)
        self.register_buffer("level", torch.linspace(-1, 1, levels)[:, None, None], persistent=False)
        self.register_buffer("alpha", schedule.alpha.float(), persistent=False)
        self.register_buffer("precision", (schedule.sigma**-2).float(), persistent=False)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), time (B,) in [0, 1000), label int64 (B,) -> x0_hat (B, C, H, W)."""
        logits = self.net(x, time) if label is None else self.net(x, time, label)
        t = (time * (self.steps / 1000)).round().long()
        alpha, precision = (s[t].view(-1, 1, 1, 1, 1) for s in (self.alpha, self.precision))
        logits = logits.float().unflatten(1, (-1, self.levels))  # (B, C, K, H, W)
        logits = logits - precision / 2 * (x.float().unsqueeze(2) - alpha * self.level) ** 2
        return (logits.softmax(2) * self.level).sum(2).to(x.dtype)
