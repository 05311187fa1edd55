"""Run directories on disk (a folder with a config.yaml), and the types of what is recorded about runs."""

from pathlib import Path
from typing import Any

Card = dict[str, Any]
"""A metric card, one JSON record; `genai.evaluation.cards` lists its fields."""

Facts = dict[str, Any]
"""Plain values by name that come with a figure: a protocol, settings, the columns of a table."""


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def runs_below(folder: Path) -> list[Path]:
    """Return the run directories below a folder, sorted; not what a tracker keeps inside a run."""
    found = {path.parent for path in folder.glob("**/config.yaml")}
    return sorted(run for run in found if not found.intersection(run.parents))


def newest_run(folder: Path) -> Path | None:
    """Return the run below a folder that was written to last; None if there is none."""

    def written(run: Path) -> float:
        last = run / "checkpoints" / "last.ckpt"
        return (last if last.exists() else run / "config.yaml").stat().st_mtime

    return max(runs_below(folder), key=written, default=None)
