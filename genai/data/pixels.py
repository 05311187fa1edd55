"""Images as sequences of grey levels, for autoregressive models of token ids."""

from collections.abc import Sequence

from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import checksum, split_checksum
from genai.modalities import pixels as modalities


class Pixels(Data):
    """Images as tokens, row by row with the channels of a pixel together: int64 (B, 1 + H W C), the first id constant.

    A model that predicts each token from those before it has the exact likelihood of the images.

    Args:
        images: a data set of images with grey levels.
        shape: [H W C], the number of tokens after the first.
        levels: number of ids, one more than the images have grey levels.
        field, classes, batch_size, num_workers: see `Data`.

    Raises UserError for images without grey levels.
    """

    def __init__(
        self,
        images: Data,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
    ):
        if images.levels is None or len(images.shape) != 3:
            raise UserError(f"data.images is {images.field} of shape {images.shape}: give images on grey levels")
        c, h, w = images.shape
        self.source, pixels = ("images", images), modalities.Pixels(images.shape, images.levels)
        self.images = images
        parts: dict[str, Split] = {name: PixelSplit(part, images.field, pixels) for name, part in images.splits.items()}
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=parts,
            found_shape=[h * w * c],
            class_names=None,
            found_levels=images.levels + 1,
            modality=pixels,
        )

    @property
    def values(self) -> int | None:
        return self.images.levels


class PixelSplit:
    """A split of images as tokens, without labels."""

    def __init__(self, split: Split, field: str, pixels: modalities.Pixels):
        self.split, self.field, self.pixels, self.augments = split, field, pixels, split.augments

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        return {"tokens": self.pixels.encode(self.split.batch(index, draws)[self.field])}

    def fingerprint(self, quick: bool) -> str:
        return checksum(split_checksum(self.split, quick), self.pixels.levels)
