"""The per-step update shared by every diffusion sampler, affine in tensors with per-step scalars."""

from typing import NamedTuple

import torch
from torch import Tensor

from genai.core import rng
from genai.core.protocols import Prediction


class Row(NamedTuple):
    """Coefficients of one step x' = a x + b x0 + s z."""

    a: float
    b: float
    s: float


def affine_step(
    x: Tensor, prediction: Prediction, row: Row, *, clip: float | None = None, seeds: Tensor, index: int
) -> Tensor:
    """x' = a x + b x0 + s z with x0 = clip(p x + q out) and guided out = u + w (out - u).

    x and the prediction's tensors are (B, ...) of one shape; none is changed. z is the step noise (stream 1, row
    `index`) of `seeds` (B,), drawn only where s != 0.
    """
    out, out_uncond, w, p, q = prediction
    x0 = out * q if out_uncond is None else torch.lerp(out_uncond, out, w).mul_(q)
    if p:
        x0.add_(x, alpha=p)
    if clip is not None:
        x0.clamp_(-clip, clip)
    x0.mul_(row.b)
    if row.a:
        x0.add_(x, alpha=row.a)
    if row.s:
        x0.add_(rng.normal(seeds, x.shape[1:], row=index, stream=rng.STEP).to(x0), alpha=row.s)
    return x0
