"""Image files in a folder, or in a zip of it, one subfolder per class; decoded when asked for."""

import os
import sys
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data.base import Data, Split, held_out
from genai.data.fingerprint import checksum, of_files
from genai.data.io import from_uint8

SPLITS = "train", "val", "test"
CROPS = "center", "random", "none"
GREY = "1", "L", "LA", "La", "I", "I;16", "I;16B", "F"  # Pillow's modes without colour
FLAT_PIXELS, FLAT = (
    10_000_000,
    200,
)  # of an image whose pixels' bytes are over 200 times its file's: no picture compresses so
UNPACKED_BYTES, RATIO = 2**25, 100  # of a zip's member that unpacks to over 100 times its size: no file of images does
ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held; 5 to 8 swap height and width


class ImageFolder(Data):
    """The images below `root`, sorted by name; subfolders are the classes, and without any there are no labels.

    Folders train, val and test are the splits. A split without a folder is 1/12 of the training images, test cut first,
    then validation from what remains. Validation and test are in a fixed random order, as only their first items may
    be looked at.

    Args:
        root: folder or .zip; single folders on the way to the classes or splits are descended.
        size: [H, W] that images are brought to; None requires all to be of one size and takes that.
        channels: 1 or 3; None is 1 if all images are greyscale, else 3. Transparency is dropped.
        crop: center or random resize the largest part with the proportions of `size` (random in training only); none
            resizes the whole, squeezed.
        flip: mirror training images left to right with probability 1/2.
    """

    def __init__(
        self, root: str, size: Sequence[int] | None, channels: int | None, crop: str, flip: bool, field: str,
        shape: Sequence[int] | None, classes: int | None, levels: int | None, batch_size: int, num_workers: int = 0,
    ):  # fmt: skip
        check_size(size)
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels={channels} is none of 1, 3, null")
        if crop not in CROPS:
            raise UserError(f"data.crop={crop!r} is none of {', '.join(CROPS)}")
        if crop == "random" and size is None:
            raise UserError("data.crop=random needs a size to crop to: set data.size=[height,width]")
        files = Files(root)
        headers = scan(files)
        height, width = common_size(headers) if size is None else size
        channels = channels or (1 if all(h.grey for h in headers) else 3)
        labels, class_names, parts = arrange(root, [h.name for h in headers])
        names = np.array([h.name for h in headers])
        splits: dict[str, Split] = {}
        for key, i in parts.items():
            how = (crop, flip) if key == "train" else ("none" if crop == "none" else "center", False)
            own = None if labels is None else labels[i]
            splits[key] = Images(field, files, names[i], own, [channels, height, width], *how)
        super().__init__(
            field=field, shape=shape, classes=classes, levels=levels, batch_size=batch_size, num_workers=num_workers,
            splits=splits, found_shape=[channels, height, width], class_names=class_names, found_levels=256,
        )  # fmt: skip


class Files:
    """The files below a folder, or inside a zip of it, by their relative path."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.zips: dict[int, zipfile.ZipFile] = {}  # by process, for two cannot share one file position

    def __getstate__(self) -> dict:
        return {"root": self.root, "zips": {}}

    def names(self) -> list[str]:
        """Sorted, without hidden ones. Raises UserError if there is no such folder or zip."""
        if self.root.is_dir():
            walk = [(Path(at).relative_to(self.root), names) for at, _, names in os.walk(self.root, followlinks=True)]
            found = [(at / name).as_posix() for at, names in walk for name in names]
        elif zipfile.is_zipfile(self.root):
            found = [info.filename for info in self._zip().infolist() if not info.is_dir()]
        else:
            raise UserError(
                f"data.root={str(self.root)!r} is neither a folder nor an intact zip file: set data.root to one with images"
            )
        return sorted(n for n in found if not any(part.startswith((".", "__MACOSX")) for part in n.split("/")))

    def open(self, name: str) -> IO[bytes]:
        """Raises UserError for a zip's member that unpacks to far more than images do."""
        if self.root.is_dir():
            return (self.root / name).open("rb")
        info = self._zip().getinfo(name)
        if info.file_size > max(UNPACKED_BYTES, RATIO * info.compress_size):
            raise UserError(
                f"{self.root / name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, as no image does: take it "
                "out of the zip, or change data.root"
            )
        return self._zip().open(name)

    def bytes_of(self, name: str) -> int:
        """How large a file is, unpacked."""
        return (self.root / name).stat().st_size if self.root.is_dir() else self._zip().getinfo(name).file_size

    def fingerprint(self, names: Sequence[str], quick: bool) -> str:
        """Checksum of files in order: of their contents, or if `quick` of their names, without folders, and sizes."""
        if self.root.is_dir() and not quick:
            return of_files(self.root, names)
        if self.root.is_dir():
            return checksum([(name.rpartition("/")[2], os.stat(self.root / name).st_size) for name in names])
        infos = [self._zip().getinfo(name) for name in names]
        what = [(i.filename.rpartition("/")[2], i.file_size) if quick else (i.file_size, i.CRC) for i in infos]
        return checksum(what)

    def _zip(self) -> zipfile.ZipFile:
        pid = os.getpid()
        if pid not in self.zips:
            self.zips[pid] = zipfile.ZipFile(self.root)
        return self.zips[pid]


