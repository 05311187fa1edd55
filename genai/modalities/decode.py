"""Decode image files to upright 8-bit pixels, with no more work and memory than the wanted size needs."""

import contextlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from genai.core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# A large image that unpacks to over 200 times its file is refused as a decompression bomb: no photograph compresses so well.
BOMB_PIXELS, BOMB_RATIO = 10_000_000, 200
MAX_PIXELS = 2**28  # pixels of one image that are decoded, 0.8 GB in RGB
ORIENTATION = 0x0112  # EXIF tag of the camera's orientation; values 5 to 8 swap height and width
GAP = 2.0  # a JPEG is decoded to at least this times the wanted size, so that the resize filter determines the pixels


class DecodeOptions(NamedTuple):
    """The settings by which an image file is converted to 8-bit pixels.

    Attributes:
        channels: 1 or 3.
        value_range: values that become black and white in files of more than 8 bits; None takes the upper 8 of 16 bits.
        background: RGB colour behind transparent pixels; None takes the colour that is stored under them.
        draft: decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is enough, ten times as fast.
    """

    channels: int
    value_range: tuple[float, float] | None = None
    background: tuple[int, int, int] | None = None
    draft: bool = False


@contextlib.contextmanager
def open_image(file: IO[bytes], where: Path | str, size: int, large: bool = True) -> Iterator["Image"]:
    """Open an image file of `size` bytes with Pillow, without decoding its pixels; `large` lifts Pillow's own size limit.

    Raises UserError for a decompression bomb, ValueError for an image of more than `MAX_PIXELS` pixels.
    """
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if large else limit  # large scans are legitimate; check_pixels refuses bombs
    try:
        image = Image.open(file)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    with image:
        check_pixels(image, where, size)
        yield image


def check_pixels(image: "Image", where: Path | str, size: int) -> None:
    """Raise the errors of `open_image` for an image of too many pixels."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"has {image.width} x {image.height} pixels, and at most {MAX_PIXELS:,} are decoded")
    if pixels > BOMB_PIXELS and pixels * len(image.getbands()) > BOMB_RATIO * size:
        raise UserError(
            f"{where} has {image.width} x {image.height} pixels in a file of {size:,} bytes, which no photograph has: "
            "delete or replace it, or change data.root"
        )


def is_sideways(image: "Image") -> bool:
    """Tell whether the EXIF orientation swaps height and width."""
    return "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5


def is_deep(image: "Image") -> bool:
    """Tell whether an image has more than 8 bits per channel."""
    return image.mode.startswith(("I", "F")) or is_deep_colour(image)


def is_deep_colour(image: "Image") -> bool:
    """Tell whether an image has several channels of 16 bits, of which Pillow reads the upper 8; call it before decoding."""
    return len(image.getbands()) > 1 and any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))


def is_transparent(image: "Image") -> bool:
    """Tell whether an image has an alpha channel or a transparent colour."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (
        "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    )


def extremes(image: "Image") -> tuple[float, float]:
    """Return the least and the largest finite value of an image of more than 8 bits, in the units of its file."""
    unit = 257 if is_deep_colour(image) else 1
    x = np.asarray(image.convert("RGB") if unit > 1 else image)
    x = x[np.isfinite(x)] if x.dtype.kind == "f" else x
    return (float(x.min()) * unit, float(x.max()) * unit) if x.size else (0.0, 0.0)


def decode(
    content: bytes, where: Path | str, reading: DecodeOptions, size: tuple[int, int], crop: bool
) -> tuple["Image", tuple[int, int]]:
    """Decode an image file's bytes; returns an upright Pillow image (L or RGB) and the image's full size (W, H).

    The image is meant to be resized to `size` (H, W), as a whole or as its largest crop of that aspect ratio; a JPEG may be
    decoded at a fraction of its full size for that.

    Raises UserError for a decompression bomb, and any error of Pillow for a damaged file.
    """
    from PIL import Image, ImageOps

    with open_image(BytesIO(content), where, len(content)) as image:
        w, h = (image.height, image.width) if is_sideways(image) else image.size
        if reading.draft:
            box = crop_box(w, h, size[1] / size[0], 0, 0) if crop else (0, 0, w, h)
            _reduce(image, reading.channels, min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]))
        deep_colour, transparent = is_deep_colour(image), is_transparent(image)  # decoding loses this information
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # Pillow would clip these values to 8 bits
            image = Image.fromarray(_eight_bits(np.asarray(image), reading.value_range))
        elif deep_colour and reading.value_range is not None:
            table = _eight_bits(257 * np.arange(256), reading.value_range).tolist()
            image = image.point([i for band in image.getbands() for i in (range(256) if band == "A" else table)])
        if transparent and reading.background is not None:
            image = _composite(image, reading.background)
        return image.convert("L" if reading.channels == 1 else "RGB"), (w, h)


def decode_at_size(
    content: bytes,
    where: Path | str,
    reading: DecodeOptions,
    size: tuple[int, int],
    crop: bool = True,
    u: float = 0.5,
    v: float = 0.5,
) -> np.ndarray:
    """Decode an image file's bytes to uint8 (C, H, W) of `size` (H, W).

    The crop is at fraction u of the horizontal and v of the vertical slack; without `crop` the whole image is resized. Raises
    the errors of `decode`.
    """
    from PIL import Image

    height, width = size
    image, (w, h) = decode(content, where, reading, size, crop)
    box = None
    if crop:  # in the coordinates of the decoded image, which may be a fraction of the full size
        left, top, right, bottom = crop_box(w, h, width / height, u, v)
        x, y = image.width / w, image.height / h
        box = left * x, top * y, right * x, bottom * y
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))
    return pixels[None] if reading.channels == 1 else pixels.transpose(2, 0, 1)


def _eight_bits(x: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Convert values in a range to uint8, rounded and clipped; without a range take the upper 8 of 16 bits."""
    if value_range is None:
        if x.dtype.kind == "f":
            raise ValueError("its pixels are floating point numbers, and data.value_range is not set")
        return (x >> 8).astype(np.uint8)
    low, high = value_range
    scaled = (np.nan_to_num(x.astype(np.float64), nan=low) - low) / (high - low) * 255
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _composite(image: "Image", background: tuple[int, int, int]) -> "Image":
    """Lay an image with transparency on a colour; returns RGB."""
    from PIL import Image

    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


def _reduce(image: "Image", channels: int, scale: float) -> None:
    """Make Pillow decode a JPEG, to be reduced by `scale`, at the smallest of its sizes that is GAP times the wanted one."""
    if scale >= 2 * GAP:
        image.draft("L" if channels == 1 else None, (int(image.width * GAP / scale), int(image.height * GAP / scale)))


def crop_box(w: int, h: int, ratio: float, u: float, v: float) -> tuple[int, int, int, int]:
    """Return the largest box (left, top, right, bottom) of width / height = `ratio` in w x h, at fractions u, v of its slack."""
    cw, ch = max(min(w, round(h * ratio)), 1), max(min(h, round(w / ratio)), 1)
    left, top = min(int(u * (w - cw + 1)), w - cw), min(int(v * (h - ch + 1)), h - ch)
    return left, top, left + cw, top + ch
