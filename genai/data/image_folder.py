"""Data sets of image files in a folder or zip, with one subfolder per class; images are decoded when they are needed."""

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.files import Files, copies, describe_copies, print_summary
from genai.data.fingerprint import checksum
from genai.data.scan import GREY_MODES, Facts, Scan, is_read_error, reason
from genai.data.splits import arrange
from genai.modalities.decode import DecodeOptions, decode_at_size
from genai.modalities.image import from_uint8

CROPS = "center", "random", "none"


class ImageFolder(Data):
    """The images below a folder, sorted by name; its subfolders are the classes, without any there are no labels.

    Folders named train, val and test, or usual variants, are the splits (see `genai.data.splits`). A split without a folder is
    1/12 of the training images, stratified by class: test is taken first, then validation from the rest. Validation and test are
    in a fixed random order. A summary on stderr tells what was found and what was not used.

    Args:
        root: folder or .zip; a folder that contains only one folder is replaced by that.
        size: [H, W] to resize images to; None takes their own size, which must then be the same for all.
        channels: 1 or 3; None is 1 if all images are greyscale, else 3.
        crop: center and random resize the largest crop with the aspect ratio of `size` (random in training only); none resizes
            the whole image, whatever its aspect ratio.
        flip: mirror training images left to right with probability 1/2.
        value_range: [black, white] for images of more than 8 bits; None takes the range of their values, see
            `Scan.measure`.
        background: a colour behind transparent pixels, such as white or "#808080"; None takes the colour stored under them.
        version: of the rules above. Configs of older runs have none, which means 1: split folders only by exact name, random
            instead of stratified splits, the upper 8 of 16 bits, links followed everywhere, JPEGs decoded at full size.
        field, shape, classes, levels, batch_size, num_workers: see `Data`.

    Raises UserError if there are no images, they cannot be brought to one size, or the folders are contradictory.
    """

    def __init__(
        self,
        root: str,
        size: Sequence[int] | None,
        channels: int | None,
        crop: str,
        flip: bool,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
        value_range: Sequence[float] | None = None,
        background: str | None = None,
        version: int = 1,
    ):
        check_size(size)
        if channels not in (None, 1, 3):
            raise UserError(f"data.channels={channels} must be one of 1, 3, null")
        if crop not in CROPS:
            raise UserError(f"data.crop={crop!r} must be one of {', '.join(CROPS)}")
        if crop == "random" and size is None:
            raise UserError("data.crop=random needs a size to crop to: set data.size=[height,width]")
        under = None if background is None else parse_colour(background)
        files = Files(root, at_least(version, 1, "data.version", most=2))
        scan = Scan(files)
        between = value_limits(value_range, scan) if value_range is not None or version > 1 else None
        found = scan.found
        height, width = common_size(found) if size is None else size
        channels = channels or (1 if all(f.mode in GREY_MODES for f in found.values()) else 3)
        names = np.array([*found])
        labels, class_names, parts, notes = arrange(root, [*found], version)
        reading = DecodeOptions(channels, between, under, draft=version > 1)
        splits: dict[str, Split] = {}
        for key, i in parts.items():
            how = (crop, flip) if key == "train" else ("none" if crop == "none" else "center", False)
            own = None if labels is None else labels[i]
            splits[key] = Images(field, files, names[i], own, [channels, height, width], *how, reading)
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=splits,
            found_shape=[channels, height, width],
            class_names=class_names,
            found_levels=256,
        )
        used = sorted({*range(len(class_names or []))} if version == 1 or labels is None else {*labels[parts["train"]]})
        self.train_labels = torch.tensor(used, dtype=torch.int64)
        if version > 1:
            notes += describe_reading(
                scan, between, value_range is None, background, {k: names[i].tolist() for k, i in parts.items()}
            )
        if version > 1 or files.skipped:
            print_summary(files, parts, class_names, notes)
        scan.keep()

    def cond(self, n: int) -> Batch | None:
        """Return n labels, the classes in turn, without classes that have no training image; None without classes."""
        return None if self.classes is None else {"label": self.train_labels[torch.arange(n) % len(self.train_labels)]}


