"""An image as tokens: an id that begins it, then one for each grey level, row by row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.modalities.base import Modality, Picture, Request
from genai.modalities.image import Image

BEGIN = 0  # the id that stands before every image; that of grey level k is k + 1
MOST = 2**16  # of a side, of channels, and of grey levels


class Pixels(Modality):
    """Images row by row, the channels of a pixel one after the other: tokens int64 (B, H W C), the first id left out.

    Args:
        shape: [C, H, W] of an image.
        levels: grey levels, ids 1, ..., levels.

    Raises UserError for what no image has.
    """

    field, meaning, comparison = "tokens", "pixels", None

    def __init__(self, shape: Sequence[int], levels: int):
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n <= MOST for n in shape)):
            raise UserError(f"pixels have the shape {shape}, and an image has [C, H, W]")
        if type(levels) is not int or not 2 <= levels <= MOST:
            raise UserError(f"pixels have levels={levels!r}, which must be a whole number from 2 to {MOST}")
        self.shape, self.levels, self.image = shape, levels, Image()

    def state(self) -> dict[str, Any]:
        return {"shape": self.shape, "levels": self.levels}

    def condition(self, request: Request, n: int) -> Batch:
        """The beginning of an image, n times."""
        return {"tokens": torch.full((n, 1), BEGIN), "lead": torch.ones(n, dtype=torch.int64)}

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> ids (B, 1 + H W C), `BEGIN` before them."""
        return torch.nn.functional.pad(to_levels(x, self.levels) + 1, (1, 0), value=BEGIN)

    def decode(self, batch: Batch) -> Batch:
        """`image` (B, C, H, W) in [-1, 1] of ids (B, H W C)."""
        level = (batch["tokens"] - 1).clamp(0, self.levels - 1)
        return {self.image.field: from_levels(level, self.shape, self.levels)}

    def preview(self, batch: Batch, columns: int | None = None) -> Picture:
        return self.image.preview({**batch, **self.decode(batch)}, columns)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        return self.image.write(folder, {**batch, **self.decode(batch)}, names, request, columns)


def to_levels(x: Tensor, levels: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> grey levels 0, ..., levels - 1, int64 (B, H W C), the channels of a pixel together."""
    return ((x.movedim(1, -1).flatten(1) + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1).long()


def from_levels(level: Tensor, shape: Sequence[int], levels: int) -> Tensor:
    """The inverse of `to_levels`, float32 (B, C, H, W)."""
    c, h, w = shape
    return (level.float() * (2 / (levels - 1)) - 1).view(-1, h, w, c).movedim(-1, 1)
