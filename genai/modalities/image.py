"""Images, and the edge between files and tensors: the only place where the value range changes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.modalities.base import Modality, Picture, Request, to_pil
from genai.modalities.decode import DecodeOptions, decode_at_size


class Image(Modality):
    """Images (B, C, H, W) in [-1, 1], C 1 or 3."""

    field = "image"

    def preview(self, batch: Batch, columns: int | None = None) -> Picture:
        return grid(batch[self.field], columns)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """grid.png, samples.npz (uint8) and a PNG for each image."""
        written = super().write(folder, batch, names, request, columns)
        for image, name in zip(to_uint8(batch[self.field]).cpu(), names, strict=True):
            to_pil(image).save(folder / f"{name}.png")
        return written

    def read(self, path: Path, shape: Sequence[int], key: str) -> Tensor:
        """Images in [-1, 1], cropped in the middle."""
        if len(shape) != 3 or shape[0] not in (1, 3):
            return super().read(path, shape, key)
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else [path]
        if path.exists() and not (path.is_dir() or path.is_file()):  # a device or a pipe may have no end
            raise UserError(f"{key}={path} is not a file: name an image, or a folder of them")
        if not files:
            raise UserError(f"{key}={path} holds no file: name an image, or a folder of them")
        found = []
        for file in files:
            try:
                found.append(decode_at_size(file.read_bytes(), file, DecodeOptions(shape[0]), (shape[1], shape[2])))
            except (OSError, ValueError, SyntaxError) as error:  # the last is Pillow's of a broken PNG
                why = getattr(error, "strerror", None) or " ".join(str(error).split()).partition(" <_io.")[0]
                raise UserError(f"{key}={file} cannot be read as an image ({why}): name another") from error
        return from_uint8(torch.from_numpy(np.stack(found)))

    def to_file(self, x: Tensor) -> Tensor:
        return to_uint8(x)

    def quantize(self, x: Tensor, levels: int | None) -> Tensor:
        return quantize(x, levels)

    def features(self, x: Tensor) -> None:
        return None


def from_uint8(x: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 in [0, 255], rounded, clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def quantize(x: Tensor, levels: int | None) -> Tensor:
    """Images in [-1, 1] on the data's grey levels, 256 where it says none."""
    half = ((levels or 256) - 1) / 2
    return ((x.clamp(-1, 1) + 1) * half).round() / half - 1


def grid(images: Tensor, columns: int | None = None, min_side: int = 320) -> Picture:
    """Images (N, C, H, W) in [-1, 1] -> one uint8 picture (C, H', W'), enlarged so that small images can be seen."""
    n, c, h, w = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = torch.zeros(rows * columns, c, h + 1, w + 1, dtype=torch.uint8)
    cells[:n, :, :h, :w] = to_uint8(images.cpu())
    picture = cells.view(rows, columns, c, h + 1, w + 1).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 1), -1)
    picture = picture[:, :-1, :-1]
    scale = max(round(min_side / max(picture.shape[1:])), 1)
    return picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