class Images:
    """A split of image files; `shape` is (C, H, W), labels int64 (N,) or None, `crop` and `flip` as in ImageFolder."""

    def __init__(
        self, field: str, files: Files, names: Sequence[str] | np.ndarray, labels: np.ndarray | None,
        shape: Sequence[int], crop: str, flip: bool,
    ):  # fmt: skip
        self.field, self.files, self.shape, self.crop, self.flip = field, files, shape, crop, flip
        self.names = np.asarray(names)
        self.augments = flip or crop == "random"
        self.labels = None if labels is None else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Items `index` (B,); draws (B, 4): flip, horizontal and vertical place of the crop, one unused."""
        centre = [(0.5, 0.5)] * len(index)
        places = centre if draws is None or self.crop != "random" else draws[:, 1:3].tolist()
        arrays = [self.pixels(str(self.names[i]), *place) for i, place in zip(index.tolist(), places, strict=True)]
        x = from_uint8(torch.from_numpy(np.stack(arrays)))  # (B, C, H, W)
        if self.flip and draws is not None:
            x = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
        return {self.field: x} if self.labels is None else {self.field: x, "label": self.labels[index]}

    def fingerprint(self, quick: bool) -> str:
        files = self.files.fingerprint(self.names.tolist(), quick)
        return checksum(files, list(self.shape), self.crop, self.labels)

    def pixels(self, name: str, u: float, v: float) -> np.ndarray:
        """uint8 (C, H, W) of one file, cropped at fraction u of the horizontal and v of the vertical leeway."""
        from PIL import Image

        channels, height, width = self.shape
        image = decode(self.files, name, channels)
        box = None if self.crop == "none" else crop_box(image.width, image.height, width / height, u, v)
        resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))
        return resized[None] if channels == 1 else resized.transpose(2, 0, 1)


def crop_box(w: int, h: int, ratio: float, u: float, v: float) -> tuple[int, int, int, int]:
    """The largest box (left, top, right, bottom) of width / height = ratio in w x h, at fractions u, v of its leeway."""
    cw, ch = max(min(w, round(h * ratio)), 1), max(min(h, round(w / ratio)), 1)
    left, top = min(int(u * (w - cw + 1)), w - cw), min(int(v * (h - ch + 1)), h - ch)
    return left, top, left + cw, top + ch


def decode(files: Files, name: str, channels: int):
    """One file as an upright 8-bit Pillow image, L for 1 channel, RGB for 3. Raises UserError that names the file."""
    from PIL import Image, ImageOps

    try:
        with files.open(name) as file, Image.open(BytesIO(file.read())) as image:
            check_pixels(files, name, image)
            if "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("its pixels are floating point numbers")
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("L" if channels == 1 else "RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow raises almost anything on a broken file
        raise UserError(
            f"{files.root / name} cannot be decoded ({error}): delete or replace it, or change data.root"
        ) from error


def check_pixels(files: Files, name: str, image: Any) -> None:
    """Raises UserError for an image that would unpack to far more bytes than pictures of its file's size do."""
    pixels, size = image.width * image.height, files.bytes_of(name)
    if pixels > FLAT_PIXELS and pixels * len(image.getbands()) > FLAT * size:
        raise UserError(
            f"{files.root / name} has {image.width} x {image.height} pixels in a file of {size:,} bytes, as no picture does: "
            "delete or replace it, or change data.root"
        )


class Header(NamedTuple):
    name: str
    size: tuple[int, int]  # (H, W), upright
    grey: bool


