"""What every data set is: named splits that answer "these indices, please", and the facts a model is built from."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data.fingerprint import checksum
from genai.modalities.base import Modality, Picture, Texts
from genai.modalities.image import from_uint8
from genai.modalities.label import Label
from genai.modalities.stored import modality_of_field


class Split(Protocol):
    """One split: `len(split)` items, any of them as a Batch. Without draws an item is always the same.

    `augments` says whether it uses draws. A method `fingerprint(quick) -> str` may say what it holds faster than by reading
    all items, see `genai.data.fingerprint`.
    """

    augments: bool

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Items `index` int64 (B,); draws (B, 4) uniform in [0, 1] are all the randomness augmentation may use."""
        ...


class Data:
    """A data set: the facts a model is built from, splits, and loading numbers.

    Args:
        field: name of the main tensor in a Batch.
        shape, classes, levels: as the config states them; None takes what the data has.
        batch_size: samples of one micro-batch on one device.
        num_workers: loader processes; any number gives the same stream.
        splits: of the names train, val and test; the first items of val and test must stand for all of them.
        found_shape: of one sample.
        class_names: of each label, None if there are no labels.
        found_levels: grey levels of the data, None if continuous.
        modality: of its items; None: that of their field's name, an image or a vector.

    Raises UserError where the config states what the data does not have.
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
        """What a model can be told of an item, by name; the first says most."""
        if self.class_names is not None:
            self.conditions["label"] = Label(len(self.class_names), self.class_names)
        self.batch_size, self.num_workers, self.splits = batch_size, num_workers, splits
        stated = {"shape": None if shape is None else list(shape), "classes": classes, "levels": levels}
        for key, value in stated.items():
            if value is not None and value != getattr(self, key):
                raise UserError(
                    f"data.{key}={value}, but this data has {getattr(self, key)}: correct data.{key} or set it to null"
                )

    @property
    def values(self) -> int | None:
        """How many values each number of a sample may have, None if it is continuous."""
        return self.levels

    def items(self, split: str, index: Tensor) -> Tensor:
        """The field of items int64 (B,) of a split, beginning again at its end. Raises UserError for a split it lacks."""
        if split not in self.splits:
            raise UserError(f"sampler.split={split} must be one of {', '.join(self.splits)}")
        part = self.splits[split]
        return part.batch(index % len(part), None)[self.field]

    def cond(self, n: int) -> Batch | None:
        """Conditions for n samples that show what a model has learned: the classes in turn; None where there are none."""
        return {k: v for m in (self.modality, *self.conditions.values()) for k, v in m.condition({}, n).items()} or None

    def describe_cond(self, n: int) -> list[str]:
        """What `cond(n)` asks for, in words: a class name or a caption each; nothing where nothing is asked for."""
        cond = self.cond(n) or {}
        shown = next((modality.preview(cond) for name, modality in self.conditions.items() if name in cond), [])
        return shown if isinstance(shown, list) else []

    def show(self, batch: Batch, columns: int | None = None) -> Picture | Texts:
        """Samples that were asked for by `cond` as a person sees them, `columns` a row where that is one picture."""
        cond = self.cond(len(next(iter(batch.values())))) or {}
        told = {name: value for name, value in cond.items() if name in self.conditions}
        return self.modality.preview({**told, **batch}, columns)


class Arrays:
    """A split held in memory: uint8 images (N, C, H, W) or float vectors (N, D), labels (N,) or None.

    `flip` mirrors images left to right with probability 1/2 where draws are given.
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
    """Items `index` int64 (N,) of a split, in that order."""

    def __init__(self, split: Split, index: Tensor):
        self.split, self.index, self.augments = split, index, split.augments

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        return self.split.batch(self.index[index], draws)


def random_order(split: Split) -> Subset:
    """All items of a split in a fixed random order, so that any first of them stand for all, even of one sorted by class."""
    return Subset(split, torch.from_numpy(np.random.default_rng(0).permutation(len(split))))


def random_subset(split: Split, n: int) -> Split:
    """The first n items of a `random_order`; where there are no more, all as they come."""
    return split if n >= len(split) else Subset(split, random_order(split).index[:n])


def first_items(data: Data, name: str, n: int) -> Split:
    """n items of a named split: the first of validation and test, which are in no order, `some` of training, which may be."""
    split = data.splits[name]
    return random_subset(split, n) if name == "train" else Subset(split, torch.arange(min(n, len(split))))


def split_indices(n: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices 0, ..., n-1 in a fixed random order, cut into the kept and the last `fraction` of them."""
    order = np.random.default_rng(0).permutation(n)
    keep = n - max(round(n * fraction), 1)
    return order[:keep], order[keep:]


def synthetic_batch(shape: Sequence[int], field: str, classes: int | None, n: int) -> Batch:
    """A synthetic batch of n samples of the declared shapes, the same every time, for tests and dry runs."""
    values = rng.uniform(rng.seed_range(0, n), shape)
    batch = {field: (values > 0.5).long() if field == "tokens" else values * 2 - 1}
    if classes is not None:
        batch["label"] = torch.arange(n) % classes
    return batch
