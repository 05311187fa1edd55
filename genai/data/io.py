"""The edge between files and tensors: the only place where the value range changes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.data.decode import Reading, resized


def from_uint8(x: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 in [0, 255], rounded, clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def rounded(x: Tensor, levels: int | None) -> Tensor:
    """Images in [-1, 1] on the data's grey levels, 256 where it says none."""
    half = ((levels or 256) - 1) / 2
    return ((x.clamp(-1, 1) + 1) * half).round() / half - 1


def grid(images: Tensor, columns: int | None = None, min_side: int = 320) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] -> one uint8 picture (C, H', W'), enlarged so that small images can be seen.

    Vectors (N, 2) become a density plot of the square [-4, 4]^2.
    """
    if images.ndim == 2:
        return density(images)
    n, c, h, w = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = torch.zeros(rows * columns, c, h + 1, w + 1, dtype=torch.uint8)
    cells[:n, :, :h, :w] = to_uint8(images.cpu())
    picture = cells.view(rows, columns, c, h + 1, w + 1).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 1), -1)
    picture = picture[:, :-1, :-1]
    scale = max(round(min_side / max(picture.shape[1:])), 1)
    return picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def density(points: Tensor, side: int = 320, extent: float = 4.0) -> Tensor:
    """Points (N, 2) -> uint8 picture (1, side, side) of how many fall where; x to the right, y up."""
    histogram, _, _ = np.histogram2d(*points.double().cpu().numpy().T, bins=80, range=[[-extent, extent]] * 2)
    picture = torch.from_numpy(histogram.T[::-1].copy()).sqrt()
    picture = (255 * picture / picture.max().clamp_min(1)).to(torch.uint8)
    return picture.repeat_interleave(side // 80, 0).repeat_interleave(side // 80, 1)[None]


def to_pil(picture: Tensor):
    """uint8 (C, H, W), C 1 or 3 -> PIL image."""
    from PIL import Image

    array = picture.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def write_samples(
    out: Path, field: str, samples: Tensor, labels: Tensor | None, seeds: Tensor, rng_version: int,
    columns: int | None = None,
) -> None:  # fmt: skip
    """grid.png, one PNG per image named by its seed, and samples.npz (uint8 images or float vectors, labels, seeds)."""
    out.mkdir(parents=True, exist_ok=True)
    to_pil(grid(samples[:400], columns)).save(out / "grid.png")
    arrays: dict[str, Any] = {"samples": to_uint8(samples) if field == "image" else samples, "seeds": seeds}
    if labels is not None:
        arrays["labels"] = labels
    np.savez(out / "samples.npz", rng_version=rng_version, **{k: v.cpu().numpy() for k, v in arrays.items()})
    if field == "image":
        for image, name in zip(to_uint8(samples).cpu(), file_names(seeds, labels), strict=True):
            to_pil(image).save(out / f"{name}.png")


def read_images(path: Path, shape: Sequence[int], key: str) -> Tensor:
    """The images of a file, or of a folder by name, as samples (N, C, H, W) of `shape` in [-1, 1], cropped in the middle.

    Raises UserError, which names `key`, for samples that are no images, and where there is none or one cannot be read.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(f"{key}= is for a model of images, and samples of this one are {list(shape)}: leave {key}= out")
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else [path]
    if not files:
        raise UserError(f"{key}={path} holds no file: name an image, or a folder of them")
    found = []
    for file in files:
        try:
            found.append(resized(file.read_bytes(), file, Reading(shape[0]), (shape[1], shape[2])))
        except (OSError, ValueError, SyntaxError) as error:  # the last is Pillow's of a broken PNG
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"{key}={file} cannot be read as an image ({why}): name another") from error
    return from_uint8(torch.from_numpy(np.stack(found)))


def write_path(out: Path, frames: Tensor, columns: int | None = None) -> None:
    """The states (N, K, *shape) of samples from noise to data: path.gif, a grid that moves, and path.png, a sample a row."""
    pictures = [to_pil(grid(states[:400], columns)) for states in frames.unbind(1)]
    durations = [*[60] * (len(pictures) - 1), 2000]  # milliseconds
    pictures[0].save(out / "path.gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    shown = torch.linspace(0, frames.shape[1] - 1, min(frames.shape[1], 12)).round().long()
    if frames.ndim == 3:  # vectors: one density plot a state
        plots = torch.cat([density(frames[:, k], 160) for k in shown], -1)
    else:
        plots = grid(frames[:10, shown].flatten(0, 1), len(shown))
    to_pil(plots).save(out / "path.png")


def file_names(seeds: Tensor, labels: Tensor | None) -> Sequence[str]:
    """seed_000007 or, with labels, seed_000007_label_3."""
    if labels is None:
        return [f"seed_{s:06d}" for s in seeds.tolist()]
    return [f"seed_{s:06d}_label_{y}" for s, y in zip(seeds.tolist(), labels.tolist(), strict=True)]
