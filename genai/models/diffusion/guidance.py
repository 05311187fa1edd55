"""Guidance is a denoiser around a denoiser; networks never learn the word."""

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Denoiser, Prediction
from genai.models.diffusion.base import Condition, Diffusion
from genai.models.diffusion.paths import Path


def plain(model: Diffusion, condition: Condition) -> Denoiser:
    """The model with what it was told, and no guidance: one network call."""
    given = model.projected(condition.given)
    return lambda x, t: model.denoise(x, t, given)


def classifier_free(model: Diffusion, condition: Condition, w: float) -> Denoiser:
    """Classifier-free guidance out = u + w (c - u), one call of twice the batch (Ho & Salimans 2022).

    w = 1 is no guidance (the paper's w is this one minus 1) and w = 0 unconditional, by one call of the batch alone.
    """
    given, null = condition
    if w == 1:
        return plain(model, condition)
    null = {name: null[name].to(c).expand_as(c) for name, c in given.items()}
    if w == 0:
        unconditional = model.projected(null)
        return lambda x, t: model.denoise(x, t, unconditional)
    both = model.projected({name: torch.cat([c, null[name]]) for name, c in given.items()})

    def guided(x: Tensor, t: float) -> Prediction:
        prediction = model.denoise(torch.cat([x, x]), t, both)
        out, out_uncond = prediction.out.chunk(2)
        return prediction._replace(out=out, out_uncond=out_uncond, w=w)

    return guided


def autoguidance(better: Denoiser, worse: Denoiser, w: float) -> Denoiser:
    """out = u + w (c - u) with u from a worse model of the same data and parameterisation, such as a smaller or a less
    trained one, told the same (Karras et al. 2024, eq. 3)."""

    def guided(x: Tensor, t: float) -> Prediction:
        ours, other = better(x, t), worse(x, t)
        if (ours.p, ours.q) != (other.p, other.q):
            raise UserError(
                "autoguidance needs two models of one parameterisation and one path: retrain one of them alike"
            )
        return ours._replace(out_uncond=other.out, w=w)

    return guided


def interval(guided: Denoiser, unguided: Denoiser, path: Path, low: float, high: float) -> Denoiser:
    """`guided` where low < sigma / alpha <= high, `unguided` elsewhere (Kynkaanniemi et al. 2024, eq. 5)."""

    def limited(x: Tensor, t: float) -> Prediction:
        return (guided if low < path.level(t).ratio <= high else unguided)(x, t)

    return limited
