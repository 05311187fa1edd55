"""Training of a GPU recipe for some minutes.

    python -m benchmarks.training ddpm_cifar10 [--seconds 570] [--data cifar10-subset.zip]

Measures steps, images or windows a second and the validation loss, and keeps a grid of samples. --seconds includes the start
and the samples. CIFAR-10 is read from --data, a folder or zip of class folders ($CIFAR10 by default), tiny Shakespeare from
--text ($SHAKESPEARE). stable_cifar10 spends a quarter of the time on its first stage.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, parse, report, setup

SAMPLING = 60  # seconds reserved for sampling at the end
FOLDER = ("data=image_folder", "data.root={data}")
CAPTIONS = (
    "data=captioned_folder",
    "data.root={data}",
    "data.file=null",
    "data.length=32",
    'data.templates=["a photo of a {{}}","a picture of one {{}}","{{}}"]',
)
NETS = "model.net.channels=8", "model.net.multipliers=[1,1,2]", "model.net.blocks=1"
GENERATOR = "model.generator.widths=[8,8,8,8]", "model.discriminator.widths=[8,8,8,8]", "model.discriminator.group=4"
AUTOENCODER = "autoencoder_cifar10"
# experiment: the overrides for its data, and those of the smallest size
RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ddpm_cifar10": (FOLDER, (*NETS, "data.batch_size=4")),
    AUTOENCODER: (FOLDER, ("data.batch_size=4",)),
    "stable_cifar10": (
        CAPTIONS,
        (
            *NETS,
            "model.net.text.width=16",
            "model.net.text.layers=1",
            "model.net.text.heads=2",
            "compile=false",
            "data.batch_size=4",
        ),
    ),
    "gpt_shakespeare": (
        ("data.path={text}",),
        (
            "model.net.transformer.width=24",
            "model.net.transformer.layers=1",
            "compile=false",
            "data.batch_size=2",
            "data.shape=[16]",
        ),
    ),
    "stylegan2_cifar10": (FOLDER, (*GENERATOR, "model.generator.style=8", "model.latents=8", "data.batch_size=4")),
}


def overrides(experiment: str, data: str, text: str, toy: bool, folder: Path) -> list[str]:
    """Overrides of train.py for a recipe: its data, and no samples or checkpoints between steps."""
    given, small = RECIPES[experiment]
    least = ["max_steps=2", "data.num_workers=0", "log_every_steps=1", "callbacks.evaluate.n=4", *small] if toy else []
    every = 1 if toy else 250
    return [
        f"experiment={experiment}",
        *(o.format(data=data, text=text) for o in given),
        f"run_dir={folder}",
        "logger=none",
        f"callbacks.evaluate.every_steps={every}",
        "callbacks.samples=null",
        "callbacks.save.every_steps=null",
        *least,
    ]


def train(arguments: list[str], end: float) -> None:
    """Run train.py and stop it at `end` as Ctrl-C would. Raises CalledProcessError if it fails."""
    process = subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT, start_new_session=True)
    try:
        process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait(SAMPLING / 2)
    finally:
        process.kill()
    if process.returncode not in (0, 130, -signal.SIGINT):
        raise subprocess.CalledProcessError(process.returncode, "train.py")


def figures(folder: Path) -> dict[str, Any]:
    """The last losses in metrics.csv, the step, and the median speed."""
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    speeds = [float(value) for _, name, value in rows if name == "perf/samples_per_second"]
    last = {name: float(value) for _, name, value in rows if name in ("train/loss", "val/loss", "val/g_loss")}
    return {
        "step": max(int(step) for step, *_ in rows),
        "samples/s": statistics.median(speeds) if speeds else None,
        **last,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[name for name in RECIPES if name != AUTOENCODER])
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--data", default=os.environ.get("CIFAR10", "../shared/data/cifar10-subset.zip"))
    parser.add_argument("--text", default=os.environ.get("SHAKESPEARE", "../shared/data/tinyshakespeare.txt"))
    return parse(parser)


def main() -> None:
    start, args = time.monotonic(), arguments()
    device, end = setup(), start + args.seconds - SAMPLING
    with tempfile.TemporaryDirectory() as folder:
        runs, more = Path(folder), []
        if args.experiment == "stable_cifar10":
            train(overrides(AUTOENCODER, args.data, args.text, args.toy, runs / "stage"), start + args.seconds / 4)
            more = [f"codec.ckpt={runs / 'stage' / 'checkpoints' / 'last.ckpt'}"]
        train([*overrides(args.experiment, args.data, args.text, args.toy, runs / "run"), *more], end)
        found = figures(runs / "run")
        out, n = runs / "samples", 4 if args.toy else 64
        sampled = [sys.executable, "sample.py", f"ckpt={runs / 'run'}", f"n={n}", f"out={out}"]
        subprocess.run(sampled, cwd=ROOT, check=True)
        shown = {}
        for name in ("grid.png", "samples.txt"):
            if (out / name).exists():
                kept = f"gpu_{args.experiment}{Path(name).suffix}"
                shown = {"samples": kept}
                if not args.toy:
                    (RESULTS / kept).write_bytes((out / name).read_bytes())
    rows = [{"experiment": args.experiment, "seconds": round(time.monotonic() - start), **found}]
    report(f"training_{args.experiment}", args, device, rows, data=Path(args.data).name, gpu_memory=memory(), **shown)


def memory() -> str | None:
    return f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
