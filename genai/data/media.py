"""Items of several media that share a class: a word, an image and a recording of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import checksum, split_checksum
from genai.modalities.audio import Audio
from genai.modalities.caption import encode
from genai.modalities.media import Media as Modality

CHUNK = 4096  # items whose labels are read at once


class Media(Data):
    """Images, each with the word of its class as `caption` and a recording of that word as `audio`.

    In training the recording is drawn at random among those of the class; else those of a class are taken in turn.

    Args:
        images: data of images with classes.
        audio: data of recordings with the same classes in the same order.
        names: the word of each class; None for the names of the images' classes.
        length: bytes of the longest word.
        root, speech: folders that the configs of `images` and `audio` refer to.
        field, shape, classes, levels, batch_size, num_workers: see `Data`; field, shape and levels are those of the images.

    Raises UserError for data of other kinds, or with another number of classes.
    """

    def __init__(
        self,
        images: Data,
        audio: Data,
        names: Sequence[str] | None,
        length: int,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
        root: str | None = None,
        speech: str | None = None,
    ):
        at_least(length, 1, "data.length")
        if not isinstance(audio.modality, Audio):
            raise UserError(f"data.audio holds {audio.field}, which is not sound: give recordings, such as data/fsdd")
        if images.class_names is None or audio.classes != images.classes:
            raise UserError(
                f"data.images has {images.classes} classes and data.audio {audio.classes}: give data of the same classes"
            )
        words = list(names or images.class_names)
        if len(words) != images.classes:
            raise UserError(f"data.names are {len(words)} words, but this data has {images.classes} classes")
        self.captions = encode(words, length, "data.length")
        shared = [name for name in images.splits if name in audio.splits]
        splits: dict[str, Split] = {
            name: MediaSplit(images.splits[name], audio.splits[name], self.captions) for name in shared
        }
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=splits,
            found_shape=images.shape,
            class_names=images.class_names,
            found_levels=images.levels,
            modality=Modality(length, words, images.shape, audio.shape, audio.modality.sr_hz),
        )
        self.conditions = {}
        self.parts: Mapping[str, Data] = {"image": images, "audio": audio}
        """The data sets of the images and of the recordings."""

    def describe_cond(self, n: int) -> list[str]:
        """Return the words of n preview samples, in turn."""
        return self.modality.in_turn(0, n) or []


class MediaSplit:
    """A split of images, each with a recording of the same class and the word for it.

    Args:
        images, audio: splits with `label` in their batches.
        captions: int64 (classes, length), the words.

    Raises UserError for an image of a class without a recording.
    """

    def __init__(self, images: Split, audio: Split, captions: Tensor):
        self.images, self.audio, self.captions, self.augments = images, audio, captions, True
        label, spoken = labels_of(images), labels_of(audio)
        self.order = spoken.argsort(stable=True)
        self.count = spoken.bincount(minlength=len(captions))
        self.first = self.count.cumsum(0) - self.count
        if (lacking := label.unique()[self.count[label.unique()] == 0]).numel():
            raise UserError(f"data.audio has no recording of class {int(lacking[0])} in a split of its own: add some")
        one_hot = torch.nn.functional.one_hot(label, len(captions))
        self.rank = (one_hot.cumsum(0) * one_hot).sum(1) - 1  # of an image among those of its class

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the images `index` (B,) with recordings and words; the draws (B, 4) choose recordings and augment both."""
        found = self.images.batch(index, draws)
        label, again = found["label"], None
        which = self.rank[index] % self.count[label]
        if draws is not None:
            u = rng.uniform((draws[:, 0].double() * 2**40).long() ^ (draws[:, 1].double() * 2**40).long(), (5,))
            which = (u[:, 0].clamp_max(1 - 2**-24) * self.count[label]).long()
            again = u[:, 1:].clamp_max(1 - 2**-24)
        sound = self.audio.batch(self.order[self.first[label] + which], again)
        return {**sound, **found, "caption": self.captions[label]}

    def fingerprint(self, quick: bool) -> str:
        return checksum(split_checksum(self.images, quick), split_checksum(self.audio, quick), self.captions)


def labels_of(split: Split) -> Tensor:
    """Return the label of every item of a split, int64 (N,)."""
    parts = torch.arange(len(split)).split(CHUNK)
    return torch.cat([split.batch(index, None)["label"] for index in parts])
