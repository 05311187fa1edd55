"""The interface of data sets: named splits that return batches by index, and the facts that a model is built from."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data.fingerprint import checksum
from genai.modalities.base import Modality, Shown
from genai.modalities.image import from_uint8
from genai.modalities.label import Label
from genai.modalities.stored import modality_of_field


class Split(Protocol):
    """A split of a data set: `len(split)` items, returned in batches by index.

    `augments` tells whether it uses random draws. A method `fingerprint(quick) -> str` is optional; it gives a checksum of the
    content faster than reading all items would, see `genai.data.fingerprint`. So is `lengths`, int64 (N,), of items that are
    padded to the longest of a batch, see `genai.data.stream`.
    """

    augments: bool

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the items `index`, int64 (B,), each tensor with B in front.

        `draws` (B, 4), uniform in [0, 1], are the only randomness of augmentation; with None an item is always the same.
        """
        ...


class Data:
    """A data set: its splits, the facts that a model is built from, and the settings of its loader.

    Args:
        field: name of the main tensor in a batch.
        shape, classes, levels, speakers: as in the config; None takes the data's own.
        batch_size: samples in a micro-batch on one device.
        num_workers: loader processes; any number gives the same stream of batches.
        splits: by name, of train, val and test. Items of val and test must be in random order, as often only the first are used.
        found_shape: shape of one sample, as the data has it.
        class_names: name of each label, None without labels.
        speaker_names: name of each speaker of a recording, None without speakers.
        found_levels: number of grey levels of the data, or vocabulary size of tokens; None if it is continuous.
        modality: of the items; None for an image where field is "image", else a vector.

    Raises UserError where shape, classes or levels differ from the data's own.
    """

    def __init__(
        self,
        *,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int,
        splits: dict[str, Split],
        found_shape: Sequence[int],
        class_names: Sequence[str] | None,
        found_levels: int | None,
        modality: Modality | None = None,
        speaker_names: Sequence[str] | None = None,
        speakers: int | None = None,
    ):
        at_least(batch_size, 1, "data.batch_size")
        at_least(num_workers, 0, "data.num_workers")
        if field in ("label", "caption", "seeds", "index"):
            raise UserError(f"data.field={field} is a name that batches have for something else: choose another")
        self.field, self.shape, self.levels = field, list(found_shape), found_levels
        self.class_names = None if class_names is None else list(class_names)
        self.classes = None if class_names is None else len(class_names)
        self.modality = modality or modality_of_field(field)
        self.conditions: dict[str, Modality] = {}
        """The conditions that a model can be given, by name; the most informative first."""
        if self.class_names is not None:
            self.conditions["label"] = Label(len(self.class_names), self.class_names)
        self.speakers = None if speaker_names is None else len(speaker_names)
        if speaker_names is not None:
            self.conditions["speaker"] = Label(len(speaker_names), list(speaker_names), "speaker", self.classes or 1)
        self.batch_size, self.num_workers, self.splits = batch_size, num_workers, splits
        configured = {"shape": None if shape is None else list(shape), "classes": classes, "levels": levels}
        configured["speakers"] = speakers
        for key, value in configured.items():
            if value is not None and value != getattr(self, key):
                raise UserError(
                    f"data.{key}={value}, but this data has {getattr(self, key)}: correct data.{key} or set it to null"
                )

    more_facts: tuple[str, ...] = ("speakers",)
    """The facts besides shape, classes and levels that a config may leave to the data, where it has them."""
    source: "tuple[str, Data] | None" = None
    """The data set of which this is another form, such as images as tokens, with the key of its config in this one's."""

    @property
    def values(self) -> int | None:
        """Number of values that each element of a sample can take, None if it is continuous."""
        return self.levels

    def items(self, split: str, index: Tensor, again: bool = True) -> Tensor:
        """Return the main tensor (B, *shape) of items `index`, int64 (B,), of a split.

        Indices past its end begin again, or with again=False are left out.

        Raises UserError for a split that the data set does not have.
        """
        if split not in self.splits:
            raise UserError(f"sampler.split={split} must be one of {', '.join(self.splits)}")
        part = self.splits[split]
        index = index % len(part) if again else index[index < len(part)]
        return part.batch(index, None)[self.field]

    def cond(self, n: int) -> Batch | None:
        """Return conditions for n preview samples, the classes in turn; None for data without conditions."""
        return {k: v for m in (self.modality, *self.conditions.values()) for k, v in m.condition({}, n).items()} or None

    def describe_cond(self, n: int) -> list[str]:
        """Return the class name or caption of each of the conditions `cond(n)`; an empty list without conditions."""
        cond = self.cond(n) or {}
        names = next((modality.preview(cond) for name, modality in self.conditions.items() if name in cond), [])
        return names if isinstance(names, list) else []

    def show(self, batch: Batch, columns: int | None = None) -> Shown:
        """Return samples that were made for `cond` for display, with `columns` in a row of a picture."""
        cond = self.cond(len(next(iter(batch.values())))) or {}
        asked = {name: value for name, value in cond.items() if name in self.conditions}
        return self.modality.preview({**asked, **batch}, columns)


