"""The likelihood of data on grey levels by the probability-flow ODE of any diffusion model.

With u = sigma / (alpha + sigma) and y = x / (alpha + sigma) = (1 - u) x0 + u eps, every path's ODE (Song et al.,
"Score-Based Generative Modeling", 2021, eq. 13) is

    dy / d ln u = y - x0(y, u),        d ln p(y) / d ln u = tr(dx0 / dy) - n        (eq. 39)

from the sampler's own start, y ~ N(0, u^2 I) at the path's last time. The data is discrete and p(y) is a density, so the ODE
ends at a small u_0 > 0, and the noise there is what makes the data continuous:

    ln P(x) >= E[ln p(y_0) + ln P(x | y_0) - ln q(y_0 | x)],   y_0 ~ q = N((1 - u_0) x, u_0^2 I),

with P(x | y_0) of each number in proportion to q over the levels: variational dequantisation (Ho et al., "Flow++", 2019, eq. 11)
by the model's own noise, as in Zheng et al., "Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs", 2023.
"""

import math

import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import at_least, number
from genai.core.protocols import Batch, for_models
from genai.models.diffusion.base import Diffusion, NetInputs

LOG_2PI = math.log(2 * math.pi)


@for_models(Diffusion)
def probability_flow(
    model: Diffusion,
    batch: Batch,
    seed: int,
    levels: int | None,
    steps: int = 100,
    probes: int | None = 1,
    noise: float | None = None,
) -> Tensor:
    """Return a lower bound on ln P(x) in nats, (B,), exact up to the solver's error and the dequantisation.

    The estimate is unbiased over its draws, Philox stream 4 of seed + i.

    Args:
        levels: grey levels of the data, evenly spaced over [-1, 1].
        steps: steps of Heun's method, evenly spaced in ln u, two network calls each.
        probes: random sign vectors of Hutchinson's trace estimate per call; None computes the exact trace by n backward
            passes.
        noise: sigma / alpha where the ODE ends, at least that of the path's first time; None is a third of half a grey
            level.

    Raises UserError for data without grey levels, for diffusion in latents, and for steps, probes or noise out of
    range.
    """
    levels = model.grey_levels(levels)
    at_least(steps, 1, "likelihood.steps")
    if probes is not None:
        at_least(probes, 1, "likelihood.probes")
    low, high = model.path.marginal(model.path.t_min), model.path.marginal(model.path.t_max)
    ratio = max(
        1 / (3 * (levels - 1)) if noise is None else number(noise, "likelihood.noise", 0, open_low=True), low.ratio
    )
    u_0, u_1 = ratio / (1 + ratio), high.sigma / (high.alpha + high.sigma)
    x = batch[model.field]
    seeds = rng.seed_range(seed, len(x)).to(x.device)
    with torch.no_grad():
        cond = model.net_inputs(batch, len(x))
        eps = rng.normal(seeds, model.shape, row=0, stream=rng.MODEL)
        y = (1 - u_0) * x + u_0 * eps
        gain = _decoder(y, x, u_0, levels) + _flat(0.5 * (eps**2 + LOG_2PI)) + x[0].numel() * math.log(u_0)
    # Heun's method in ln u, upwards from the data; the divergence is integrated along with the state.
    h = (math.log(u_1) - math.log(u_0)) / steps
    divergence = torch.zeros_like(gain)
    slope, trace = _field(model, y, u_0, cond, seeds, 1, probes)
    for k in range(steps):
        v = math.exp(math.log(u_0) + (k + 1) * h) if k + 1 < steps else u_1
        ahead, trace_ahead = _field(model, y + h * slope, v, cond, seeds, 2 * k + 2, probes)
        y, divergence = y + h / 2 * (slope + ahead), divergence + h / 2 * (trace + trace_ahead)
        if k + 1 < steps:
            slope, trace = _field(model, y, v, cond, seeds, 2 * k + 3, probes)
    prior = -_flat(0.5 * (y / u_1) ** 2 + 0.5 * LOG_2PI) - x[0].numel() * math.log(u_1)
    return prior + divergence + gain


def _field(
    model: Diffusion, y: Tensor, u: float, cond: NetInputs, seeds: Tensor, row: int, probes: int | None
) -> tuple[Tensor, Tensor]:
    """Return dy / d ln u (B, *shape) and its divergence (B,)."""
    level = model.path.marginal_of_ratio(u / (1 - u)) if u < 1 else model.path.marginal(model.path.t_max)
    scale = level.alpha + level.sigma
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        x = (scale * y).to(model.dtype)
        x0 = model.denoise(x, level.t, cond or None).x0(x, model.clip).to(y.dtype)
        if probes is None:
            traces = [
                torch.autograd.grad(part.sum(), y, retain_graph=True)[0].flatten(1)[:, i]
                for i, part in enumerate(x0.flatten(1).unbind(1))
            ]
            trace = torch.stack(traces).sum(0)
        else:
            signs = rng.uniform(seeds, (probes, *model.shape), row=row).sub(0.5).sign().to(y)
            each = [torch.autograd.grad((x0 * s).sum(), y, retain_graph=True)[0] * s for s in signs.unbind(1)]
            trace = torch.stack([_flat(e) for e in each]).mean(0)
    return (y - x0).detach(), y[0].numel() - trace


def _decoder(y: Tensor, x: Tensor, u: float, levels: int) -> Tensor:
    """Return ln P(x | y) in nats, (B,)."""
    values = torch.linspace(-1, 1, levels, device=x.device)
    logits = -0.5 * ((y[..., None] - (1 - u) * values) / u) ** 2
    index = ((x + 1) * (levels - 1) / 2).round().long()
    return _flat(logits.log_softmax(-1).gather(-1, index[..., None])[..., 0])


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
