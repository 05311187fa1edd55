"""What the benchmarks share: interleaved rounds, ratios within a round, a table, JSON beside the hardware's name."""

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PART = "BENCHMARK_PART"  # variable that names the file which benchmarks.gpu reads a part's figures from


def parse(parser: argparse.ArgumentParser, **toy: Any) -> argparse.Namespace:
    """The command line's arguments; --toy, which this adds, gives them the values `toy`."""
    parser.add_argument("--toy", action="store_true", help="the least of everything, to see that it runs")
    args = parser.parse_args()
    if args.toy:
        vars(args).update(toy)
    return args


def installed(*packages: str) -> bool:
    """True if all these peer packages can be imported; prints what is missing where one cannot."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        print(f"left out: {error} (pip install -e .[bench])")
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


def report(name: str, device: torch.device, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print the rows as a table and write results/<name>_<cpu or cuda>.json, or the file that benchmarks.gpu asked for."""
    about = {"benchmark": name, "hardware": hardware(device), **facts}
    columns = list(rows[0])
    cells = [
        columns,
        *([f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(*(f"{key}: {value}" for key, value in {**hardware(device), **facts}.items()), sep="\n")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    RESULTS.mkdir(exist_ok=True)
    path = Path(os.environ.get(PART, RESULTS / f"{name}_{device.type}.json"))
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
