"""The scores of baselines by the protocol of a card: computed when a data set is first evaluated that way, then cached."""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from genai import progress
from genai.checkpoint.build import build_typed
from genai.cli import conf_dir, config_folders, group_choices, nearest
from genai.core import files
from genai.core.cache import CACHE_HINT, cache_folder
from genai.core.errors import UserError
from genai.core.stored import Node
from genai.data.base import Data, first_items
from genai.data.fingerprint import checksum, dataset_checksum
from genai.data.stream import batches
from genai.evaluation import hidden
from genai.evaluation.baselines.base import Baseline, check, stream, training_data
from genai.evaluation.features import FeatureSet
from genai.evaluation.metrics import Answers, Metric, RealFakePair, compute, compute_pairs, custom_facts

MAX_IMAGES = 10_000  # training images that baselines are fitted on
MAX_TOKENS = 10_000_000  # training tokens, or rows of them, that baselines are fitted on
FORMAT = 2  # version of the cached files
METHODS = {
    "samples": "sample",
    "answers": "answer",
    "likelihoods": "log_prob",
    "hidden": "score_hidden",
    "retrieval": "embed_media",
    "reconstructions": "reconstruct",
}
"""The method of a baseline that a kind of metrics needs."""


def reference_scores(
    data: Data,
    metrics: Mapping[str, Metric],
    split: str,
    n: int,
    real: FeatureSet | None = None,
    latent_dim: int = 0,
) -> dict[str, dict[str, float]]:
    """Return the scores of the baselines as {metric: {description of the baseline: score}}.

    Args:
        data: images or a text.
        metrics: all of samples, or all of a pass over the split.
        split: name of the split.
        n: number of samples, or of items of the split.
        real: the features of the split for metrics of samples; None for metrics of a pass.
        latent_dim: dimension of the model's latent code, for a PCA with as many components.
    """
    figures: dict[str, dict[str, float]] = {name: {} for name in metrics}
    section, facts = ("split", []) if real is None else ("samples", [real.extractor.facts])
    rows: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "baselines.yaml").reference)
    content = dataset_checksum(data, list(dict.fromkeys(["train", split])))
    for row in rows[section]:
        if row["baseline"] == "pca":
            row["components"] = min(latent_dim, math.prod(data.shape), MAX_IMAGES, len(data.splits["train"]))
        baseline = build_typed(row_node(row)[1])
        wanted = {name: metric for name, metric in metrics.items() if can_score(baseline, metric)}
        try:
            check(baseline, data)
        except UserError:
            continue
        path = cache_folder("baselines") / f"{checksum(content, FORMAT, row, split, n, *facts)}.json"
        kept = _read_cache(path)
        if any(cache_key(name, metric) not in kept for name, metric in wanted.items()):
            with progress.task(f"baselines of this data, once: {baseline.what}"):
                most = MAX_IMAGES if data.modality.comparison == "samples" else MAX_TOKENS
                baseline.fit(training_data(data, ["train"], most), 0)
                found = score_baseline(baseline, data, wanted, split, n, real)
            kept |= {cache_key(name, wanted[name]): value for name, value in found.items()}
            files.write_text(path, json.dumps(kept), hint=CACHE_HINT)
        for name, metric in wanted.items():
            figures[name][baseline.what] = kept[cache_key(name, metric)]
    return figures


def cache_key(name: str, metric: Metric) -> str:
    """Return the key of a metric's score in the cache.

    For a metric that is not a standard one it changes with the metric's settings and the source of its module.
    """
    own = custom_facts(name, metric)
    return f"{name} {checksum(own, inspect.getsource(inspect.getmodule(type(metric))))}" if own else name  # type: ignore[arg-type]


def _read_cache(path: Path) -> dict[str, float]:
    """Read cached scores by metric; an empty dict if there are none yet, or the file is damaged."""
    try:
        found = json.loads(path.read_text())
        return {name: float(value) for name, value in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        print(f"warning: {path} is damaged ({type(error).__name__}): made again")
        return {}


def can_score(baseline: Baseline, metric: Metric) -> bool:
    """Tell whether a baseline has the method that a metric needs."""
    return hasattr(baseline, METHODS[metric.kind])


def score_baseline(
    baseline: object,
    data: Data,
    metrics: Mapping[str, Metric],
    split: str,
    n: int,
    real: FeatureSet | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Compute metrics of a fitted baseline: on n items of a split (the whole split of a text), or of n samples, in all classes.

    Args:
        real: the features of the split, for metrics of samples.
        seed: of the first sample.
    """
    found = {}
    for kind in dict.fromkeys(metric.kind for metric in metrics.values()):
        given: Any = (
            _sets(baseline, data, n, real, seed)
            if kind == "samples" and real
            else _items(baseline, data, kind, split, n)
        )
        for name in [name for name, metric in metrics.items() if metric.kind == kind]:
            metric = metrics[name]
            values = (
                compute_pairs(name, metric, data, *given)
                if kind == "reconstructions"
                else compute(name, metric, *given)
            )
            found[name] = metric.of_mean(values.mean().item())
    return found


def _sets(baseline: Any, data: Data, n: int, real: FeatureSet, seed: int) -> tuple[RealFakePair]:
    fake = FeatureSet(real.extractor, real.parts)
    for first in range(0, n, 500):
        label = None if data.classes is None else torch.arange(first, min(first + 500, n)) % data.classes
        speaker = {}  # all of them in turn, each with every class
        if data.speakers is not None:
            speaker = {"speaker": torch.arange(first, min(first + 500, n)) // (data.classes or 1) % data.speakers}
        samples = baseline.sample(min(500, n - first), seed + first, label, **speaker)
        fake.add(data.modality.quantize(samples, data.levels), label)
    return (RealFakePair(real, fake),)


def _items(baseline: Any, data: Any, kind: str, split: str, n: int) -> tuple[Any, ...]:
    """Return the arguments of metrics of items: (-ln p in nats, facts), (scores,), (answers,), or (reconstructions, items)."""
    if kind == "hidden":
        items = next(batches(first_items(data, split, n), n))
        return (hidden.score(baseline, items, data.field, 0),)
    if kind == "answers":
        part = first_items(data, split, n)
        return (Answers.of(data, part, baseline.answer(next(batches(part, n)))),)
    windowed = data.modality.windowed  # a text is scored as one row, so that only its beginning lacks context
    items = (
        {data.field: stream(data.splits[split])[None]} if windowed else next(batches(first_items(data, split, n), n))
    )
    if kind == "reconstructions":
        return baseline.reconstruct(items), items[data.field]
    nats = -baseline.log_prob(items, 0).double()
    targets = (
        items[data.field].shape[1] - 1 if windowed else int(items["mask"][:, 1:].sum()) if "mask" in items else None
    )
    return nats, data.modality.units(nats, targets, data.splits[split], data.shape, data.values)


def row_node(row: Mapping[str, object]) -> tuple[str, Node]:
    """Return (name, node) of a row of conf/baselines.yaml: the baseline's own file, with the row's keys on top.

    Raises UserError for a baseline that does not exist.
    """
    name = str(row.get("baseline")) if isinstance(row, dict) else str(row)
    names = group_choices("baseline", config_folders(None))
    if name not in names:
        raise UserError(f"rows: baseline={name} must be one of {', '.join(names)}{nearest(name, names)}")
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "baseline" / f"{name}.yaml"))
    return name, {**node, **{key: value for key, value in row.items() if key != "baseline"}}
