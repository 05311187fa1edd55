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
    if out_uncond is not None:
        out = torch.lerp(out_uncond, out, w)
    # With y = out + (p / q) x and x0 = q y, clipping included, a pass over memory is saved.
    y = torch.add(out, x, alpha=p / q)
    if clip is not None:
        y.clamp_(-clip / abs(q), clip / abs(q))
    y.mul_(row.b * q)
    if row.a:
        y.add_(x, alpha=row.a)
    if row.s:
        y.add_(rng.normal(seeds, x.shape[1:], row=index, stream=rng.STEP).to(y), alpha=row.s)
    return y
