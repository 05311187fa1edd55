"""The edge between files and tensors: the only place where the value range changes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def file_names(seeds: Tensor, labels: Tensor | None) -> Sequence[str]:
    """seed_000007 or, with labels, seed_000007_label_3."""
    if labels is None:
        return [f"seed_{s:06d}" for s in seeds.tolist()]
    return [f"seed_{s:06d}_label_{y}" for s, y in zip(seeds.tolist(), labels.tolist(), strict=True)]
