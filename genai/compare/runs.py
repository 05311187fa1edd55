"""Read finished runs, and decide which of them may be ranked.

A run is read from its config.yaml, metrics.csv, newest grid of samples and cards (`cards/*.json`). Cards with different protocols
are not ranked.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genai import progress
from genai.cli import flatten
from genai.core import metrics_csv
from genai.core.errors import UserError
from genai.core.runs import Card, Facts

Curve = list[tuple[int, float]]
BEATS = " beats baseline"
MARKS = "\u2713 better than every trivial baseline, \u2717 not"
DATA = "data_checksum"  # field of a protocol that distinguishes data sets of the same class
IGNORED_KEYS = (
    "run_dir",
    "name",
    "resume",
    "logger",
    "sampler",
    "callbacks",
)  # differ between runs without describing the model


@dataclass
class Run:
    """The content of a run directory that is compared."""

    folder: Path
    config: Facts
    curves: dict[str, Curve] = field(default_factory=dict)
    grid: Path | None = None
    texts: Path | None = None
    sound: Path | None = None
    nearest: Path | None = None
    cards: dict[str, Card] = field(default_factory=dict)
    label: str = ""  # its name in tables

    @property
    def name(self) -> str:
        return str(self.folder)

    def last(self, metric: str) -> float | None:
        return self.curves[metric][-1][1] if metric in self.curves else None


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Read runs; the label of each is the part of its path that they do not share. Raises UserError if a folder is not a run."""
    runs = [read(folder) for folder in progress.track(folders, "reading runs", len(folders))]
    common = os.path.commonpath([folder.resolve().parent for folder in folders]) if folders else ""
    for run in runs:
        run.label = os.path.relpath(run.folder.resolve(), common)
    return runs


def read(folder: Path) -> Run:
    """Read one run; damaged cards are left out with a warning. Raises UserError if the folder is not a run."""

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
    run.sound = newest(folder, "samples/samples_*.wav")
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


def up_to_date(card: Card) -> Card:
    """Rename what an older card's protocol calls differently, so that it can be ranked with newer ones."""
    extractor = card["protocol"].get("extractor")
    if isinstance(extractor, dict) and extractor.get("kind") == "Judge":
        extractor["kind"] = "Classifier"
    return card


def newest(folder: Path, pattern: str) -> Path | None:
    """Return the last file by name that matches a pattern in a run, without files that symbolic links outside lead to."""
    home = folder.resolve()
    return max((path for path in folder.glob(pattern) if path.resolve().is_relative_to(home)), default=None)


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Return (key, values) of the config keys whose values differ between runs; "-" where a run does not have the key."""
    configs = [flatten({k: v for k, v in run.config.items() if k not in IGNORED_KEYS}) for run in runs]
    names = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key, "-") for config in configs]) for key in names]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def check_protocols(runs: Sequence[Run]) -> None:
    """Raise UserError that names the first field in which the protocols of a metric's cards differ."""
    for metric in dict.fromkeys(name for run in runs for name in run.cards):
        having = [run for run in runs if metric in run.cards]
        first = flatten(having[0].cards[metric]["protocol"])
        for run in having[1:]:
            other = flatten(run.cards[metric]["protocol"])
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
    """Sort runs, best first: by the first metric of which all have a card, else by val/loss if all models are of one class."""
    for metric, card in runs[0].cards.items():
        if all(metric in run.cards for run in runs):
            return sorted(runs, key=lambda run: run.cards[metric]["value"], reverse=card["better"] == "higher")
    if same_model_class(runs) and all(run.last("val/loss") is not None for run in runs):
        return sorted(runs, key=lambda run: run.last("val/loss") or math.inf)
    return list(runs)


def same_model_class(runs: Sequence[Run]) -> bool:
    """Tell whether all models are of one class, so that their losses are comparable."""
    return len({run.config["model"]["_target_"] for run in runs}) == 1


def table(runs: Sequence[Run]) -> list[Facts]:
    """Return a row for each run: model, data, last step, losses if all models are of one class, speed, and cards."""
    metrics = dict.fromkeys(name for run in runs for name in run.cards)
    rows = []
    for run in runs:
        steps = [curve[-1][0] for curve in run.curves.values()]
        row: Facts = {
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
    """Return whether a card says that samples are copies of training images, or "too few to tell"."""
    return "too few to tell" if card["memorised"] is None else card["memorised"]


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the columns to display; the cell of a metric includes whether it beats its baselines."""
    return [name for name in rows[0] if not name.endswith(BEATS)]


def cell(row: Mapping[str, Any], name: str) -> str:
    """Format one cell of the table."""
    return format_value(row[name]) + mark(row.get(f"{name}{BEATS}"))


def mark(beats: bool | None) -> str:
    """Return the mark for beating the baselines, see MARKS; empty without baselines."""
    return "" if beats is None else " \u2713" if beats else " \u2717"


def format_value(value: object) -> str:
    """Format a value for display, floats with four digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
