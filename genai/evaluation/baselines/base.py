"""The interface of baselines, and the data that they are fitted on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.data.base import Data, Split, random_subset
from genai.data.stream import batches


@dataclass
class TrainingData:
    """The items that a baseline is fitted on, and the facts of their data set.

    Attributes:
        x: images float32 (N, C, H, W) in [-1, 1], or token ids int64, of a text (T,) or of items (N, 1 + T).
        label: int64 (N,), None without labels.
        field, shape, levels, classes: as of `Data`.
        mask: bool (N, ...), which elements of items are real; None for all.
        speaker: int64 (N,), None without speakers.
        modality: of the items.
        source: int64 (N, S), what the items answer, padded at the end with negative ids; None without sources.
    """

    x: Tensor
    label: Tensor | None
    field: str
    shape: list[int]
    levels: int | None
    classes: int | None
    mask: Tensor | None = None
    speaker: Tensor | None = None
    modality: Any = None
    source: Tensor | None = None


class Baseline:
    """A trivial model: `fit`, and those of the following methods that it supports.

    - `log_prob(batch, seed) -> (B,)`: exact ln p of whole samples of the discrete data, in nats.
    - `sample(n, seed, label) -> (n, C, H, W)`: images in [-1, 1]; sample i depends on seed + i alone, and `label`, int64 (n,),
      asks for classes; for data with speakers also `speaker`, int64 (n,).
    - `score_hidden(batch, hidden)`: see `Infiller`.
    - `reconstruct(batch) -> (B, C, H, W)`: the images after compression.
    - `answer(batch) -> B lists of token ids`: what is written for the sources of a batch, without the end.
    """

    field = "image"  # or tokens
    needs: tuple[str, ...] = ()  # what the data must have: "levels", "classes", "bar", "companding"
    random_fit = False  # whether fitting draws random numbers, so that it is repeated with several seeds
    what: str  # description in tables

    def fit(self, data: TrainingData, seed: int) -> "Baseline":
        """Fit to the data; returns itself. Raises UserError for a setting that this data does not allow."""
        raise NotImplementedError


def name_of(kind: str) -> str:
    """Return the name of a baseline in the configs from its class: TrainingCopy is training_copy, GMM is gmm."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()


def check(baseline: Baseline, data: Data) -> None:
    """Raise UserError unless a baseline can be fitted to this data."""
    name = name_of(type(baseline).__name__)
    if data.field != baseline.field:
        raise UserError(
            f"baseline={name} needs data of {baseline.field}, and this data is {data.field} of shape {data.shape}: "
            "choose another with baseline="
        )
    words_of = {"levels": "grey levels (data.levels)", "classes": "labels (data.classes)", "bar": "bars (data.bar)"}
    words_of["source_levels"] = "sources (data.source_levels)"
    words_of["companding"] = "codes of sound"
    words_of["labels"] = "targets of one token"
    for need, words in words_of.items():
        if need in baseline.needs and getattr(data, need, getattr(data.modality, need, None)) is None:
            raise UserError(
                f"baseline={name} needs data with {words}, and this has none: choose another with baseline="
            )


def training_data(data: Data, splits: Sequence[str], most: int | None = None) -> TrainingData:
    """Collect all items of some splits, or at most `most` of each: the first tokens of a text, or a fixed random set of images.

    Raises UserError for a split that the data do not have, or no splits at all.
    """
    for name in splits:
        if name not in data.splits:
            raise UserError(f"fit={list(splits)}: {name} must be one of {', '.join(data.splits)}")
    if not splits:
        raise UserError("fit=[] must name at least one split")
    if data.modality.windowed:
        x, found = torch.cat([stream(data.splits[name])[:most] for name in splits]), {}
    else:
        chosen = [random_subset(split, most or len(split)) for split in (data.splits[name] for name in splits)]
        parts = [next(batches(split, len(split))) for split in chosen]
        x = _joined([part[data.field] for part in parts], 0)
        found = {
            key: _joined([part[key] for part in parts], value)
            for key, value in {"mask": False, "speaker": 0, "label": 0, "source": -1}.items()
            if key in parts[0]
        }
    label = found.pop("label", None)
    # data.values: a vocabulary may have ids that the text does not
    facts = data.field, list(data.shape), data.values if data.modality.windowed else data.levels, data.classes
    return TrainingData(x, label, *facts, **found, modality=data.modality)


def _joined(parts: Sequence[Tensor], value: float) -> Tensor:
    """Return tensors (N_i, ...) as one (N, ...); rows (N_i, T_i) of different length are padded with a value at the end."""
    if parts[0].ndim == 2:
        most = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, most - part.shape[1]), value=value) for part in parts]
    return torch.cat([*parts])


def stream(split: Split) -> Tensor:
    """Return the token ids of a text's split, int64 (T,), without its division into windows; of several corpora one after the
    other."""
    if hasattr(split, "parts"):
        return torch.cat([stream(part) for part in split.parts.values()])  # type: ignore[attr-defined]
    parts = [batch["tokens"][:, 1:][batch["mask"][:, 1:]] for batch in batches(split, 1024)]
    return torch.cat([split.batch(torch.tensor([0]), None)["tokens"][0, :1], *parts])
