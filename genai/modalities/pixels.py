"""Images as tokens: a constant first id, then one id for the grey level of each pixel, row by row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.modalities.base import Modality, Picture, Request
from genai.modalities.image import Image
from genai.nn.grey_levels import from_levels, to_levels

BEGIN = 0  # id before every image; grey level k has id k + 1
MAX_SIZE = 2**16  # of height, width, channels and grey levels


class Pixels(Modality):
    """Images as tokens int64 (B, H W C), row by row with the channels of a pixel together, without the first id.

    Args:
        shape: [C, H, W] of an image.
        levels: number of grey levels; their ids are 1, ..., levels.

    Raises UserError for an invalid shape or number of levels.
    """

    field, meaning, comparison = "tokens", "pixels", None

    def __init__(self, shape: Sequence[int], levels: int):
        if not (
            isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n <= MAX_SIZE for n in shape)
        ):
            raise UserError(f"pixels have the shape {shape}, which must be [C, H, W]")
        if type(levels) is not int or not 2 <= levels <= MAX_SIZE:
            raise UserError(f"pixels have levels={levels!r}, which must be a whole number from 2 to {MAX_SIZE}")
        self.shape, self.levels, self.image = shape, levels, Image()

    def state(self) -> dict[str, Any]:
        return {"shape": self.shape, "levels": self.levels}

    def condition(self, request: Request, n: int) -> Batch:
        """Return the first id of n images, and `lead` = 1, the number of ids before an image."""
        return {"tokens": torch.full((n, 1), BEGIN), "lead": torch.ones(n, dtype=torch.int64)}

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] as ids (B, 1 + H W C) with `BEGIN` in front."""
        return torch.nn.functional.pad(to_levels(x, self.levels) + 1, (1, 0), value=BEGIN)

    def decode(self, batch: Batch) -> Batch:
        """Return `image` (B, C, H, W) in [-1, 1] of tokens (B, H W C)."""
        level = (batch["tokens"] - 1).clamp(0, self.levels - 1)
        return {self.image.field: from_levels(level, self.shape, self.levels)}

    def preview(self, batch: Batch, columns: int | None = None) -> Picture:
        return self.image.preview({**batch, **self.decode(batch)}, columns)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        return self.image.write(folder, {**batch, **self.decode(batch)}, names, request, columns)
