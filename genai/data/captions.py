"""Images with captions: sentences made from class names, or a file of captions in the folder of images."""

import json
import posixpath
from collections.abc import Sequence

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import checksum, split_checksum
from genai.data.image_folder import Images
from genai.modalities.caption import Caption, encode


class Captioned(Data):
    """A data set whose batches also have `caption`, int64 (B, length): the bytes of a caption, then `PAD`.

    In training one of an item's captions is chosen at random, else it is the first.

    Args:
        images: the data set of images.
        root: its folder; the config of `images` refers to it, so that data.root= works here as it does everywhere.
        templates: sentences in which {} becomes the class name.
        names: class names to use in the sentences; None for the data's own.
        file: instead of templates, a file of JSON lines `{"file_name": "a/b.png", "text": "..."}` in the image folder or zip,
            any number of lines for each image.
        length: of the longest caption, in bytes.
        field, shape, classes, levels, batch_size, num_workers: see `Data`.

    Raises UserError if an image has no caption, or one that is too long.
    """

    def __init__(
        self,
        images: Data,
        root: str | None,
        templates: Sequence[str] | None,
        names: Sequence[str] | None,
        file: str | None,
        length: int,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
    ):
        at_least(length, 1, "data.length")
        if (templates is None) == (file is None):
            raise UserError(
                "captions come from data.templates or from data.file: set one of them, and the other to null"
            )
        splits: dict[str, CaptionedSplit] = {}
        if templates is not None:
            if names is not None and len(names) != images.classes:
                raise UserError(
                    f"data.names={list(names)} are {len(names)}, but this data has {images.classes} classes"
                )
            sentences = captions_by_class(templates, names or images.class_names)
            splits = {name: CaptionedSplit(part, sentences, length) for name, part in images.splits.items()}
        else:
            assert file is not None
            for name, part in images.splits.items():
                splits[name] = CaptionedSplit(part, captions_from_file(part, file), length, by_label=False)
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=dict(splits),
            found_shape=images.shape,
            class_names=images.class_names,
            found_levels=images.levels,
        )
        self.conditions = {"caption": Caption(length), **self.conditions}
        self.preview_split = splits["val"]

    def cond(self, n: int) -> Batch:
        """Return n captions with labels: of the classes in turn, or of the first validation images."""
        if self.preview_split.by_label:
            label = super().cond(n) or {}
            return {"caption": self.preview_split.captions[self.preview_split.first[label["label"]]].long(), **label}
        batch = self.preview_split.batch(torch.arange(n) % len(self.preview_split), None)
        return {name: batch[name] for name in ("caption", "label") if name in batch}


class CaptionedSplit:
    """A split with the captions of each item, or with `by_label` of each class."""

    def __init__(self, split: Split, captions: Sequence[Sequence[str]], length: int, by_label: bool = True):
        self.split = self.without_captions = split
        self.by_label = by_label
        self.captions = encode([text for own in captions for text in own], length, "data.length").to(torch.int16)
        self.count = torch.tensor([len(own) for own in captions])
        self.first = self.count.cumsum(0) - self.count
        self.augments = split.augments or bool((self.count > 1).any())

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the items `index` (B,) with captions; the last of the draws (B, 4) chooses among an item's captions."""
        batch = self.split.batch(index, draws)
        if isinstance(self.split, Images):
            index = self.split.replace_damaged(index)
        row = batch["label"] if self.by_label else index
        which = 0 if draws is None else (draws[:, 3] * self.count[row]).long()
        return {**batch, "caption": self.captions[self.first[row] + which].long()}

    def fingerprint(self, quick: bool) -> str:
        return checksum(split_checksum(self.split, quick), self.by_label, self.captions, self.count, quick=quick)


def captions_by_class(templates: Sequence[str], names: Sequence[str] | None) -> list[list[str]]:
    """Return the sentences of each class: every template with its name. Raises UserError without classes or without a {}."""
    if names is None:
        raise UserError("data.templates need class names, and this data has no classes: give captions with data.file")
    wrong = [t for t in templates if "{}" not in t]
    if wrong or not templates:
        raise UserError(f"data.templates={list(templates)} must be sentences with a place {{}} for the class name")
    return [[t.replace("{}", name) for t in templates] for name in names]


def captions_from_file(split: Split, file: str) -> list[list[str]]:
    """Read the captions of each item of a split of image files. Raises UserError that names the items without captions."""
    if not isinstance(split, Images):
        raise UserError(f"data.file={file} gives captions to image files: use it with data.images of an image folder")
    root = split.files.root
    at = min((n for n in split.files.names() if n == file or n.endswith(f"/{file}")), key=len, default=None)
    if at is None:
        raise UserError(f"there is no {file} in data.root={str(root)!r}: name the captions with data.file")
    with split.files.open(at) as stream:
        lines = stream.read().splitlines()
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            if not isinstance(text, str):
                raise TypeError(f"text is {text}")
            found.setdefault(posixpath.normpath(posixpath.join(posixpath.dirname(at), name)), []).append(text)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{root / at}, line {number}, is not JSON with file_name and text ({error})") from None
    missing = [name for name in map(str, split.names) if name not in found]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {len(split)} images in {root} have no caption in {file} ({shown}): add them, or remove the "
            "images"
        )
    return [found[str(name)] for name in split.names]
