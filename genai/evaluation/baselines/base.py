"""What baselines share: what they are fitted on, what they say of themselves."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.data.base import Data, Split, random_subset
from genai.data.stream import batches


@dataclass
class TrainingData:
    """What a baseline is fitted on: all items of some splits, and the facts of the data.

    x: images float32 (N, C, H, W) in [-1, 1], or a text's token ids int64 (T,).
    label: int64 (N,), None without labels.
    """

    x: Tensor
    label: Tensor | None
    field: str
    shape: list[int]
    levels: int | None
    classes: int | None


class Baseline:
    """A trivial model: `fit`, then those of these that it can answer, each a method where it can.

    - `log_prob(batch, seed) -> (B,)`: nats of whole samples of the discrete data, exact; needs no randomness.
    - `sample(n, seed, label) -> (n, C, H, W)`: in [-1, 1]; sample i depends on seed + i alone, `label` int64 (n,) asks for
      classes where the baseline knows them.
    - `reconstruct(batch) -> (B, C, H, W)`: the images as well as it can.
    """

    field = "image"  # or tokens
    needs: tuple[str, ...] = ()  # of levels and classes, what the data must have
    drawn = False  # whether fitting draws random numbers
    what: str  # it is, for a table

    def fit(self, data: TrainingData, seed: int) -> "Baseline":
        """Learn all it knows; returns itself. Raises UserError for a key that this data cannot fill."""
        raise NotImplementedError


def name_of(kind: str) -> str:
    """The name of a baseline in the configs by that of its class: TrainingCopy is training_copy, GMM gmm."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()


def check(baseline: Baseline, data: Data) -> None:
    """Raises UserError for a baseline that this data cannot have."""
    name = name_of(type(baseline).__name__)
    if data.field != baseline.field:
        raise UserError(
            f"baseline={name} takes {baseline.field}, and this data is {data.field} of shape {data.shape}: "
            "choose another with baseline="
        )
    for need, words in (("levels", "grey levels (data.levels)"), ("classes", "labels (data.classes)")):
        if need in baseline.needs and getattr(data, need) is None:
            raise UserError(
                f"baseline={name} needs data with {words}, and this has none: choose another with baseline="
            )


def training_data(data: Data, splits: Sequence[str], most: int | None = None) -> TrainingData:
    """All items, or `most` of each, of some splits of images or of one text: its first tokens, or images drawn at random, the
    same every time."""
    for name in splits:
        if name not in data.splits:
            raise UserError(f"fit={list(splits)}: {name} must be one of {', '.join(data.splits)}")
    if not splits:
        raise UserError("fit=[] leaves nothing to learn from: name at least one split")
    if data.modality.windowed:
        x, label = torch.cat([stream(data.splits[name])[:most] for name in splits]), None
    else:
        chosen = [random_subset(split, most or len(split)) for split in (data.splits[name] for name in splits)]
        parts = [next(batches(split, len(split))) for split in chosen]
        x = torch.cat([part[data.field] for part in parts])
        label = None if data.classes is None else torch.cat([part["label"] for part in parts])
    return TrainingData(x, label, data.field, list(data.shape), data.levels, data.classes)


def stream(split: Split) -> Tensor:
    """The token ids of a text's split, int64 (T,), whatever windows it is cut into."""
    parts = [batch["tokens"][:, 1:][batch["mask"][:, 1:]] for batch in batches(split, 1024)]
    return torch.cat([split.batch(torch.tensor([0]), None)["tokens"][0, :1], *parts])
