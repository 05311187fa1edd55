"""Metric cards: a figure with everything that determines it, so that two figures are compared only if that agrees.

A card is JSON with these fields:

- `value` with `low` and `high`: the least and largest over independent sets of samples, or the 95 % bootstrap interval of a mean
  over items.
- `protocol`: data, n, split, extractor, precision and the like; two cards are ranked only if all of it agrees.
- `floor`: the value of real data against other real data at the same n.
- `baselines`: the values of trivial models, and `beats_baseline`, whether the model is better than all of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genai.core import files
from genai.core.runs import Card, Facts
from genai.data.fingerprint import split_checksum
from genai.evaluation.baselines.vectors import TrainingCopy
from genai.evaluation.metrics import Metric, custom_facts
from genai.evaluation.plan import CheckedPlan


def data_facts(checked: CheckedPlan) -> Facts:
    """Return the fields of the protocol that describe the data: class, image shape, and checksum of the split's items."""
    data = checked.images
    shape = {} if data.modality.windowed else {"shape": list(data.shape)}
    return {"data": checked.node["_target_"], **shape, "data_checksum": split_checksum(data.splits[checked.plan.split])}


def card(
    name: str,
    metric: Metric,
    value: float,
    low: float,
    high: float,
    floor: float | None,
    baselines: Mapping[str, float],
    facts: Mapping[str, Any],
) -> Facts:
    """Make one card.

    A baseline counts as beaten if even the worse end of the interval is better. Copies of the training data are listed, but
    need not be beaten: they contain nothing new.

    Args:
        floor: value of real data against real data, None if there is none.
        baselines: values of trivial models by their description.
        facts: further fields of the card, `protocol` among them.
    """
    worst, sign = (high, -1) if metric.better == "lower" else (low, 1)
    others = [figure for what, figure in baselines.items() if what != TrainingCopy.what]
    figures = {"value": value, "low": low, "high": high, **({} if floor is None else {"floor": floor})}
    own = custom_facts(name, metric)
    return {
        "metric": name,
        **{key: round(figure, 5) for key, figure in figures.items()},
        "better": metric.better,
        **({"unit": metric.unit} if metric.unit else {}),
        "baselines": {what: round(figure, 5) for what, figure in baselines.items()},
        "beats_baseline": all(sign * worst > sign * figure for figure in others) if others else None,
        **facts,
        **({"protocol": {**facts["protocol"], "metric": own}} if own else {}),
    }


def write(cards: list[Card], run: Path) -> None:
    """Write each card to cards/<metric>.json of a run, replacing an earlier one of that metric."""
    for found in cards:
        path = run / "cards" / f"{found['metric']}.json"
        files.write_text(path, json.dumps(found, indent=2) + "\n", within=run)


def direction(run: Path, metric: str) -> str | None:
    """Return "lower" or "higher", whichever a run's card of a metric calls better; None if no card can be read."""
    try:
        return json.loads((run / "cards" / f"{metric}.json").read_text())["better"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def table(cards: list[Card]) -> tuple[list[str], list[list[Any]]]:
    """Return (column names, rows) of cards, as a table for a tracker."""
    head = ["metric", "value", "low", "high", "floor", "beats_baseline", "memorised", "step"]
    rows = [
        [found.get(key) for key in head] + [json.dumps(found["baselines"]), json.dumps(found["protocol"])]
        for found in cards
    ]
    return [*head, "baselines", "protocol"], rows
