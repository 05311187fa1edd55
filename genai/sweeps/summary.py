"""The summary of a sweep: a table on the terminal and in summary.csv, and a plot in summary.png."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genai import progress
from genai.core import files
from genai.core.errors import UserError
from genai.core.runs import Facts
from genai.sweeps.jobs import journal, last_values
from genai.sweeps.search import Settings, metric_value


def summarise(folder: Path, settings: Settings, unfinished: Sequence[str]) -> None:
    """Write and print the summary. Raises UserError that names unfinished jobs, or a metric that no run has."""
    rows = rank_jobs(folder, settings)
    if not rows:
        return
    files.write_csv(folder / "summary.csv", rows)
    show(rows)
    finished = [row for row in rows if row["status"] == "finished"]
    picture = "" if settings.metric is None else plot(folder, settings.metric, finished)
    print(f"{folder}/summary.csv{picture}", flush=True)
    if unfinished:
        reasons = {row["job"]: row["reason"] or row["status"] for row in rows}
        named = "; ".join(f"{key} ({reasons.get(key, 'not started')})" for key in unfinished)
        raise UserError(f"{len(unfinished)} of {len(rows)} jobs did not finish: {named}; the same command tries again")
    if settings.metric is not None and all(row[settings.metric] is None for row in finished):
        metric_value(folder / finished[0]["job"], settings.metric)


def rank_jobs(folder: Path, settings: Settings) -> list[Facts]:
    """Return a row for each job with status, swept values, metric and reason of failure; best first if there is a metric."""
    metric, sign = settings.metric, 1 if settings.direction == "minimize" else -1
    rows = []
    for key, record in journal(folder).items():
        reached: Facts = {"reason": record.get("reason")}
        if metric is not None:
            value = last_values(folder / key).get(metric) if record["status"] == "finished" else None
            reached = {metric: value, **reached}
        rows.append({"job": key, "status": record["status"], **record["values"], **reached})
    if metric is None:
        return rows
    return sorted(rows, key=lambda row: math.inf if row[metric] is None else sign * row[metric])


def show(rows: Sequence[Facts]) -> None:
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    progress.console(markup=False).print(table)


def plot(folder: Path, metric: str, rows: Sequence[Facts]) -> str:
    """Plot the metric against every axis to summary.png; returns the end of the sentence that reports it."""
    rows = [row for row in rows if row[metric] is not None]
    axes = [key for key in (rows[0] if rows else ()) if key not in ("job", "status", metric, "reason")]
    if not axes:
        return ""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "; summary.png needs matplotlib: pip install matplotlib"
    figure = Figure(figsize=(4 * len(axes), 3.5), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(axes), squeeze=False, sharey=True)[0], axes, strict=True):
        given = [number(row[key]) for row in rows]
        numeric = not any(isinstance(x, str) for x in given)
        if numeric and min(given) > 0 and max(given) > 20 * min(given):
            panel.set_xscale("log")
        panel.scatter(given if numeric else [row[key] for row in rows], [row[metric] for row in rows], alpha=0.7)
        panel.set_xlabel(key)
    figure.supylabel(metric)
    figure.savefig(folder / "summary.png", dpi=120)
    return ", summary.png"


def number(text: str) -> Any:
    """Convert a text to a number if it is one."""
    try:
        return float(text)
    except ValueError:
        return text
