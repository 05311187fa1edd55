"""All benchmarks and tests that need a GPU, in calls of under nine minutes; records and failures in results/gpu_<card>.json.

    benchmarks/gpu.sh tests            the tests marked for a GPU
    benchmarks/gpu.sh 1                half of the benchmarks
    benchmarks/gpu.sh 2                the other half
    benchmarks/gpu.sh ddpm_cifar10     nine and a half minutes of training; or stable_cifar10, gpt_shakespeare, stylegan2_cifar10
    benchmarks/gpu.sh 1 --toy          the same parts at the smallest size, also on a CPU, into another folder

A part that fails or takes too long leaves the last lines of its output in the file, and the others go on; the exit code is then
1. A repeated call continues: parts that the file has for this commit and these versions are skipped, failed ones come last. The
trainings read CIFAR-10 from --data (or $CIFAR10), a folder or zip of class folders, and tiny Shakespeare from --text (or
$SHAKESPEARE). $COMMIT names the commit where there is no git.

Where there is no network, bring the missing packages along as wheels in a folder that git ignores:

    pip download --only-binary :all: --python-version 3.12 -d wheels hydra-core omegaconf wandb diffusers x-transformers
    pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3          (it is published as source alone)
    pip install --no-index --find-links wheels hydra-core omegaconf wandb

the last of them on the machine with the GPU. Peers that are not installed are left out of the tables.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import PART, RESULTS, ROOT, origin, write

LIMIT = 530  # seconds of a call
LEAST = 20  # seconds left below which no part starts
TRAINING = 570
LINES = 20  # kept of a failure's output


class Part(NamedTuple):
    """The arguments of a command, and the seconds that it may take."""

    arguments: tuple[str, ...]
    seconds: int = 300


def benchmark(name: str, *arguments: str) -> Part:
    return Part(("-m", f"benchmarks.{name}", *arguments))


TESTS = "-m", "pytest", "-o", "addopts=-q", "-m", "gpu", "--continue-on-collection-errors"
CALLS: dict[str, dict[str, Part]] = {
    "tests": {"tests": Part(TESTS, LIMIT)},
    "1": {
        "step": benchmark("step", "--shapes", "64,3,32,32", "128,3,256,256"),
        "sample": benchmark("sample"),
        "sample_network": benchmark(
            "sample", "--network", "128", "--dtype", "bfloat16", "--batch", "128", "--rounds", "5"
        ),
        "unet": benchmark("unet", "--channels", "128", "--batch", "128"),
    },
    "2": {
        "loop": benchmark("loop"),
        "gpt_train": benchmark("gpt_train"),
        "gpt_generate": benchmark("gpt_generate"),
        "wavenet": benchmark("wavenet"),
        "vae": benchmark("vae"),
        "latent": benchmark("latent", "--channels", "128"),
    },
    **{
        name: {f"training_{name}": Part(("-m", "benchmarks.training", name), TRAINING)}
        for name in ("ddpm_cifar10", "stable_cifar10", "gpt_shakespeare", "stylegan2_cifar10")
    },
}


def slug(card: str) -> str:
    """A card's name as part of a file name: NVIDIA H100 80GB HBM3 gives nvidia_h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")


def versions() -> dict[str, Any]:
    """The commit, and the versions of the packages that decide speed."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"commit": origin(".")["commit"], "torch": torch.__version__, "triton": triton}


def perform(
    arguments: Sequence[str], seconds: float, env: Mapping[str, str], old: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run a part for at most `seconds`; its record is `figures`, or the last lines of a failed one's output are `error`.

    Where packages are missing, the rows that the entry `old` has of them stay.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if old is not None and "rows" in old.get("figures", {}):
            write(report, {**old, **old["figures"]})
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **env, PART: str(report)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output, failed = process.communicate(timeout=seconds)[0], process.returncode != 0
        except subprocess.TimeoutExpired:
            process.kill()
            output, failed = process.communicate()[0] + f"\nstopped after {seconds:.0f} s", True
        print(output, flush=True)
        output = output.replace(f"{ROOT}{os.sep}", "")  # the file is read elsewhere
        lines = [line for line in output.splitlines() if line.strip()]
        figures = json.loads(report.read_text()) if report.exists() else {"summary": lines[-1] if lines else ""}
    figures = {key: value for key, value in figures.items() if key not in ("command", "commit", "date")}  # the entry's
    found: dict[str, Any] = {"error": lines[-LINES:]} if failed else {"figures": figures}
    return {"seconds": round(time.monotonic() - start, 1), **found}


def order(call: str, done: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The parts of a call that the file does not have for these versions, failed ones last."""
    same = {name: entry for name, entry in done.items() if all(entry.get(key) == value for key, value in now.items())}
    left = [name for name in CALLS[call] if "figures" not in same.get(name, {})]
    return sorted(left, key=lambda name: name in same)


def call(name: str, card: str, results: Path, toy: bool, env: Mapping[str, str], limit: float = LIMIT) -> bool:
    """Run the remaining parts of a call; False if one failed or there was no time for it."""
    path, now, end, well = results / f"gpu_{slug(card)}.json", versions(), time.monotonic() + limit, True
    if name not in ("tests", "1", "2"):
        end += TRAINING - LIMIT
    content = json.loads(path.read_text()) if path.exists() else {"card": card, "parts": {}}
    for part_name in order(name, content["parts"], now):
        part = CALLS[name][part_name]
        arguments = (
            [*part.arguments, *(["--collect-only", "tests/kernels/test_kernels.py"] if name == "tests" else ["--toy"])]
            if toy
            else part.arguments
        )
        left = end - time.monotonic()
        if left < LEAST:
            print(f"== {part_name} is left: call this again", flush=True)
            well = False
            continue
        command = " ".join(["python", *arguments])
        print(f"== {command}", flush=True)
        entry = {
            "command": command,
            **now,
            "date": origin()["date"],
            **perform(arguments, min(part.seconds, left), env, content["parts"].get(part_name)),
        }
        content["parts"][part_name] = entry
        write(path, content)
        well = well and "error" not in entry
        print(f"== {entry['seconds']} s{', failed' if 'error' in entry else ''}", flush=True)
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="*", choices=[*CALLS, []], help="default: tests 1 2")
    parser.add_argument("--toy", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument(
        "--results", type=Path, help="folder of the file; default: benchmarks/results, runs/toy with --toy"
    )
    parser.add_argument("--data", help="CIFAR-10 as a folder or zip of class folders")
    parser.add_argument("--text", help="tiny Shakespeare")
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: --toy tries the same commands without one")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = args.results or (ROOT / "runs" / "toy" if args.toy else RESULTS)
    env = {key: value for key, value in (("CIFAR10", args.data), ("SHAKESPEARE", args.text)) if value}
    well = [call(name, card, results, args.toy, env) for name in args.calls or ("tests", "1", "2")]
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
