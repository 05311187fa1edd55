"""A residual MLP for vectors, such as points in the plane."""

import torch
from torch import Tensor, nn

from genai.core.precision import downcast
from genai.models.diffusion.nets.conditioning import embedding
from genai.nn.embed import time_embedding
from genai.nn.init import zero


class MLP(nn.Module):
    """A residual MLP over vectors; time, label and speaker enter as a learned vector added before each block.

    Args:
        dim: D of the vectors (B, D).
        width: width of the hidden layers.
        blocks: number of residual blocks.
        classes, speakers: number of labels and of speakers, None for none; the embeddings have one more row, the null.
    """

    def __init__(
        self, dim: int, width: int = 128, blocks: int = 3, classes: int | None = None, speakers: int | None = None
    ):
        super().__init__()
        self.width = width
        self.stem = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label, self.speaker = embedding(classes, width), embedding(speakers, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), zero(nn.Linear(width, dim)))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """Denoise x (B, dim) at time (B,) in [0, 1000) with label and speaker int64 (B,) -> (B, dim)."""
        emb = self.time(downcast(time_embedding(time, self.width), self.stem.weight))
        for embed, kind in ((self.label, label), (self.speaker, speaker)):
            emb = emb if embed is None else emb + embed(kind)
        h = self.stem(downcast(x, self.stem.weight))
        for block in self.blocks:
            h = h + block(h + emb)
        return self.head(torch.nn.functional.silu(h))
