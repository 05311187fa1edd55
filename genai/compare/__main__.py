"""Run `python -m genai.compare runs/a runs/b`: prints a table, and writes a CSV file and a self-contained HTML page."""

from genai.core import interrupt, streams

if __name__ == "__main__":
    interrupt.exit_on_signal()  # before the imports, which take long
    streams.protect_output()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from genai import progress
from genai.cli import fail, one_sentence
from genai.compare.page import report
from genai.compare.runs import MARKS, cell, check_protocols, columns, rank_runs, read_all, table
from genai.core import files
from genai.core.errors import UserError
from genai.core.runs import Facts, runs_below

ELSEWHERE = "name another folder with --out"


def compare(folders: Sequence[Path], out: Path, unranked: bool = False) -> list[Facts]:
    """Write report.html and report.csv to `out`; returns the rows of the table, best first.

    Raises UserError without runs, or unless `unranked` for cards of different protocols.
    """
    files.check_folder(out, "--out")
    runs = read_all(folders)
    if not runs:
        raise UserError("there are no runs to compare: name at least one run directory")
    if not unranked:
        check_protocols(runs)
        runs = rank_runs(runs)
    rows = table(runs)
    with progress.task("drawing the report"):
        files.write_text(out / "report.html", report(runs), hint=ELSEWHERE)
    files.write_csv(out / "report.csv", rows, ELSEWHERE)
    return rows


def expand_folders(names: Sequence[str]) -> list[Path]:
    """Return the run directories among `names`, and those below each folder that is not a run itself.

    Raises UserError for a name that holds no run.
    """
    found: list[Path] = []
    if "" in names:
        raise UserError("a name of a run directory is empty: leave it out")
    for name in map(Path, names):
        below = runs_below(name) if name.is_dir() else []
        if not below:
            raise UserError(f"{name} holds no run: name run directories, or a folder of them, such as runs/")
        found += below
    return found


def main() -> None:
    """Run the command with sys.argv."""
    prog = sys.argv[0] if sys.argv[0].startswith("genai ") else "python -m genai.compare"
    parser = argparse.ArgumentParser(prog=prog, description="Compare finished runs.")
    parser.error = lambda message: fail(UserError(f"{message} (--help lists all)"))  # type: ignore[method-assign]
    parser.add_argument("runs", nargs="+", help="run directories, or folders of them")
    parser.add_argument("--out", default="runs/compare", help="where report.html and report.csv go")
    parser.add_argument("--unranked", action="store_true", help="show cards of different protocols, in the order given")
    parser.add_argument("--wandb", metavar="PROJECT", help="also log the table and the page to this W&B project")
    args = parser.parse_args()
    with one_sentence():
        if not args.out:
            raise UserError("--out is empty: name a folder")
        rows = compare(expand_folders(args.runs), Path(args.out), args.unranked)
    names = columns(rows)
    terminal = Table(*names, caption=MARKS if len(names) < len(rows[0]) else None)
    for row in rows:
        terminal.add_row(*(cell(row, name) for name in names))
    progress.console().print(terminal)
    print(f"{args.out}/report.html, report.csv")
    if args.wandb:
        from genai.train.trackers import log_comparison

        log_comparison(rows, Path(args.out) / "report.html", args.wandb)


if __name__ == "__main__":
    with interrupt.raise_on_signal():
        main()
