"""Vectors: points in the plane, and any other tensors that have no better modality."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genai.core.protocols import Batch
from genai.modalities.base import Modality, Picture, Request, Shown

EXTENT = 4.0  # half the side of the square that is shown


class Vector(Modality):
    """Tensors (B, ...) of numbers as they are; those (B, 2) are shown as a density plot of the square [-4, 4]^2."""

    field = "vector"

    def preview(self, batch: Batch, columns: int | None = None) -> Shown:
        x = batch[self.field]
        return density(x) if x.shape[1:] == (2,) else super().preview(batch)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        x = batch[self.field]
        if x.shape[1:] == (2,) and (outside := (x.abs() > EXTENT).any(1).sum()):
            print(f"{outside} of {len(x)} points lie outside the picture, [-{EXTENT:g}, {EXTENT:g}]^2", file=sys.stderr)
        return super().write(folder, batch, names, request, columns)

    def strip(self, frames: Tensor) -> Picture:
        return torch.cat([density(frames[:, k], 160) for k in range(frames.shape[1])], -1)


def density(points: Tensor, side: int = 320, extent: float = EXTENT) -> Tensor:
    """Points (N, 2) -> uint8 picture (1, side, side) of how many fall where; x to the right, y up."""
    histogram, _, _ = np.histogram2d(*points.double().cpu().numpy().T, bins=80, range=[[-extent, extent]] * 2)
    picture = torch.from_numpy(histogram.T[::-1].copy()).sqrt()
    picture = (255 * picture / picture.max().clamp_min(1)).to(torch.uint8)
    return picture.repeat_interleave(side // 80, 0).repeat_interleave(side // 80, 1)[None]
