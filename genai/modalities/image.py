"""Images: tensors in [-1, 1], converted from and to uint8 only here."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.modalities.base import Modality, Picture, Request, as_path, check_values, to_pil
from genai.modalities.decode import DecodeOptions, decode_at_size


class Image(Modality):
    """Images (B, C, H, W) in [-1, 1], C 1 or 3."""

    field = "image"

    def preview(self, batch: Batch, columns: int | None = None) -> Picture:
        """Return samples in a grid, with columns for each class if the labels are periodic.

        Rows of items of the data, which `original`, bool (B,), of the batch names, are marked as such.
        """
        images, original = batch[self.field], batch.get("original")
        if columns is None and original is not None:
            columns = int(original.long().argmin()) or None  # as long as the first row of originals
        if columns is None:
            columns = near_square(len(images), images.shape[-2], images.shape[-1], period(batch.get("label")))
        return grid(images, columns, original=original)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write grid.png, samples.npz (uint8) and a PNG for each image."""
        written = super().write(folder, batch, names, request, columns)
        for image, name in zip(to_uint8(batch[self.field]).cpu(), names, strict=True):
            to_pil(image).save(folder / f"{name}.png")
        return [f"{names[0]}.png", *written]

    def read(self, path: Path, shape: Sequence[int], key: str) -> Tensor:
        """Read images as (N, C, H, W) in [-1, 1], center-cropped to the shape [C, H, W]."""
        if len(shape) != 3 or shape[0] not in (1, 3):
            return super().read(path, shape, key)
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else [path]
        if path.exists() and not (path.is_dir() or path.is_file()):  # a device or a pipe may have no end
            raise UserError(f"{key}={path} is not a file: name an image, or a folder of them")
        if not files:
            raise UserError(f"{key}={path} contains no file: name an image, or a folder of them")
        found = []
        for file in files:
            try:
                found.append(decode_at_size(file.read_bytes(), file, DecodeOptions(shape[0]), (shape[1], shape[2])))
            except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
                why = getattr(error, "strerror", None) or " ".join(str(error).split()).partition(" <_io.")[0]
                raise UserError(f"{key}={file} cannot be read as an image ({why}): name another") from error
        return from_uint8(torch.from_numpy(np.stack(found)))

    def read_mask(self, mask: Any, shape: Sequence[int]) -> Tensor:
        """Read an image, white where samples are filled in, as (1, 1, H, W) in [0, 1]."""
        path = as_path(mask, "mask")
        if path.is_dir():
            raise UserError(f"mask must be one image, got the folder {mask}: name a file in it with mask=")
        return (self.read(path, [1, *shape[1:]], "mask")[:1] + 1) / 2

    def check(self, x: Tensor, key: str) -> None:
        """Raise UserError unless x are images (n, C, H, W) of floats in [-1, 1]."""
        if x.ndim != 4 or not x.is_floating_point():
            raise UserError(f"{key} must be floats (n, C, H, W) in [-1, 1], got {x.dtype} {list(x.shape)}: convert it")
        check_values(x, key, -1, 1)

    def to_file(self, x: Tensor) -> Tensor:
        return to_uint8(x)

    def quantize(self, x: Tensor, levels: int | None) -> Tensor:
        return quantize(x, levels)

    def features(self, x: Tensor) -> None:
        return None


def from_uint8(x: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8 in [0, 255], rounded and clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def quantize(x: Tensor, levels: int | None) -> Tensor:
    """Round images in [-1, 1] to `levels` grey levels, 256 if None."""
    half = ((levels or 256) - 1) / 2
    return ((x.clamp(-1, 1) + 1) * half).round() / half - 1


def period(labels: Tensor | None) -> int:
    """Return the period of labels (N,), at most 20; 1 if they are not periodic."""
    count = 0 if labels is None else len(labels.unique())
    if labels is None or not 1 < count <= 20:
        return 1
    return count if torch.equal(labels, labels[:count].repeat(-(-len(labels) // count))[: len(labels)]) else 1


def near_square(n: int, height: int, width: int, multiple: int = 1) -> int:
    """Return the number of columns of a nearly square grid of n images, a multiple of `multiple` if that leaves two rows."""
    columns = math.sqrt(n * height / width)
    if multiple >= n:
        multiple = 1
    return max(1, min(n, math.ceil(columns))) if multiple == 1 else multiple * max(1, round(columns / multiple))


def grid(images: Tensor, columns: int | None = None, min_side: int = 320, original: Tensor | None = None) -> Picture:
    """Arrange images (N, C, H, W) in [-1, 1] in one picture, uint8 (C, H', W'), enlarged to about `min_side` pixels.

    Args:
        columns: images in a row; None makes the picture nearly square.
        original: bool (N,), which images are items of the data; their rows are labelled so.
    """
    n, c, h, w = images.shape
    columns = columns or near_square(n, h, w)
    rows = -(-n // columns)
    cells = torch.zeros(rows * columns, c, h + 1, w + 1, dtype=torch.uint8)
    cells[:n, :, :h, :w] = to_uint8(images.cpu())
    picture = cells.view(rows, columns, c, h + 1, w + 1).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 1), -1)
    picture = picture[:, :-1, :-1]
    scale = max(round(min_side / max(picture.shape[1:])), 1)
    picture = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if original is None:
        return picture
    kinds = [set(row.tolist()) for row in original.cpu().split(columns)]
    names = ["original" if kind == {True} else "model" if kind == {False} else "" for kind in kinds]
    return torch.cat([_margin(names, picture.shape[1], scale * (h + 1), c), picture], 2)


def _margin(names: Sequence[str], height: int, row: int, channels: int) -> Picture:
    """Return a strip (C, height, W) that names the rows of a grid, each `row` pixels high."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default()
    width = math.ceil(max(font.getlength(name) for name in names)) + 8
    strip = Pillow.new("L", (width, height))
    for i, name in enumerate(names):
        ImageDraw.Draw(strip).text((4, i * row + row // 2), name, fill=255, font=font, anchor="lm")
    return torch.from_numpy(np.array(strip)).expand(channels, -1, -1)
