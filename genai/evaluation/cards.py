"""Metric cards: a figure with everything that decides it, so that it can be compared or refused.

A card is JSON: the value with the least and the largest over independent sets of samples, or with the bootstrap interval of a
mean over items; the protocol, whose every field must agree before two are ranked; what real data score against real data at the
same n; the trivial baselines, and whether all that make something of their own are beaten.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genai.core import files
from genai.data.base import Data
from genai.data.fingerprint import of_split
from genai.evaluation.features import Extractor
from genai.metrics.frechet import Moments, frechet
from genai.metrics.inception_score import inception_score
from genai.metrics.kid import kid
from genai.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from genai.metrics.text import distinct, longest_copy


class Seen:
    """A set of images as an extractor sees it, batch by batch: the moments of their features and how many show the label
    asked for, in memory that does not grow; features and probabilities of each only where they are `kept`."""

    def __init__(self, extractor: Extractor, kept: bool):
        self.extractor, self.kept, self.moments, self.right = extractor, kept, Moments(), 0
        self.parts: list[tuple[Tensor, Tensor | None]] = []

    def add(self, images: Tensor, label: Tensor | None = None) -> "Seen":
        """Images (B, C, H, W) in [-1, 1], labels (B,); returns itself."""
        features, logits = self.extractor(images)
        self.moments.add(features)
        if logits is not None and label is not None and self.extractor.labels:
            self.right += int((logits.argmax(1) == label).sum())
        if self.kept:
            self.parts.append((features, None if logits is None else logits.softmax(1)))
        return self

    @property
    def features(self) -> Tensor:
        return torch.cat([features for features, _ in self.parts])

    @property
    def probabilities(self) -> Tensor:
        return torch.cat([found for _, found in self.parts if found is not None])


@dataclass
class Sets:
    """Real images, all of a split, beside n fakes."""

    real: Seen
    fake: Seen

    @functools.cached_property
    def balls(self) -> PrecisionRecall:
        fake = self.fake.features
        return precision_recall(self.real.features[: len(fake)], fake)

    @functools.cached_property
    def held(self) -> DensityCoverage:
        fake = self.fake.features
        return density_coverage(self.real.features[: len(fake)], fake)


@dataclass
class Texts:
    """Texts beside those that a model learned from."""

    texts: list[str]
    train: str


class Metric(NamedTuple):
    """Which way is better, what the figure is of, samples (of images), texts or a split, and how it is taken of these."""

    better: str
    of: str
    measure: Callable[[Any], float] | None = None


METRICS = {
    "frechet": Metric("lower", "samples", lambda s: frechet(s.fake.moments, s.real.moments)),
    "kid": Metric("lower", "samples", lambda s: kid(s.real.features, s.fake.features)),
    "inception_score": Metric("higher", "samples", lambda s: inception_score(s.fake.probabilities).mean),
    "precision": Metric("higher", "samples", lambda s: s.balls.precision),
    "recall": Metric("higher", "samples", lambda s: s.balls.recall),
    "density": Metric("higher", "samples", lambda s: s.held.density),
    "coverage": Metric("higher", "samples", lambda s: s.held.coverage),
    "accuracy": Metric("higher", "samples", lambda s: s.fake.right / s.fake.moments.n),
    "distinct_1": Metric("higher", "texts", lambda t: distinct([text.split() for text in t.texts], 1)),
    "distinct_2": Metric("higher", "texts", lambda t: distinct([text.split() for text in t.texts], 2)),
    "longest_copy": Metric("lower", "texts", lambda t: longest_copy("\n\n".join(t.texts), t.train).length),
    "bits_per_dim": Metric("lower", "split"),
    "nats_per_token": Metric("lower", "split"),
    "bits_per_character": Metric("lower", "split"),
    "reconstruction_psnr_db": Metric("higher", "split"),
    "reconstruction_ssim": Metric("higher", "split"),
}
STREAMED = "frechet", "accuracy"  # of which nothing is kept of a single sample


def data_facts(data: Data, node: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The protocol's fields of the data with config `node`: class, shape of an image, and checksum of the split's items."""
    shape = {} if data.modality.windowed else {"shape": list(data.shape)}
    return {"data": node["_target_"], **shape, "data_checksum": of_split(data.splits[split])}


def card(
    name: str, value: float, low: float, high: float, floor: float | None, baselines: Mapping[str, float], copier: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One card. A baseline is beaten if even the worse end of the interval is better; one called `copier` makes nothing of its
    own, and is shown but need not be beaten."""
    better = METRICS[name].better
    worst, sign = (high, -1) if better == "lower" else (low, 1)
    own = [figure for what, figure in baselines.items() if what != copier]
    figures = {"value": value, "low": low, "high": high, **({} if floor is None else {"floor": floor})}
    return {
        "metric": name, **{key: round(figure, 5) for key, figure in figures.items()}, "better": better,
        "baselines": {what: round(figure, 5) for what, figure in baselines.items()},
        "beats_baseline": all(sign * worst > sign * figure for figure in own) if own else None, **facts,
    }  # fmt: skip


def write(cards: list[dict[str, Any]], run: Path) -> None:
    """Each to cards/<metric>.json of a run, where the next one of that metric takes its place."""
    for found in cards:
        path = run / "cards" / f"{found['metric']}.json"
        files.write_text(path, json.dumps(found, indent=2) + "\n", within=run)


def table(cards: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of cards, for a tracker."""
    head = ["metric", "value", "low", "high", "floor", "beats_baseline", "memorised", "step"]
    rows = [
        [found.get(key) for key in head] + [json.dumps(found["baselines"]), json.dumps(found["protocol"])]
        for found in cards
    ]
    return [*head, "baselines", "protocol"], rows