def scan(files: Files) -> list[Header]:
    """The header of every image; files that are none are skipped with one line on stderr.

    Raises UserError if there are no images or if more than 1 % of the files are none.
    """
    from PIL import Image

    found: list[Header] = []
    skipped: list[str] = []
    for name in files.names():
        if name.endswith(".jsonl"):
            continue  # captions
        try:
            with files.open(name) as file, Image.open(file) as image:
                check_pixels(files, name, image)
                sideways = "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5
                size = image.size if sideways else (image.height, image.width)
                found.append(Header(name, size, image.mode in GREY))
        except UserError:
            raise
        except Exception:  # as in decode
            skipped.append(name)
    total, root = len(found) + len(skipped), str(files.root)
    if 100 * len(skipped) > total:
        raise UserError(
            f"{len(skipped)} of the {total} files in data.root={root!r} are no images, which is more than 1 % "
            f"({', '.join(skipped[:3])}{', ...' if len(skipped) > 3 else ''}): remove them or change data.root"
        )
    if not found:
        raise UserError(f"data.root={root!r} holds no images: set data.root to a folder, or a zip of one, that does")
    if skipped:
        print(f"skipped {len(skipped)} of {total} files in {root} that are no images: {skipped[0]}", file=sys.stderr)
    return found


def check_size(size: Sequence[int] | None) -> None:
    """Raises UserError unless size is None or two whole numbers."""
    if size is None:
        return
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise UserError(f"data.size={size} must be [height,width] or null")
    for side in size:
        at_least(side, 1, "each of data.size")


def common_size(headers: Sequence[Header]) -> tuple[int, int]:
    """(H, W) of all images. Raises UserError that names the first one that deviates from the first."""
    first = headers[0]
    for other in headers:
        if other.size != first.size:
            raise UserError(
                f"{other.name} is {other.size[0]}x{other.size[1]} (height x width), but {first.name} is "
                f"{first.size[0]}x{first.size[1]}: set data.size=[height,width] to bring all images to one size"
            )
    return first.size


def arrange(root: str, names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None, dict[str, np.ndarray]]:
    """Labels int64 (N,) and class names, both None if there are less than two classes, and the items of each split.

    Raises UserError if the folders make no sense.
    """
    paths = [name.split("/") for name in names]
    while len({p[0] for p in paths}) == 1 and len(paths[0]) > 1 and paths[0][0] not in SPLITS:
        paths = [p[1:] for p in paths]
    parts = {"train": np.arange(len(paths))}
    if any(len(p) > 1 and p[0] in SPLITS for p in paths):
        beside = [name for name, p in zip(names, paths, strict=True) if len(p) == 1 or p[0] not in SPLITS]
        if beside or not any(p[0] == "train" for p in paths):
            found = f"also {beside[0]}" if beside else "no train"
            raise UserError(
                f"data.root={root!r} has folders named {', '.join(SPLITS)}, but {found}: there must be train, and "
                "every image must be in one of the three"
            )
        parts = {key: np.array([i for i, p in enumerate(paths) if p[0] == key], int) for key in SPLITS}
        paths = [p[1:] for p in paths]
    folders: Any = np.array([p[0] if len(p) > 1 else "" for p in paths])
    class_names = np.unique(folders[parts["train"]]).tolist()
    for items in parts.values():
        wrong = [
            names[int(i)] for i in items if folders[i] not in class_names or (folders[i] == "" and len(class_names) > 1)
        ]
        if wrong:
            raise UserError(
                f"data.root={root!r}: {wrong[0]} is in none of the class folders of training "
                f"({', '.join(filter(None, class_names)) or 'there are none'}): move it, or change data.root"
            )
    parts = cut(root, parts)
    if len(class_names) < 2:
        return None, None, parts
    return np.searchsorted(class_names, folders).astype(np.int64), class_names, parts


def cut(root: str, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Items of train, val and test; what is missing is cut from train, what is there is put in a fixed random order."""
    parts = {key: items for key, items in parts.items() if len(items)}
    for key in ("test", "val"):
        if key in parts:
            parts[key] = np.random.default_rng(0).permutation(parts[key])
            continue
        kept, out = held_out(len(parts["train"]), 1 / 12)
        if not len(kept):
            raise UserError(
                f"data.root={root!r} holds too few images to set some aside for validation and test: add images"
            )
        parts[key], parts["train"] = parts["train"][out], parts["train"][kept]
    return parts
