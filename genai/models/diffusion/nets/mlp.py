"""A residual MLP for vectors, such as points in the plane."""

import torch
from torch import Tensor, nn

from genai.core.precision import downcast
from genai.nn.embed import time_embedding
from genai.nn.init import zero


class MLP(nn.Module):
    """A residual MLP over vectors; time and label enter as a learned vector added before each block.

    Args:
        dim: D of the vectors (B, D).
        width: width of the hidden layers.
        blocks: number of residual blocks.
        classes: number of labels, None for none; the embedding has one more row, the null label.
    """

    def __init__(self, dim: int, width: int = 128, blocks: int = 3, classes: int | None = None):
        super().__init__()
        self.width = width
        self.stem = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if classes is None else nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), zero(nn.Linear(width, dim)))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """Denoise x (B, dim) at time (B,) in [0, 1000) with label int64 (B,) -> (B, dim)."""
        emb = self.time(downcast(time_embedding(time, self.width), self.stem.weight))
        if self.label is not None:
            emb = emb + self.label(label)
        h = self.stem(downcast(x, self.stem.weight))
        for block in self.blocks:
            h = h + block(h + emb)
        return self.head(torch.nn.functional.silu(h))
