"""x0-prediction for data on grey levels: a learned categorical per pixel, combined with the pixel's own likelihood."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genai.core import stored
from genai.core.errors import UserError
from genai.core.precision import KeepBufferPrecision
from genai.models.diffusion.process.schedules import Schedule
from genai.nn.attention import Context
from genai.nn.text_encoder import TextEncoder


class LevelPosterior(KeepBufferPrecision):
    """The posterior mean of x0 under a categorical prior per pixel that the network predicts from all of x_t.

        x0_hat = sum_k l_k w_k,   w = softmax_k(logits_k(x_t, t) + log N(x_t; alpha_t l_k, sigma_t^2)),

    with the grey levels l_k spread evenly over [-1, 1]. Given x0 the noise is independent per pixel, so the exact
    posterior mean has this form. Once sigma_t is far below the spacing of the levels the likelihood alone decides, and
    the error vanishes whatever the network predicts. The Gaussian likelihood of a discrete value is that of Variational
    Diffusion Models (Kingma et al. 2021, section 3, p(x | z_0)), here at every t; predicting x0 as a categorical is
    that of D3PM (Austin et al. 2021, section 3.3).

    Args:
        net: `net(x, time, label) -> logits` with x (B, C, H, W) and logits (B, C * levels, H, W), whose level index
            varies faster than the channel; it may take captions too.
        levels: number of grey levels.
        schedule: schedule of the DDPM around it, whose parameterization is x0.
    """

    level: Tensor
    alpha: Tensor
    precision: Tensor
    log_ratio: Tensor

    def __init__(self, net: nn.Module, levels: int, schedule: Schedule):
        super().__init__()
        self.net, self.levels, self.steps = net, levels, len(schedule)
        self.shares = stored.is_building()  # stored configs may have one distribution for all channels
        self.register_buffer("level", torch.linspace(-1, 1, levels)[:, None, None], persistent=False)
        self.register_buffer("alpha", schedule.alpha.float(), persistent=False)
        self.register_buffer("precision", (schedule.sigma**-2).float(), persistent=False)
        self.register_buffer("log_ratio", (schedule.sigma / schedule.alpha).log().float(), persistent=False)

    @property
    def text(self) -> TextEncoder | None:
        """The network's caption encoder, or None."""
        return getattr(self.net, "text", None)

    @property
    def project(self) -> Callable[[Context], Any] | None:
        """The network's `project`, or None."""
        return getattr(self.net, "project", None)

    def check(self, parameterization: str, schedule: Schedule) -> None:
        """Raise UserError unless the DDPM around it predicts x0 and has a schedule of the same length."""
        if parameterization != "x0":
            raise UserError(
                f"model.parameterization={parameterization}, but a LevelPosterior (model.net) predicts the data: give x0"
            )
        if len(schedule) != self.steps:
            raise UserError(f"model.net.schedule.steps={self.steps} must be model.schedule.steps={len(schedule)}")

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, **context: object) -> Tensor:
        """Predict x0_hat (B, C, H, W) from x (B, C, H, W), time (B,) in [0, 1000) and label int64 (B,).

        Raises UserError if the network makes another number of logits.
        """
        logits = self.net(x, time, **({} if label is None else {"label": label}), **context)
        channels = logits.shape[1] / self.levels
        if channels != x.shape[1] and not (self.shares and channels == 1):
            raise UserError(
                f"the network makes {logits.shape[1]} logits a pixel, but {x.shape[1]} channels of {self.levels} grey levels "
                f"take {x.shape[1] * self.levels}: give model.net.net.out_per_channel={self.levels}"
            )
        alpha, precision = (s.view(-1, 1, 1, 1, 1) for s in self.alpha_precision(time * (self.steps / 1000)))
        logits = logits.float().unflatten(1, (-1, self.levels))  # (B, C, K, H, W)
        # In float32: near t = 0 the precision reaches 1e6 and more, which half precision cannot hold.
        logits = logits - precision / 2 * (x.float().unsqueeze(2) - alpha * self.level) ** 2
        return (logits.softmax(2) * self.level).sum(2).to(x.dtype)

    def alpha_precision(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and 1 / sigma^2, (B,), at times t (B,), interpolated as `Schedule.alpha_sigma` does."""
        t = t.float().clamp(0, self.steps - 1)
        whole, early = t.round(), t.floor()
        i = early.long()
        j, share = (i + 1).clamp_max(self.steps - 1), t - early
        low, high = self.log_ratio[i], self.log_ratio[j]
        log = torch.where(high.isinf(), low - torch.log1p(-share), low + share * (high - low))
        # Solvers may call at times between steps; float32 times count as whole within 1e-6 of the range.
        on, k = (t - whole).abs() <= 1e-6 * self.steps, whole.long()
        alpha = torch.where(on, self.alpha[k], torch.sigmoid(-2 * log).sqrt())
        return alpha, torch.where(on, self.precision[k], 1 + torch.exp(-2 * log))
