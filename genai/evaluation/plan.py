"""The settings of an evaluation, as they are asked for and after they are checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genai.core.runs import Facts
from genai.data.base import Data
from genai.evaluation import features
from genai.evaluation.metrics import Metric


@dataclass
class Plan:
    """The settings of an evaluation.

    Args:
        metrics: names of conf/metrics.yaml, and {name: metric} for others; None for all that one pass over the split gives.
        split: name of the split.
        n: items of the split, or samples of each set; None for as many as the split has.
        repeats: independent sets of samples.
        seed: of the first sample.
        batch_size: items or samples per call of the model.
        extractor: builds the extractor of features from the data, its config and a device.
        likelihood: config node of a likelihood; None for the model's own.
        baselines: True for cards that list trivial models too.
        sampler: config node of the sampler of samples and answers; None for the one that the checkpoint was trained with.
    """

    metrics: Sequence[str | Mapping[str, Metric]] | None
    split: str = "test"
    n: int | None = None
    repeats: int = 5
    seed: int = 0
    batch_size: int = 256
    extractor: Callable[[Data, Any, str], features.Extractor] = features.classifier
    likelihood: Facts | None = None
    baselines: bool = True
    sampler: Facts | None = None


@dataclass
class CheckedPlan:
    """A plan that can be carried out, with what the check found.

    Args:
        images, node: the data and its config; images where the data are images as tokens.
        n: number of items or samples.
        available: the standard metrics that can be computed.
        requested: the metrics asked for, in their order.
        pass_metrics, sample_metrics: those of `requested` from one pass over the split, and from samples.
        extractor: of features; None where no samples are compared by features.
    """

    plan: Plan
    images: Data
    node: Any
    n: int
    available: dict[str, Metric]
    requested: dict[str, Metric]
    pass_metrics: dict[str, Metric]
    sample_metrics: dict[str, Metric]
    extractor: features.Extractor | None
