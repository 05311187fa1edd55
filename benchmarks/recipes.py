"""Quality of the recipes: trains a recipe as its record says, evaluates it, and writes its figures into the record.

    python -m benchmarks.recipes vae_digits [--seeds 0 1 2] [--train data.root=../shared/data]

results/recipes.json has an entry for each recipe: its commands, with {seed} and {run} for the seed and the run directory, and a
run for each seed with its figures. A figure that the commands no longer give stays, marked with the commit it was measured at.
The time of training is CPU time, so set OMP_NUM_THREADS=1 for that of one thread.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, hardware, origin, parse, write

RECORD = RESULTS / "recipes.json"
ORIGIN = "commit", "uncommitted", "date"


def printed(output: str, suffix: str = "") -> dict[str, dict[str, Any]]:
    """The figures in the JSON lines that evaluate.py prints; `suffix` is added to their names."""
    figures: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        if "metric" in found:
            renamed = {"value": "value", "low": "low", "high": "high", "floor": "reference"}
            about = {new: found[old] for old, new in renamed.items() if old in found}
            figures[found["metric"] + suffix] = {**figures.get(found["metric"] + suffix, {}), **about}
            if "memorised" in found:
                figures["memorised"] = {"value": found["memorised"]}
        else:
            own = {name + suffix: {"value": value} for name, value in found.items() if isinstance(value, int | float)}
            likelihood = next(
                (name for name in ("bits_per_dim", "nats_per_token", "bits_per_sample") if name in found), None
            )
            if likelihood:
                about = {key: found[key] for key in ("standard_error", "bound") if key in found}
                own[likelihood + suffix] |= about
            figures |= own
    return figures


def cpu_seconds() -> float:
    """CPU time of the commands that have ended, which other work on the machine disturbs least."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def logged(run: Path) -> dict[str, dict[str, Any]]:
    """The last value of everything in a run's metrics.csv."""
    lines = (run / "metrics.csv").read_text().splitlines()[1:] if (run / "metrics.csv").exists() else []
    return {name: {"value": float(value)} for _, name, value in (line.split(",") for line in lines)}


def perform(commands: Iterable[str], seed: int, run: Path, more: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Run the commands of a recipe, the first with the overrides `more`; returns all figures that they give, by name.

    Raises CalledProcessError if one fails.
    """
    figures: dict[str, dict[str, Any]] = {}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for k, command in enumerate(commands):
        words = shlex.split(command.format(seed=seed, run=run))[1:] + ([*more, "logger=none"] if k == 0 else [])
        start = cpu_seconds()
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=env, check=True, text=True, stdout=subprocess.PIPE
        )
        if k == 0:
            figures = {"seconds": {"value": round(cpu_seconds() - start)}, **logged(run)}
        method = [word.removeprefix("likelihood=") for word in words if word.startswith(("likelihood=", "beams="))]
        figures |= printed(done.stdout, "".join(f", {name}" for name in method))
    return figures


def renew(entry: dict[str, Any], seed: int, figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """Put a run with these figures into a recipe's entry, in place of that of the same seed; `about` is its origin and hardware.

    The figures are those that any run of the entry has; one that is not found is taken from the old run with its origin.
    """
    old = next((run for run in entry["runs"] if run["seed"] == seed), {"figures": {}})
    names = dict.fromkeys(name for run in entry["runs"] for name in run["figures"])
    kept = {
        name: {**{key: old[key] for key in ORIGIN if key in old}, **figure}
        for name, figure in old["figures"].items()
        if name not in figures
    }
    new = {"seed": seed, **about, "figures": {name: figures[name] for name in names if name in figures} | kept}
    if not new["figures"].keys() - kept.keys() - {"seconds"}:
        raise SystemExit("none of the recipe's figures was found in what its commands gave: the record stays as it is")
    others = [run for run in entry["runs"] if run["seed"] != seed]
    entry["runs"] = sorted([*others, new], key=lambda run: run["seed"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=json.loads(RECORD.read_text()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", nargs="+", default=[], help="overrides of train.py, such as the data's folder")
    return parse(parser)


def main() -> None:
    args = arguments()
    more = [*args.train, *(["debug=true"] if args.toy else [])]
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            commands = json.loads(RECORD.read_text())[args.recipe]["commands"]
            figures = perform(commands, seed, Path(folder) / "run", more)
        content = json.loads(RECORD.read_text())
        renew(content[args.recipe], seed, figures, {**origin(), "hardware": hardware(torch.device("cpu"))})
        (new,) = [run for run in content[args.recipe]["runs"] if run["seed"] == seed]
        print(json.dumps(new["figures"], indent=1))
        if not args.toy:
            write(RECORD, content)


if __name__ == "__main__":
    main()