class Arrays:
    """A split in memory: uint8 images (N, C, H, W) or float vectors (N, D), with labels (N,) or None.

    With `flip`, training images are mirrored left to right with probability 1/2.
    """

    def __init__(self, field: str, values: np.ndarray, labels: np.ndarray | None, flip: bool = False):
        self.field, self.augments = field, flip
        self.values = torch.from_numpy(np.ascontiguousarray(values))
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        x = self.values[index]
        if x.dtype == torch.uint8:
            x = from_uint8(x)
        if self.augments and draws is not None:
            x = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
        return {self.field: x} if self.labels is None else {self.field: x, "label": self.labels[index]}

    def fingerprint(self, quick: bool) -> str:
        return checksum(self.values, self.labels, quick=quick)


class Subset:
    """The items `index`, int64 (N,), of a split, in that order."""

    def __init__(self, split: Split, index: Tensor):
        self.split, self.index, self.augments = split, index, split.augments

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        return self.split.batch(self.index[index], draws)


def random_order(split: Split) -> Subset:
    """Return a split in a fixed random order, so that its first items are a random sample even if it is sorted by class."""
    return Subset(split, torch.from_numpy(np.random.default_rng(0).permutation(len(split))))


def random_subset(split: Split, n: int) -> Split:
    """Return a fixed random subset of n items; the split itself where it has at most n."""
    return split if n >= len(split) else Subset(split, random_order(split).index[:n])


def first_items(data: Data, name: str, n: int) -> Split:
    """Return n items of a named split: the first ones of val and test, which are in random order, a random subset of train.

    The training split may be sorted by class.
    """
    split = data.splits[name]
    return random_subset(split, n) if name == "train" else Subset(split, torch.arange(min(n, len(split))))


def underlying(data: Data, node: Any) -> tuple[Data, Any]:
    """Return (data, config) of the data set of which `data` is another form; data that are none unchanged."""
    return (data, node) if data.source is None else (data.source[1], node[data.source[0]])


def split_indices(n: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split the indices 0, ..., n - 1, in a fixed random order, into the rest and the last `fraction` of them."""
    order = np.random.default_rng(0).permutation(n)
    keep = n - max(round(n * fraction), 1)
    return order[:keep], order[keep:]


def synthetic_batch(shape: Sequence[int], field: str, classes: int | None, n: int) -> Batch:
    """Return a synthetic batch of n samples of the given shape, always the same, for tests and dry runs."""
    values = rng.uniform(rng.seed_range(0, n), shape)
    batch = {field: (values > 0.5).long() if field == "tokens" else values * 2 - 1}
    if classes is not None:
        batch["label"] = torch.arange(n) % classes
    return batch
