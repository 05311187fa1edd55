"""Denoising Diffusion Probabilistic Models (Ho et al. 2020): the forward process, the loss and the denoiser."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Batch, Losses, Prediction
from genai.core.shapes import expand_like, mean_flat
from genai.models.diffusion import vlb, weightings
from genai.models.diffusion.paths import Parameterization, Path, combination, to_x0
from genai.models.diffusion.schedules import Schedule


class DDPM(nn.Module):
    """Discrete-time diffusion of one field of the batch, optionally conditioned on its label.

    Args:
        net: `net(x, time, label) -> out`, x and out (B, *shape), time (B,) in [0, 1000), label int64 (B,) where the
            index `classes` is the learned null; an unconditional model calls `net(x, time)`.
        schedule: alpha and sigma for t = 0, ..., T-1.
        shape: of one sample, (C, H, W) or (D,).
        field: the batch's tensor to model, scaled to [-1, 1] if `clip` is 1.
        parameterization: what the network predicts: eps, x0 or v.
        weighting: `(schedule, q) -> (T,)`, the loss weight of each t.
        classes: number of labels, None for an unconditional model.
        label_dropout: probability of training a sample with the null label, for classifier-free guidance.
        guidance: weight of classifier-free guidance when sampling, 1 for none.
        clip: bound of |x0| while sampling, None for unbounded data.
        levels: number of grey levels of the data, for the likelihood; None if it has none.
        variance: of the reverse steps in the likelihood, "small" or "large".
    """

    bound = "lower bound"
    alpha: Tensor
    sigma: Tensor
    weight: Tensor

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        shape: Sequence[int],
        field: str = "image",
        parameterization: Parameterization = "eps",
        weighting: Callable[[Schedule, Tensor], Tensor] = weightings.simple,
        classes: int | None = None,
        label_dropout: float = 0.1,
        guidance: float = 1.0,
        clip: float | None = 1.0,
        levels: int | None = None,
        variance: vlb.Variance = "small",
    ):
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise UserError(f"model.label_dropout={label_dropout} must be a probability between 0 and 1")
        self.net, self.schedule, self.shape, self.field = net, schedule, tuple(shape), field
        self.parameterization: Parameterization = parameterization
        self.classes, self.label_dropout = classes, label_dropout
        self.guidance = guidance
        self.clip, self.levels = clip, levels
        self.variance: vlb.Variance = variance
        _, q = to_x0(parameterization, schedule.alpha, schedule.sigma)
        # Looked up by t in training; float64 until the moment of use, and no part of the state.
        self.register_buffer("alpha", schedule.alpha, persistent=False)
        self.register_buffer("sigma", schedule.sigma, persistent=False)
        self.register_buffer("weight", weighting(schedule, q), persistent=False)

    def nets(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    @property
    def device(self) -> torch.device:
        return self.alpha.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    def null(self) -> Batch:
        """The value, shape (), of each condition that means "not given"."""
        return {} if self.classes is None else {"label": torch.tensor(self.classes)}

    def forward(self, batch: Batch, step: int) -> Losses:
        """The weighted denoising loss (eq. 14 where the weighting is simple); evaluation adds its quartiles over t."""
        x0 = batch[self.field]
        t = self.draw_t(len(x0))
        eps = self.draw_eps(x0)
        alpha, sigma = expand_like(self.alpha[t], x0), expand_like(self.sigma[t], x0)
        x_t = alpha * x0 + sigma * eps  # eq. 4
        u, v = combination(self.parameterization, alpha, sigma)
        out = self.net(x_t, self.time(t, x0.dtype), **self.conditions(batch))
        per_sample = self.weight[t].to(x0.dtype) * mean_flat((out.to(x0.dtype) - (u * x0 + v * eps)) ** 2)
        return Losses(per_sample.mean(), len(x0), {} if self.training else self.logs(per_sample.detach(), t))

    def draw_t(self, n: int) -> Tensor:
        """Time steps (n,), spread evenly over the batch: each is uniform, their mean varies far less than that of
        independent draws (Kingma et al. 2021, appendix I.1). In evaluation always the same ones."""
        u = torch.arange(n, device=self.device) / n
        u = u + torch.rand((), device=self.device) if self.training else u + 0.5 / n
        return (u % 1 * len(self.schedule)).long().clamp_max(len(self.schedule) - 1)

    def draw_eps(self, x0: Tensor) -> Tensor:
        return torch.randn_like(x0)

    def time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t -> the network's time in [0, 1000), whatever T."""
        return (t * (1000 / len(self.schedule))).to(dtype)

    def conditions(self, batch: Batch) -> Batch:
        """The network's keyword arguments; in training some labels become the null."""
        if self.classes is None:
            return {}
        label = batch["label"]
        if self.training:
            dropped = torch.rand(label.shape, device=label.device) < self.label_dropout
            label = torch.where(dropped, self.classes, label)
        return {"label": label}

    def logs(self, per_sample: Tensor, t: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean loss and count per quartile of t, q1 the least noise."""
        quartile = t * 4 // len(self.schedule)
        member = (quartile == torch.arange(4, device=t.device)[:, None]).to(per_sample)  # (4, B)
        count = member.sum(1)
        mean = member @ per_sample / count.clamp_min(1)
        return {f"loss_q{i + 1}": (mean[i], count[i]) for i in range(4)}

    @property
    def path(self) -> Path:
        return self.schedule

    def denoise(self, x: Tensor, t: float, cond: Batch | None = None) -> Prediction:
        """The Denoiser: x (B, *shape) at time step t; without conditions, those the network takes are null."""
        cond = cond or {}
        if not cond:
            cond = {name: null.to(x.device).expand(len(x)) for name, null in self.null().items()}
        out = self.net(x, x.new_full((len(x),), t * 1000 / len(self.schedule)), **cond)
        p, q = to_x0(self.parameterization, *self.schedule.at(t))
        return Prediction(out.to(x.dtype), p=p, q=q)

    @torch.no_grad()
    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """The variational lower bound of log p, nats (B,), see `vlb`; needs `levels`."""
        return -vlb.terms(self, batch, seed).total()
