"""What trivial models reach by the protocol of a card: computed when a data set is first evaluated so, and kept."""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from genai.checkpoint.build import build_typed
from genai.cli import choices_of, conf_dir, config_folders, nearest
from genai.core import files
from genai.core.cache import CACHE_HINT, cache_folder
from genai.core.errors import UserError
from genai.data.base import Data, first_items
from genai.data.fingerprint import checksum, dataset_checksum
from genai.data.stream import batches
from genai.evaluation.baselines.base import check, stream, training_data
from genai.evaluation.features import FeatureSet
from genai.evaluation.likelihood import to_units
from genai.evaluation.metrics import Metric, RealFakePair, compute, custom_facts

MAX_IMAGES = 10_000  # training images that they learn from, and
MAX_TOKENS = 10_000_000  # tokens
FORMAT = 2  # of what is kept
ANSWERS = {"samples": "sample", "likelihoods": "log_prob", "reconstructions": "reconstruct"}
"""The methods that answer metrics, by what these are of."""


def reference_scores(
    data: Data,
    metrics: Mapping[str, Metric],
    split: str,
    n: int,
    real: FeatureSet | None = None,
    latent_dim: int = 0,
) -> dict[str, dict[str, float]]:
    """Metric -> baseline -> figure: with `real`, a split's images as an extractor sees them, of n samples; else of the first
    n items of that split.

    Args:
        data: images or a text.
        numbers: that a model keeps of an image, for principal components.
    """
    figures: dict[str, dict[str, float]] = {name: {} for name in metrics}
    of, facts = ("split", []) if real is None else ("samples", [real.extractor.facts])
    rows: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "baselines.yaml").reference)
    content = dataset_checksum(data, list(dict.fromkeys(["train", split])))
    for row in rows[of]:
        if row["baseline"] == "pca":
            row["components"] = min(latent_dim, math.prod(data.shape), MAX_IMAGES, len(data.splits["train"]))
        baseline = build_typed(row_node(row)[1])
        wanted = {name: metric for name, metric in metrics.items() if can_score(baseline, metric)}
        try:
            check(baseline, data)
        except UserError:
            continue
        path = cache_folder("baselines") / f"{checksum(content, FORMAT, row, split, n, *facts)}.json"
        kept = _kept(path)
        if any(cache_key(name, metric) not in kept for name, metric in wanted.items()):
            print(f"baselines of this data, once: {baseline.what}", flush=True)
            baseline.fit(training_data(data, ["train"], MAX_TOKENS if data.modality.windowed else MAX_IMAGES), 0)
            found = score_baseline(baseline, data, wanted, split, n, real)
            kept |= {cache_key(name, wanted[name]): value for name, value in found.items()}
            files.write_text(path, json.dumps(kept), hint=CACHE_HINT)
        for name, metric in wanted.items():
            figures[name][baseline.what] = kept[cache_key(name, metric)]
    return figures


def cache_key(name: str, metric: Metric) -> str:
    """What a baseline's figure is kept as: of a metric that is not a standard one, anew where that or its module changes."""
    own = custom_facts(name, metric)
    return f"{name} {checksum(own, inspect.getsource(inspect.getmodule(type(metric))))}" if own else name  # type: ignore[arg-type]


def _kept(path: Path) -> dict[str, float]:
    """Figures by metric; none where there are none yet, or the file is damaged."""
    try:
        found = json.loads(path.read_text())
        return {name: float(value) for name, value in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        print(f"warning: {path} is damaged ({type(error).__name__}): made again")
        return {}


def can_score(baseline: Any, metric: Metric) -> bool:
    return hasattr(baseline, ANSWERS[metric.kind])


def score_baseline(
    baseline: Any,
    data: Data,
    metrics: Mapping[str, Metric],
    split: str,
    n: int,
    real: FeatureSet | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """What a baseline reaches: on the n items of a split that a pass measures, on the whole split of a text; and of n samples,
    the classes in turn."""
    found = {}
    for of in dict.fromkeys(metric.kind for metric in metrics.values()):
        given = (
            _sets(baseline, data, n, real, seed) if of == "samples" and real else _items(baseline, data, of, split, n)
        )
        for name in [name for name, metric in metrics.items() if metric.kind == of]:
            found[name] = compute(name, metrics[name], *given).mean().item()
    return found


def _sets(baseline: Any, data: Data, n: int, real: FeatureSet, seed: int) -> tuple[RealFakePair]:
    fake = FeatureSet(real.extractor, real.parts)
    for first in range(0, n, 500):
        label = None if data.classes is None else torch.arange(first, min(first + 500, n)) % data.classes
        samples = baseline.sample(min(500, n - first), seed + first, label)
        fake.add(data.modality.quantize(samples, data.levels), label)
    return (RealFakePair(real, fake),)


def _items(baseline: Any, data: Any, of: str, split: str, n: int) -> tuple[Tensor, Any]:
    """Nats and, in the unit of the data's kind, the facts of them; or what the baseline gives back, and the items."""
    windowed = data.modality.windowed  # then one row, so that context is short at its beginning alone
    items = (
        {data.field: stream(data.splits[split])[None]} if windowed else next(batches(first_items(data, split, n), n))
    )
    if of == "reconstructions":
        return baseline.reconstruct(items), items[data.field]
    nats = -baseline.log_prob(items, 0).double()
    return nats, to_units(nats, items[data.field].shape[1] - 1 if windowed else None, data, split, data.levels)


def row_node(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A row of the config, its baseline's file with the row's own keys on top."""
    name = str(row.get("baseline")) if isinstance(row, dict) else str(row)
    names = choices_of("baseline", config_folders(None))
    if name not in names:
        raise UserError(f"rows: baseline={name} must be one of {', '.join(names)}{nearest(name, names)}")
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "baseline" / f"{name}.yaml"))
    return name, {**node, **{key: value for key, value in row.items() if key != "baseline"}}
