"""Scores of trivial models.

    python -m benchmarks.baselines [--text ../shared/data/tinyshakespeare.txt]

These are what every trained model should exceed. On digits they learn from the training and the validation split and are scored
on the test split: bits per dimension, the peak signal-to-noise ratio of reconstructions, and Fréchet distance, precision and
recall of samples, the mean of three sets of 360 with the least and the greatest. On text, n-gram models learn from the training
split and are scored on the validation split.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, parse, report, setup


def table(folder: str, *overrides: str) -> list[dict]:
    """The rows that `python -m genai.evaluation.baselines` writes with these overrides."""
    out = Path(folder) / "baselines.json"
    command = [sys.executable, "-m", "genai.evaluation.baselines", *overrides, f"out={out}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads(out.read_text())["rows"]


def format_figure(figure: dict | None, digits: int) -> str:
    """Format a figure with its range, where it has one; empty for None."""
    if figure is None:
        return ""
    value, low, high = (f"{figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="../shared/data/tinyshakespeare.txt", help="tiny Shakespeare")
    return parse(parser)


def main() -> None:
    args = arguments()
    device = setup()
    columns = {
        "bits_per_dim": ("bits/dim", 3),
        "nats_per_token": ("nats/token", 3),
        "reconstruction_psnr_db": ("PSNR in dB", 2),
        "frechet": ("Fréchet distance", 1),
        "precision": ("precision", 2),
        "recall": ("recall", 2),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for data, overrides in (
            ("digits", ["data=digits", *(["baseline=markov"] if args.toy else [])]),
            ("tiny Shakespeare", ["data=tiny_shakespeare", f"data.path={Path(args.text).resolve()}", "split=val"]),
        ):
            for row in table(folder, *overrides):
                figures = {title: format_figure(row["metrics"].get(name), n) for name, (title, n) in columns.items()}
                rows.append({"data": data, "baseline": row["what"], **figures})
    report("baselines", args, device, rows, ("data", "baseline"))


if __name__ == "__main__":
    main()