class Images:
    """A split of image files; `shape` is [C, H, W], labels int64 (N,) or None, `crop` and `flip` as in ImageFolder.

    A file that turns out to be damaged is replaced by the next readable one, so that batches do not depend on the order of
    access.
    """

    def __init__(
        self,
        field: str,
        files: Files,
        names: Sequence[str] | np.ndarray,
        labels: np.ndarray | None,
        shape: Sequence[int],
        crop: str,
        flip: bool,
        reading: DecodeOptions | None = None,
    ):
        self.field, self.files, self.shape, self.crop, self.flip = field, files, shape, crop, flip
        self.reading = reading or DecodeOptions(shape[0])
        self.names = np.asarray(names)
        self.augments = flip or crop == "random"
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the items `index` (B,); draws (B, 4): flip, horizontal and vertical position of the crop, unused."""
        centre = [(0.5, 0.5)] * len(index)
        places = centre if draws is None or self.crop != "random" else draws[:, 1:3].tolist()
        arrays = [self.next_readable(i, *place) for i, place in zip(index.tolist(), places, strict=True)]
        x = from_uint8(torch.from_numpy(np.stack(arrays)))  # (B, C, H, W)
        if self.flip and draws is not None:
            x = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
        return (
            {self.field: x}
            if self.labels is None
            else {self.field: x, "label": self.labels[self.replace_damaged(index)]}
        )

    def replace_damaged(self, index: Tensor) -> Tensor:
        """Return the items `index` (B,) with each one known to be damaged replaced by the item that stands in for it."""
        if not self.damaged:
            return index
        return torch.tensor([self._after(i) for i in index.tolist()], dtype=torch.int64)

    def next_readable(self, i: int, u: float, v: float) -> np.ndarray:
        """Decode item i, or the first one after it that can be decoded; returns uint8 (C, H, W).

        Raises UserError if too many files are damaged, see `Files.check`, or if the system cannot read a file.
        """
        while True:
            name = str(self.names[i := self._after(i)])
            try:
                return self.pixels(name, u, v)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # Pillow raises almost any exception on a broken file
                if is_read_error(error) or len(self.damaged) + 1 == len(self):
                    raise UserError(
                        f"{self.files.root / name} {reason(error)}: bring it back or replace it, or change data.root"
                    ) from error
                self.files.skip(name, reason(error), max(self.files.total, len(self)))
                self.damaged.add(i)
                print(
                    f"skipped {self.files.root / name}: it {reason(error)}; the next image replaces it",
                    file=sys.stderr,
                )

    def _after(self, i: int) -> int:
        """Return the first item from i on that is not known to be damaged."""
        while i in self.damaged:
            i = (i + 1) % len(self)
        return i

    def fingerprint(self, quick: bool) -> str:
        files = self.files.fingerprint(self.names.tolist(), quick)
        # Default options are left out, so that data of older runs keep their checksum.
        reading = [] if self.reading == DecodeOptions(self.shape[0]) else [self.reading]
        return checksum(files, list(self.shape), self.crop, self.labels, *reading)

    def pixels(self, name: str, u: float, v: float) -> np.ndarray:
        """Decode one file to uint8 (C, H, W), cropped at fraction u of the horizontal and v of the vertical slack."""
        _, *size = self.shape
        crop = self.crop != "none"
        return decode_at_size(
            self.files.read(name), self.files.root / name, self.reading, (size[0], size[1]), crop, u, v
        )


def value_limits(value_range: Sequence[float] | None, scan: Scan) -> tuple[float, float] | None:
    """Return the values of images of more than 8 bits that become black and white; None without such images.

    Raises UserError for a value_range that is not two ascending numbers, or without such images.
    """
    if value_range is None:
        return scan.measure()
    if isinstance(value_range, str) or not isinstance(value_range, Sequence) or len(value_range) != 2:
        raise UserError(f"data.value_range={value_range} must be [black,white] or null")
    low, high = (number(value, "each of data.value_range", -1e9, 1e9) for value in value_range)
    if low >= high:
        raise UserError(f"data.value_range={list(value_range)} must be a smaller and a larger number")
    if not any(facts.deep for facts in scan.found.values()):
        raise UserError(
            f"data.value_range={list(value_range)} is for images of more than 8 bits, and there are none here: set it to null"
        )
    return low, high


def parse_colour(name: str) -> tuple[int, int, int]:
    """Return the RGB values of a colour's name. Raises UserError for an unknown name."""
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except (ValueError, AttributeError, TypeError):
        raise UserError(
            f"data.background={name} is not a colour: give one like white, black or '#808080', or null"
        ) from None
    return red, green, blue


def describe_reading(
    scan: Scan,
    between: tuple[float, float] | None,
    measured: bool,
    background: str | None,
    splits: Mapping[str, Sequence[str]],
) -> list[str]:
    """Describe how images are read, where the user may want to know or change it; returns sentences."""
    found, notes = scan.found, []
    if between is not None:
        deep = [facts for facts in found.values() if facts.deep]
        how = "as their values are (data.value_range sets it)" if measured else "by data.value_range"
        notes.append(f"{len(deep)} of more than 8 bits: {between[0]:g} is black and {between[1]:g} white, {how}")
        if any(len(facts.mode) > 2 and facts.mode[0] not in "IF" for facts in deep):
            notes.append("in colour, the upper 8 of 16 bits are read")
    if clear := sum(facts.transparent for facts in found.values()):
        how = "the colour stored under transparent pixels is kept" if background is None else f"laid on {background}"
        notes.append(f"{clear} with transparency: {how} (data.background)")
    if several := [name for name, facts in found.items() if facts.pages > 1]:
        pages = sum(found[name].pages - 1 for name in several)
        notes.append(f"{len(several)} with more pages or frames ({several[0]}): the first is used, {pages} are not")
    return notes + describe_copies(copies(scan.files, splits, scan.checksum), scan.files.what)


def check_size(size: Sequence[int] | None) -> None:
    """Raise UserError unless `size` is None or two whole numbers."""
    if size is None:
        return
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise UserError(f"data.size={size} must be [height,width] or null")
    for side in size:
        at_least(side, 1, "each of data.size")


def common_size(found: Mapping[str, Facts]) -> tuple[int, int]:
    """Return (H, W) of all images. Raises UserError that names the first image of another size."""
    (first, facts), *others = found.items()
    for name, other in others:
        if (other.height, other.width) != (facts.height, facts.width):
            raise UserError(
                f"{name} is {other.height}x{other.width} (height x width), but {first} is {facts.height}x{facts.width}: set "
                "data.size=[height,width] to bring all images to one size"
            )
    return facts.height, facts.width
