"""Denoising diffusion probabilistic models (Ho et al. 2020): forward process, training loss, denoiser and bound."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from genai.core import rng, stored
from genai.core.protocols import Batch, Losses, Prediction
from genai.core.shapes import expand_like, mean_flat
from genai.models.diffusion.base import Diffusion, NetInputs
from genai.models.diffusion.likelihood import vlb
from genai.models.diffusion.nets.levels import LevelPosterior
from genai.models.diffusion.process import weightings
from genai.models.diffusion.process.paths import Parameterization, combination, to_x0
from genai.models.diffusion.process.schedules import Schedule
from genai.nn.latent_space import Latent


class DDPM(Diffusion):
    """Discrete-time diffusion (Ho et al. 2020), optionally conditioned on a label or a caption.

    Args:
        net, shape, field, classes, label_dropout, guidance, clip, latent, speakers: see `Diffusion`; the network's time is 1000 t
            / T.
        schedule: alpha_t and sigma_t for t = 0, ..., T - 1.
        parameterization: what the network predicts: eps, x0, v or flow.
        weighting: `(schedule, q) -> (T,)`, the loss weight of each t, with q (T,) of `to_x0`; see `weightings`.
        levels: number of grey levels of the data, for the likelihood; None if the data have none.
        variance: variance of the reverse steps in the likelihood, "small" (beta tilde) or "large" (beta).

    Raises UserError if the schedule ends in pure noise and eps is predicted, or if a LevelPosterior does not fit it.
    """

    bound = "lower bound"
    predicts_data = True
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
        latent: Latent | None = None,
        speakers: int | None = None,
    ):
        super().__init__(net, shape, field, classes, label_dropout, guidance, clip, latent, speakers)
        self.path = self.schedule = schedule
        self.parameterization: Parameterization = parameterization
        if isinstance(net, LevelPosterior) and not stored.is_building():  # a stored model was checked before training
            net.check(parameterization, schedule)
        self.levels = levels
        if getattr(weighting, "func", weighting) is weightings.vlb:  # also where a partial binds it
            self.objective = None  # trained for likelihood, see `Diffusion.objective`
        self.variance: vlb.Variance = variance
        _, q = to_x0(parameterization, schedule.alpha, schedule.sigma)
        # Indexed by t in training. They stay float64 until used, and are not saved: the config defines them.
        self.register_buffer("alpha", schedule.alpha, persistent=False)
        self.register_buffer("sigma", schedule.sigma, persistent=False)
        self.register_buffer("weight", weighting(schedule, q), persistent=False)

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the weighted denoising loss (eq. 14 with the simple weighting) of x0 = batch[field] (B, *shape).

        In evaluation mode the means per quarter of t are logged too.
        """
        x0 = self.encode_data(batch)
        t = self.draw_t(len(x0))
        eps = self.draw_eps(x0)
        alpha, sigma = expand_like(self.alpha[t], x0), expand_like(self.sigma[t], x0)
        x_t = alpha * x0 + sigma * eps  # eq. 4
        u, v = combination(self.parameterization, alpha, sigma)
        # The network's time is in [0, 1000) for any T, so its embedding has the scale that it has for the paper's T = 1000.
        out = self.predict(x_t, (t * (1000 / len(self.schedule))).to(x0.dtype), **self.training_conditions(batch))
        # The target u x0 + v eps is that of the parameterization; see `combination`.
        per_sample = self.weight[t].to(x0.dtype) * mean_flat((out - (u * x0 + v * eps)) ** 2)
        return self.losses(per_sample, t / len(self.schedule))

    def draw_t(self, n: int) -> Tensor:
        """Draw time steps int64 (n,), each uniform over 0, ..., T - 1."""
        # Clamped, since in float32 u T rounds up to T for u next to 1.
        return (self.uniforms(n) * len(self.schedule)).long().clamp_max(len(self.schedule) - 1)

    def draw_eps(self, x0: Tensor) -> Tensor:
        """Draw the noise of a training step, shaped like x0."""
        return torch.randn_like(x0)

    def denoise(self, x: Tensor, t: float, cond: NetInputs | None = None) -> Prediction:
        """Predict x0 from x (B, *shape) at time step t, which need not be a whole number; see `Diffusion`."""
        p, q = to_x0(self.parameterization, *self.schedule.alpha_sigma(t))
        return Prediction(self.call_net(x, t * 1000 / len(self.schedule), cond), p=p, q=q)

    @torch.no_grad()
    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return the variational lower bound on log p(x0) in nats, (B,). Raises UserError as `bound_terms` does."""
        return -self.bound_terms(batch, seed).total()

    def bound_terms(self, batch: Batch, seed: int) -> vlb.BoundTerms:
        """Return every term of the bound (eq. 5) in nats, with one draw of x_t ~ q(x_t | x0) for each t.

        The noise of sample i at time t is Philox stream 4, row t, of seed + i. x0 and the sums are float64: the bound
        is a small difference of large terms. Raises UserError if the data have no grey levels, or the model works in
        latents.
        """
        schedule, levels = self.schedule, self.grey_levels(self.levels)
        x0 = batch[self.field].double()
        cond = self.net_inputs(batch, len(x0))
        seeds = rng.seed_range(seed, len(x0)).to(x0.device)
        kl, decoder = [], x0.new_zeros(len(x0))
        # The network runs at the precision of sampling; its output is widened before it enters a term.
        for t in reversed(range(len(schedule))):
            alpha, sigma = schedule.alpha_sigma(t)
            x_t = alpha * x0 + sigma * rng.normal(seeds, self.shape, row=t, stream=rng.MODEL).double()
            prediction = self.denoise(x_t.to(self.dtype), t, cond)
            x0_hat = prediction._replace(out=prediction.out.double()).x0(x_t, self.clip)
            if t > 0:
                kl.append(vlb.step_kl(schedule, t, x0, x0_hat, self.variance))
            else:
                std = vlb.reverse_variance(schedule, 0, self.variance) ** 0.5
                decoder = vlb.discretized_gaussian(x0, x0_hat, std, levels)
        prior = vlb.prior_kl(schedule, x0)
        return vlb.BoundTerms(prior, torch.stack(kl, 1) if kl else x0.new_zeros(len(x0), 0), decoder)
