"""Measuring a loaded model from Python, as `evaluate.py` measures a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from genai.checkpoint import Loaded
from genai.cli.door import compose
from genai.core.errors import UserError
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

    Returns:
        figure -> value, with the facts that decide it (split, n, seed, step, ...), and `cards`, one record for each metric.

    Raises:
        UserError: for what this model or this data cannot be measured by.
    """
    if not isinstance(loaded, Loaded):
        raise UserError(
            f"{loaded!r} is not a loaded model: evaluate(load({str(loaded)!r})) measures a run or checkpoint"
        )
    chosen = {"extractor": extractor, "likelihood": likelihood}
    cfg = compose([f"{key}={name}" for key, name in chosen.items() if isinstance(name, str)], "evaluate")
    nodes = {key: dict(node) for key, node in chosen.items() if isinstance(node, Mapping)}
    counts = {"split": split, "n": n, "repeats": repeats, "seed": seed, "batch_size": batch_size}
    for key, value in {**nodes, **counts, "baselines": baselines, "root": None if root is None else str(root)}.items():
        cfg[key] = value
    ranges.check(cfg, "evaluate")
    facts, cards = measure(loaded, cfg, [metrics] if isinstance(metrics, str) else metrics)
    return {**{card["metric"]: card["value"] for card in cards}, **facts, "cards": cards}
