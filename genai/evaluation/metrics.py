"""Metrics: what each is a figure of, which way is better, its unit, and how it is taken; conf/metrics.yaml names them; and
the plan of an evaluation that takes them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from genai.checkpoint import Loaded
from genai.checkpoint.build import build_typed, reason
from genai.cli import conf_dir
from genai.core.errors import UserError, at_least
from genai.core.protocols import Reconstructor, Scorable
from genai.data.base import Data
from genai.evaluation import features
from genai.metrics import frechet, images, inception_score, kid, manifold, text


@dataclass
class RealFakePair:
    """Real images, all of a split, beside n fakes."""

    real: features.FeatureSet
    fake: features.FeatureSet

    @functools.cached_property
    def precision_recall(self) -> manifold.PrecisionRecall:
        fake = self.fake.features
        return manifold.precision_recall(self.real.features[: len(fake)], fake)

    @functools.cached_property
    def density_coverage(self) -> manifold.DensityCoverage:
        fake = self.fake.features
        return manifold.density_coverage(self.real.features[: len(fake)], fake)


@dataclass
class GeneratedTexts:
    """Strings beside those that a model learned from."""

    texts: list[str]
    train: str


class Metric:
    """A figure of a checkpoint, which says itself what decides how it is taken; one of a user's own package is a subclass.

    Its card has an interval, a floor and the baselines that `kind` gives:

    - "samples": called with `RealFakePair`, gives one number; `repeats` sets, a floor of real samples, baselines that sample.
    - "texts": called with `GeneratedTexts`, likewise; a floor, no baselines.
    - "likelihoods": called with nats (N,) of a split's items and the facts of that pass, gives values (N,), whose mean it is.
    - "reconstructions": called with what a model gives back of a batch and with the batch (B, ...), gives values (B,).
    """

    kind: str = "samples"
    better: str = "lower"
    unit: str = ""
    reads: tuple[str, ...] = ()
    """What it reads of each sample, of "features", "probabilities" and "images", which are then all kept; a metric that reads
    none takes what is summed up batch by batch, `moments` and `right`, in memory that does not grow."""
    uses_labels = False
    """Whether it counts the labels that were asked for: real samples, which were asked for nothing, are then no floor."""

    def __call__(self, *given: Any) -> Any:
        raise NotImplementedError

    def suits(self, loaded: Loaded, data: Data) -> bool:
        """Whether a model that gives what it is of can have it on this data."""
        return True

    def facts(self) -> dict[str, Any]:
        """What decides the figure, in plain values: two that differ in them are not compared."""
        kind = type(self)
        plain = {key: value for key, value in vars(self).items() if isinstance(value, str | int | float | list | None)}
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **plain}


class Frechet(Metric):
    def __call__(self, sets: RealFakePair) -> float:
        return frechet.frechet(sets.fake.moments, sets.real.moments)


class KID(Metric):
    reads = ("features",)

    def __call__(self, sets: RealFakePair) -> float:
        return kid.kid(sets.real.features, sets.fake.features)


class InceptionScore(Metric):
    better, reads = "higher", ("probabilities",)

    def __call__(self, sets: RealFakePair) -> float:
        return inception_score.inception_score(sets.fake.probabilities).mean

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return features.modality_extractor(data) is None


class Manifold(Metric):
    """A `figure` of the balls around features: precision, recall, density or coverage."""

    better, reads = "higher", ("features",)

    def __init__(self, figure: str):
        self.figure = figure

    def __call__(self, sets: RealFakePair) -> float:
        found = sets.precision_recall if self.figure in ("precision", "recall") else sets.density_coverage
        return getattr(found, self.figure)


class Accuracy(Metric):
    better, uses_labels = "higher", True

    def __call__(self, sets: RealFakePair) -> float:
        return sets.fake.right / sets.fake.moments.n

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return "label" in loaded.conditions and features.modality_extractor(data) is None


class Distinct(Metric):
    """The share of n-grams of words that are different."""

    kind, better = "texts", "higher"

    def __init__(self, n: int):
        self.n = at_least(n, 1, "n")

    def __call__(self, texts: GeneratedTexts) -> float:
        return text.distinct([one.split() for one in texts.texts], self.n)


class LongestCopy(Metric):
    kind, unit = "texts", "characters"

    def __call__(self, texts: GeneratedTexts) -> float:
        return text.longest_copy("\n\n".join(texts.texts), texts.train).length


class Likelihood(Metric):
    """The nats of items in the unit of a `fact` of their pass: all are in proportion to their sum."""

    kind = "likelihoods"

    def __init__(self, fact: str):
        self.fact, self.unit = fact, fact.replace("_per_", "/")

    def __call__(self, nats: Tensor, facts: Mapping[str, Any]) -> Tensor:
        mean = nats.mean().item()  # 0 of a text of one symbol
        return nats * (facts[self.fact] / mean if mean else 1.0)

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return self.fact in data.modality.likelihoods


class PSNR(Metric):
    kind, better, unit = "reconstructions", "higher", "dB"

    def __call__(self, again: Tensor, x: Tensor) -> Tensor:
        return images.psnr(again, x)


class SSIM(Metric):
    kind, better = "reconstructions", "higher"

    def __call__(self, again: Tensor, x: Tensor) -> Tensor:
        return images.ssim(again, x)

    def suits(self, loaded: Loaded, data: Data) -> bool:
        return min(data.shape[1:], default=0) >= images.WINDOW


PASS = "likelihoods", "reconstructions"  # what one pass over a split gives
KINDS = "samples", "texts", *PASS
READ = "features", "probabilities", "images"  # what is kept of single samples


@functools.cache
def standard_metrics() -> dict[str, Metric]:
    """Those of conf/metrics.yaml by name."""
    table: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "metrics.yaml"))
    return {name: build_typed(node) for name, node in table.items()}


def compute(name: str, metric: Metric, *given: Any) -> Tensor:
    """What a metric gives (N,) in float64 on the CPU: one number, or one for each item. Raises UserError where it fails, or gives
    something else."""
    count = len(given[0]) if metric.kind in PASS else 1
    try:
        values = torch.as_tensor(metric(*given), dtype=torch.float64).cpu()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"metrics: {name} fails ({type(error).__name__}: {reason(error)}): change its class") from error
    if values.numel() != count or (metric.kind not in PASS and not values.isfinite()):
        wanted = "one number for each item" if metric.kind in PASS else "one finite number"
        what = values.item() if values.numel() == 1 else f"numbers of shape {list(values.shape)}"
        raise UserError(f"metrics: {name} gives {what}, and {metric.kind} need {wanted}: change its class")
    return values.reshape(count)


def custom_facts(name: str, metric: Metric) -> dict[str, Any]:
    """What decides a metric that is not the standard one of that name; nothing for one that is."""
    return {} if standard_metrics().get(name) is metric else metric.facts()


def can_compute(metric: Metric, loaded: Loaded, data: Data, method: Any = None) -> bool:
    """Whether a model can have a metric; `data` are images, if it makes any, and `method` a likelihood that is not its own."""
    given = {
        "likelihoods": isinstance(loaded.model, Scorable) or method is not None,
        "reconstructions": isinstance(loaded.model, Reconstructor),
    }
    return given.get(metric.kind, data.modality.comparison == metric.kind) and metric.suits(loaded, data)


@dataclass
class Plan:
    """What is measured and how.

    Args:
        metrics: names of conf/metrics.yaml, and {name: metric} for others; None: all that one pass over the split gives.
        n: items of the split, or samples of each set; None: as many as the split has.
        repeats: independent sets of samples.
        extractor: what images are compared in, of the data, its config and a device.
        likelihood: config node of a method, None for the model's own.
        baselines: whether cards have trivial models beside them.
    """

    metrics: Sequence[str | Mapping[str, Metric]] | None
    split: str = "test"
    n: int | None = None
    repeats: int = 5
    seed: int = 0
    batch_size: int = 256
    extractor: Callable[[Data, Any, str], features.Extractor] = features.classifier
    likelihood: dict[str, Any] | None = None
    baselines: bool = True


@dataclass
class CheckedPlan:
    """A plan that can be carried out.

    Args:
        plan: itself.
        images, node: the data, as images where it is images as tokens, and its config.
        n: of the plan, or all there are.
        can: the standard metrics that it can have; wanted: those asked for, in their order.
        passes, sampled: those of one pass over the split, and of samples.
        extractor: what images are compared in, None where none are.
    """

    plan: Plan
    images: Data
    node: Any
    n: int
    can: dict[str, Metric]
    wanted: dict[str, Metric]
    passes: dict[str, Metric]
    sampled: dict[str, Metric]
    extractor: features.Extractor | None
