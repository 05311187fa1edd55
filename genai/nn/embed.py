"""Sinusoidal embeddings of scalars."""

import math

import torch
from torch import Tensor

from genai.core.precision import upcast


def time_embedding(time: Tensor, dim: int) -> Tensor:
    """Embed times (B,) by sinusoids at dim / 2 geometric frequencies from 1 to 1e-4 -> (B, dim), float32 or wider.

    With an odd dim the last frequency has no sine.
    """
    time, half = upcast(time), (dim + 1) // 2
    frequency = torch.exp(torch.arange(half, device=time.device) * (-math.log(1e4) / half))
    angle = time[:, None] * frequency.to(time.dtype)
    return torch.cat([angle.cos(), angle.sin()[:, : dim // 2]], 1)
