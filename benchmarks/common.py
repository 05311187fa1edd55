"""Helpers that the benchmarks share: interleaved timing, ratios within a round, and the record that a run leaves.

A record is a JSON file in `benchmarks/results`: the command, the commit and the date it was measured at, the hardware, and rows
of figures. `python -m benchmarks.results` writes the tables of the documentation from them.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PART = "BENCHMARK_PART"  # the variable by which benchmarks.gpu names the file it reads a part's record from
MEASURED = ("genai", "conf")  # the code that a figure is of
left_out: list[str] = []  # what this run does not measure although the benchmark can


def parse(parser: argparse.ArgumentParser, **toy: Any) -> argparse.Namespace:
    """Parse the command line; --toy, which this adds, sets the arguments in `toy`."""
    parser.add_argument(
        "--toy", action="store_true", help="the smallest sizes, to see that it runs; no record is written"
    )
    args = parser.parse_args()
    if args.toy:
        vars(args).update(toy)
    return args


def installed(*packages: str) -> bool:
    """True if all these packages can be imported; otherwise the missing one is printed and added to `left_out`."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            print(f"left out: {error} (pip install -e .[bench])")
            left_out.append(package)
            return False
    return True


def setup() -> torch.device:
    """One thread, and a GPU where there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock(device: torch.device) -> float:
    """Seconds of this process's CPU time, which other work on the machine disturbs least; of the wall on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleave(
    cases: Mapping[str, Callable[[], Any]], rounds: int, repeat: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of each case in each round; a round runs every case `repeat` times, in an order that rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        for _ in range(warmup):
            call()
    names = list(cases)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            start = clock(device)
            for _ in range(repeat):
                cases[name]()
            seconds[name].append((clock(device) - start) / repeat)
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the rounds of a / b, each within its round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def spread(values: Sequence[float], scale: float, digits: int) -> str:
    """median [min, max] of the values times `scale`."""
    middle, low, high = (f"{scale * v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


def hardware(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    facts = {"cpu": f"{cpu}, {torch.get_num_threads()} thread", "simd": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    clock_of = "wall, synchronised" if device.type == "cuda" else "process CPU time"
    return {**facts, "torch": torch.__version__, "python": platform.python_version(), "clock": clock_of}


def origin(*paths: str) -> dict[str, Any]:
    """When and at which commit a figure is measured: the last commit that changed `paths`, with `uncommitted` if they differ from
    it; null where there is neither git nor $COMMIT."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments, "--", *(paths or MEASURED)], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    commit, today = os.environ.get("COMMIT"), datetime.date.today().isoformat()
    if commit:
        return {"commit": commit, "date": today}
    changed = {"uncommitted": True} if git("status", "--porcelain", "--untracked-files=no") else {}
    return {"commit": git("log", "-1", "--format=%H") or None, **changed, "date": today}


def command() -> str:
    """The command line of this process, as a person types it."""
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def write(path: Path, content: Any) -> None:
    """Replace a JSON file in one step, so that a process killed meanwhile leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    new.replace(path)


def kept(path: Path, rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the record at `path` that a run with parts left out did not measure, each marked with where it was measured.

    Rows are the same if they agree in the columns `by`.
    """
    if not left_out or not path.exists():
        return []
    old, new = json.loads(path.read_text()), [[row[name] for name in by] for row in rows]
    where = {key: old[key] for key in ("commit", "date", "hardware")}
    return [{"measured": where, **row} for row in old["rows"] if [row.get(name) for name in by] not in new]


def report(
    name: str,
    args: argparse.Namespace,
    device: torch.device,
    rows: list[dict[str, Any]],
    by: Sequence[str] = (),
    **facts: Any,
) -> None:
    """Print the rows as a table and write the record results/<name>_<cpu or cuda>.json, or the file that benchmarks.gpu asks for.

    A run with --toy writes no record of its own. Where a package or a part is left out, the rows that the old record has of it
    stay, marked with their commit; `by` names the columns that tell rows apart, by default the first one.
    """
    columns = list(rows[0])
    cells = [
        columns,
        *([f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(*(f"{key}: {value}" for key, value in {**hardware(device), **facts}.items()), sep="\n")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    path = Path(os.environ.get(PART, RESULTS / f"{name}_{device.type}.json"))
    if args.toy and PART not in os.environ:
        print(f"--toy: {path.name} stays as it is")
        return
    old = kept(path, rows, by or columns[:1])
    if old:
        print(f"kept {len(old)} rows measured before, for want of {', '.join(left_out)}")
    missing = {"left_out": left_out} if left_out else {}
    about = {"benchmark": name, "command": command(), **origin(), "hardware": hardware(device), **facts, **missing}
    write(path, {**about, "rows": [*rows, *old]})
