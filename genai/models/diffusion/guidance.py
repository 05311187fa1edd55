"""Guidance is a denoiser around a denoiser; networks never learn the word."""

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch, Denoiser, Prediction
from genai.models.diffusion.paths import Path


def classifier_free(denoiser: Denoiser, null: Batch, w: float) -> Denoiser:
    """Classifier-free guidance out = u + w (c - u), one call of twice the batch (Ho & Salimans 2022).

    w = 1 is no guidance (the paper's w is this one minus 1), w = 0 unconditional. `null` maps each condition to the
    value, shape (), that means "not given".
    """
    if w == 1.0:
        return denoiser

    def guided(x: Tensor, t: float, cond: Batch | None) -> Prediction:
        assert cond is not None
        both = {k: torch.cat([c, null[k].to(c).expand_as(c)]) for k, c in cond.items()}
        prediction = denoiser(torch.cat([x, x]), t, both)
        out, out_uncond = prediction.out.chunk(2)
        return prediction._replace(out=out, out_uncond=out_uncond, w=w)

    return guided


def autoguidance(denoiser: Denoiser, worse: Denoiser, w: float) -> Denoiser:
    """out = u + w (c - u) with u from a worse model of the same data and parameterisation, such as a smaller or a less
    trained one, under the same conditions (Karras et al. 2024, eq. 3)."""
    if w == 1.0:
        return denoiser

    def guided(x: Tensor, t: float, cond: Batch | None) -> Prediction:
        better, other = denoiser(x, t, cond), worse(x, t, cond)
        if (better.p, better.q) != (other.p, other.q):
            raise UserError(
                "autoguidance needs two models of one parameterisation and one path: retrain one of them alike"
            )
        return better._replace(out_uncond=other.out, w=w)

    return guided


def interval(guided: Denoiser, plain: Denoiser, path: Path, low: float, high: float) -> Denoiser:
    """`guided` where low < sigma / alpha <= high, `plain` elsewhere (Kynkaanniemi et al. 2024, eq. 5)."""

    def limited(x: Tensor, t: float, cond: Batch | None) -> Prediction:
        return (guided if low < path.level(t).ratio <= high else plain)(x, t, cond)

    return limited
