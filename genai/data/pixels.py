"""Images as sequences of their grey levels, for models of token ids."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import checksum, of_split
from genai.data.io import grid

BEGIN = 0  # the id that stands before every image; that of grey level k is k + 1


class Pixels(Data):
    """Images row by row, the channels of a pixel one after the other: tokens int64 (B, 1 + H W C).

    A model that predicts each token from those before it, the first one given, has the images' exact likelihood.

    Args:
        images: the data, on grey levels.
        shape: [H W C], how many tokens follow the first.
        levels: ids, one more than the images have grey levels.
    """

    def __init__(
        self, images: Data, field: str, shape: Sequence[int] | None, classes: int | None, levels: int | None,
        batch_size: int, num_workers: int = 0,
    ):  # fmt: skip
        if images.levels is None or len(images.shape) != 3:
            raise UserError(f"data.images is {images.field} of shape {images.shape}: give images on grey levels")
        c, h, w = self.image_shape = images.shape
        self.images = images
        parts: dict[str, Split] = {
            name: PixelSplit(part, images.field, images.levels) for name, part in images.splits.items()
        }
        super().__init__(
            field=field, shape=shape, classes=classes, levels=levels, batch_size=batch_size, num_workers=num_workers,
            splits=parts, found_shape=[h * w * c], class_names=None, found_levels=images.levels + 1,
        )  # fmt: skip

    @property
    def values(self) -> int | None:
        return self.images.levels

    def assets(self) -> dict:
        return {**super().assets(), "pixels": {"shape": self.image_shape, "levels": self.images.levels}}

    def cond(self, n: int) -> Batch:
        """The beginning of an image, n times."""
        return {"tokens": torch.full((n, 1), BEGIN)}

    def show(self, batch: Batch) -> Tensor:
        return grid(to_images(batch["tokens"], **self.assets()["pixels"]), None)


class PixelSplit:
    """A split of images as tokens; labels are left out."""

    def __init__(self, split: Split, field: str, levels: int):
        self.split, self.field, self.levels, self.augments = split, field, levels, split.augments

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        x = self.split.batch(index, draws)[self.field]  # (B, C, H, W)
        level = ((x + 1) * (self.levels - 1) / 2).round().long()
        return {"tokens": torch.nn.functional.pad(level.movedim(1, -1).flatten(1) + 1, (1, 0), value=BEGIN)}

    def fingerprint(self, quick: bool) -> str:
        return checksum(of_split(self.split, quick), self.levels)


def to_images(tokens: Tensor, shape: Sequence[int], levels: int) -> Tensor:
    """Ids (B, H W C), without the first, to images (B, C, H, W) in [-1, 1]."""
    c, h, w = shape
    return ((tokens - 1).clamp(0, levels - 1) * (2 / (levels - 1)) - 1).view(-1, h, w, c).movedim(-1, 1)


def images_behind(data: Data, node: Any) -> tuple[Data, Any]:
    """Images that come as tokens, and their config, as images; other data as they are."""
    return (data.images, node["images"]) if isinstance(data, Pixels) else (data, node)
