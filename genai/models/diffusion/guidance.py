"""Guidance is a denoiser around a denoiser; networks never learn the word."""

import torch
from torch import Tensor

from genai.core.protocols import Batch, Denoiser, Prediction


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
