"""Measuring a loaded model from Python, as `evaluate.py` measures a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf

from genai.checkpoint import Loaded
from genai.cli.door import compose
from genai.core.errors import UserError, at_least, show
from genai.core.runs import Facts
from genai.evaluation.run import Entries, measure
from genai.ranges import check as ranges


def evaluate(
    loaded: Loaded,
    split: str = "test",
    metrics: str | Entries | None = None,
    n: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    batch_size: int = 256,
    extractor: str | Mapping[str, object] | None = None,
    likelihood: str | Mapping[str, object] | None = None,
    baselines: bool = True,
    root: str | Path | None = None,
    sampler: str | Mapping[str, object] | None = None,
) -> Facts:
    """Measure a loaded model on a split of the data it was trained on; the numbers are those of `evaluate.py`.

    The cards are also written to the checkpoint's folder and to the run's `cards/`, where `genai compare` finds it.

    Args:
        split: test, val or train.
        metrics: names of conf/metrics.yaml, and {name: metric} or {name: config node} for your own; None: all that one pass
            over the split gives.
        n: items of the split, or samples of each set; None: as many as the split has.
        repeats: independent sets of samples.
        seed: of the first sample, or of what a likelihood draws.
        batch_size: items in memory at once.
        extractor: of image features, a name in conf/extractor or a config node.
        likelihood: a name in conf/likelihood or a config node; None: the model's own.
        baselines: True also measures trivial models, for comparison.
        root: folder or file of the data, if it is not where the run had it.
        sampler: of samples and answers, a name in conf/sampler or a config node; None: the one that the model was trained with.

    Returns:
        figure -> value, with the facts that decide it (split, n, seed, step, ...), and `cards`, one record for each metric.

    Raises:
        UserError: for what this model or this data cannot be measured by.
    """
    if not isinstance(loaded, Loaded):
        hint = repr(str(loaded)) if isinstance(loaded, str | Path) else "..."
        raise UserError(f"{show(loaded)} is not a loaded model: evaluate(load({hint})) measures a run or checkpoint")
    listed = [metrics] if isinstance(metrics, str) else metrics
    if listed is not None and not (isinstance(listed, list | tuple) and listed and all(map(_is_entry, listed))):
        raise UserError(f"metrics={show(metrics)} must be a name, or a list of names and {{name: metric}}, or None")
    chosen = {"extractor": extractor, "likelihood": likelihood, "sampler": sampler}
    cfg = compose([f"{key}={name}" for key, name in chosen.items() if isinstance(name, str)], "evaluate")
    nodes = {key: dict(node) for key, node in chosen.items() if isinstance(node, Mapping)}
    OmegaConf.set_struct(cfg, False)  # a group without a choice has no key
    counts = {"repeats": at_least(repeats, 1, "repeats"), "seed": at_least(seed, 0, "seed")}
    counts |= {"n": None if n is None else at_least(n, 1, "n"), "batch_size": at_least(batch_size, 1, "batch_size")}
    for key, value in {
        **nodes,
        **counts,
        "split": split,
        "baselines": baselines,
        "root": None if root is None else str(root),
    }.items():
        cfg[key] = value
    ranges.check(cfg, "evaluate")
    with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
        facts, cards = measure(loaded, cfg, listed)
    return {**{card["metric"]: card["value"] for card in cards}, **facts, "cards": cards}


def _is_entry(entry: object) -> bool:
    """Tell whether an entry of metrics= is a name, or {name: metric}."""
    if isinstance(entry, Mapping):
        return bool(entry) and all(isinstance(name, str) and metric is not None for name, metric in entry.items())
    return isinstance(entry, str) and entry != ""
