"""Images as the grey levels of their pixels, and a first stage that does only that."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Batch


class GreyLevels(nn.Module):
    """A first stage without training: a pixel's grey level is its token id, row by row with the channels of a pixel together.

    With factor 1 it is lossless for images on these levels, and a baseline for what learned codes gain.

    Args:
        field, shape: field of the images, and their shape (C, H, W).
        levels: number of grey levels.
        factor: a divisor of H and W; the pixels are means of squares of so many.

    Raises UserError for data of another shape or without grey levels, and for a factor that does not divide it.
    """

    def __init__(self, field: str, shape: Sequence[int], levels: int | None, factor: int = 1):
        super().__init__()
        if len(shape) != 3 or levels is None:
            raise UserError(
                f"codec.model=GreyLevels takes images on grey levels, got {field} of shape {list(shape)}: choose another data="
            )
        c, h, w = shape
        if h % factor or w % factor:
            raise UserError(f"codec.model.factor={factor} must divide {h} and {w}, the image's height and width")
        self.field, self.shape, self.vocabulary, self.factor = field, tuple(shape), levels, factor
        self.small = (c, h // factor, w // factor)
        self.latent_shape = (math.prod(self.small),)

    def encode(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) in [-1, 1] to token ids int64 (B, H W C / factor^2)."""
        return to_levels(nn.functional.avg_pool2d(x, self.factor), self.vocabulary)

    def decode(self, z: Tensor) -> Tensor:
        """Map token ids int64 (B, H W C / factor^2) to images (B, C, H, W)."""
        x = from_levels(z, self.small, self.vocabulary)
        return x.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the field, encoded and decoded."""
        return self.decode(self.encode(batch[self.field]))


def to_levels(x: Tensor, levels: int) -> Tensor:
    """Convert images (B, C, H, W) in [-1, 1] to grey levels 0, ..., levels - 1, int64 (B, H W C), channels last."""
    return ((x.movedim(1, -1).flatten(1) + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1).long()


def from_levels(level: Tensor, shape: Sequence[int], levels: int) -> Tensor:
    """Convert grey levels int64 (B, H W C) to images float32 (B, C, H, W), the inverse of `to_levels`."""
    c, h, w = shape
    return (level.float() * (2 / (levels - 1)) - 1).view(-1, h, w, c).movedim(-1, 1)
