"""Numbers as vectors."""

import math

import torch
from torch import Tensor

from genai.core.precision import upcast


def time_embedding(time: Tensor, dim: int) -> Tensor:
    """Sinusoids of time (B,) at dim / 2 geometric frequencies from 1 to 1e-4 -> (B, dim), float32 or wider; of an odd dim the
    last has no sine."""
    time, half = upcast(time), (dim + 1) // 2
    frequency = torch.exp(torch.arange(half, device=time.device) * (-math.log(1e4) / half))
    angle = time[:, None] * frequency.to(time.dtype)
    return torch.cat([angle.cos(), angle.sin()[:, : dim // 2]], 1)
