"""What finished runs say of themselves, and what may be ranked.

A run brings its config.yaml, metrics.csv, newest grid and cards (`cards/*.json`). What was measured by different protocols is not
ranked.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genai import progress
from genai.cli import flat
from genai.core import metrics_csv
from genai.core.errors import UserError

Curve = list[tuple[int, float]]
BEATS = " beats baseline"
MARKS = "\u2713 better than every trivial baseline, \u2717 not"
DATA = "data_checksum"  # of a protocol, what tells two data sets of one class apart
IGNORED_KEYS = ("run_dir", "name", "resume", "logger", "sampler", "callbacks")  # differ without telling models apart


@dataclass
class Run:
    """What a run directory says of itself."""

    folder: Path
    config: dict[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    grid: Path | None = None
    texts: Path | None = None
    nearest: Path | None = None
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    label: str = ""  # what a table calls it

    @property
    def name(self) -> str:
        return str(self.folder)

    def last(self, metric: str) -> float | None:
        return self.curves[metric][-1][1] if metric in self.curves else None


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Runs, each called by the part of its path that the others do not share. Raises UserError if a folder holds none."""
    runs = [read(folder) for folder in progress.track(folders, "reading runs", len(folders))]
    common = os.path.commonpath([folder.resolve().parent for folder in folders]) if folders else ""
    for run in runs:
        run.label = os.path.relpath(run.folder.resolve(), common)
    return runs


def read(folder: Path) -> Run:
    """Raises UserError if the folder holds no run."""

    from genai.cli import stored_config

    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is not a run: there is no {folder / 'config.yaml'}; name run directories, such as runs/*/*"
        )
    config: Any = stored_config(folder / "config.yaml", ("model", "data"))
    run = Run(folder, config, label=str(folder))
    for row in metrics_csv.rows(folder / "metrics.csv"):
        run.curves.setdefault(row.name, []).append((row.step, row.value))
    run.grid, run.texts = newest(folder, "samples/samples_*.png"), newest(folder, "samples/samples_*.txt")
    run.nearest = newest(folder, "cards/nearest.png")
    for path in sorted((folder / "cards").glob("*.json")):
        try:
            card = json.loads(path.read_text())
            if not isinstance(card["protocol"], dict) or not isinstance(card["value"], int | float):
                raise TypeError("its fields are of other kinds")
            run.cards[card["metric"]] = up_to_date(card)
        except (ValueError, TypeError, KeyError) as error:
            print(f"warning: {path} is damaged ({type(error).__name__}: {error}): left out")
    return run


def up_to_date(card: dict[str, Any]) -> dict[str, Any]:
    """A card whose protocol is in the words of today, so that it is ranked with those of before."""
    extractor = card["protocol"].get("extractor")
    if isinstance(extractor, dict) and extractor.get("kind") == "Judge":
        extractor["kind"] = "Classifier"
    return card


def newest(folder: Path, pattern: str) -> Path | None:
    """The last by name of a run's own files of that pattern, not of what its symbolic links lead to."""
    home = folder.resolve()
    return max((path for path in folder.glob(pattern) if path.resolve().is_relative_to(home)), default=None)


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Config keys whose value is not that of the first run in every other, with all values; `-` where a run has no such key."""
    configs = [flat({k: v for k, v in run.config.items() if k not in IGNORED_KEYS}) for run in runs]
    names = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key, "-") for config in configs]) for key in names]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def check_protocols(runs: Sequence[Run]) -> None:
    """Raise UserError that names the first field in which cards of one metric were measured differently."""
    for metric in dict.fromkeys(name for run in runs for name in run.cards):
        having = [run for run in runs if metric in run.cards]
        first = flat(having[0].cards[metric]["protocol"])
        for run in having[1:]:
            other = flat(run.cards[metric]["protocol"])
            wrong = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            old = [r.name for r, facts in ((having[0], first), (run, other)) if DATA not in facts]
            if len(old) == 1:
                raise UserError(
                    f"the cards of {metric} cannot be ranked: that of {old[0]} is from before cards said which data they are of "
                    f"(protocol.{DATA}): evaluate it again, or show them unranked with --unranked"
                )
            if wrong:
                key, hint = wrong[0], "evaluate both on the same data" if wrong[0] == DATA else "evaluate both alike"
                raise UserError(
                    f"the cards of {metric} cannot be ranked: protocol.{key} is {first.get(key)} in {having[0].name} and "
                    f"{other.get(key)} in {run.name}; {hint}, or show them unranked with --unranked"
                )


def rank_runs(runs: Sequence[Run]) -> list[Run]:
    """Best first by the first metric that all have a card of, else by val/loss where all have one of one model class."""
    for metric, card in runs[0].cards.items():
        if all(metric in run.cards for run in runs):
            return sorted(runs, key=lambda run: run.cards[metric]["value"], reverse=card["better"] == "higher")
    if same_model_class(runs) and all(run.last("val/loss") is not None for run in runs):
        return sorted(runs, key=lambda run: run.last("val/loss") or math.inf)
    return list(runs)


def same_model_class(runs: Sequence[Run]) -> bool:
    """Whether all models are of one class, so that their losses compare."""
    return len({run.config["model"]["_target_"] for run in runs}) == 1


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run: its model and data, its last step, its losses where all models are of one class, its speed, its cards."""
    metrics = dict.fromkeys(name for run in runs for name in run.cards)
    rows = []
    for run in runs:
        steps = [curve[-1][0] for curve in run.curves.values()]
        row: dict[str, Any] = {
            "run": run.label,
            "model": run.config["model"]["_target_"].rpartition(".")[2],
            "data": run.config["data"]["_target_"].rpartition(".")[2],
            "step": max(steps, default=0),
        }
        for name in ("train/loss", "val/loss", "perf/steps_per_second"):
            row[name] = run.last(name) if same_model_class(runs) or "loss" not in name else None
        for metric in metrics:
            card = run.cards.get(metric)
            row[metric] = None if card is None else card["value"]
            row[f"{metric}{BEATS}"] = None if card is None else card.get("beats_baseline")
        row["memorised"] = next((memorisation_text(card) for card in run.cards.values() if "memorised" in card), None)
        rows.append(row)
    return [{key: row[key] for key in row if any(r[key] is not None for r in rows)} for row in rows]


def memorisation_text(card: Mapping[str, Any]) -> bool | str:
    """A card's verdict on whether samples are copies of training images, as text."""
    return "too few to tell" if card["memorised"] is None else card["memorised"]


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of a table to be looked at, where a metric's cell also says whether it beats its baselines."""
    return [name for name in rows[0] if not name.endswith(BEATS)]


def cell(row: Mapping[str, Any], name: str) -> str:
    return format_value(row[name]) + mark(row.get(f"{name}{BEATS}"))


def mark(beats: bool | None) -> str:
    """See MARKS; nothing where there was no baseline."""
    return "" if beats is None else " \u2713" if beats else " \u2717"


def format_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
