"""What the training loop adds to a step: all callbacks and loggers over a bare loop on the same stream.

    python -m benchmarks.loop [--rounds 40] [--window 50]

Both train the same small MLP with fused AdamW on the same DataLoader. Ours is everything `train.py` runs: Lightning,
averaging, clipping, the finite check, seeding, metrics.csv, W&B offline, the progress callback, logging every 50
steps; evaluation, grids and saves fall outside the timed windows. The two take turns, a window of steps each, short
because a shared machine changes its speed within seconds: the ratio is steadier than the milliseconds.
Target: at most 0.6 ms added to a step of 1 ms.
"""

import argparse
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch

from benchmarks.common import clock, ratio, report, setup, spread
from genai.data.stream import train_loader
from genai.data.toy2d import Toy2D
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.mlp import MLP
from genai.models.diffusion.samplers import ddim
from genai.models.diffusion.schedules import cosine
from genai.train import trackers
from genai.train.callbacks import Evaluate, File, Progress, Samples, Save, Stop
from genai.train.ema import EMA
from genai.train.lit import LitModel
from genai.train.optim import adamw
from genai.train.record import Record

WARMUP = 100


def model() -> DDPM:
    torch.manual_seed(0)
    return DDPM(MLP(2, 64, 2), cosine(200), [2], "vector", clip=None)


def data() -> Toy2D:
    return Toy2D("moons", 10_000, "vector", [2], None, None, 32)


def bare(device: torch.device) -> Callable[[int], None]:
    """A function that trains for so many steps."""
    net, stream = model().to(device), iter(train_loader(data(), 1, 0, 0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def train(steps: int) -> None:
        for step in range(steps):
            (batch,) = next(stream)
            loss = net({name: value.to(device) for name, value in batch.items()}, step).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(WARMUP)
    return train


class Turns(L.Callback):
    """After each window of our steps, as many of the bare loop; seconds per step of both, by window."""

    def __init__(self, window: int, train: Callable[[int], None]):
        self.window, self.train = window, train
        self.ours: list[float] = []
        self.bare: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        done, device = trainer.global_step - WARMUP, pl_module.device
        if done < 0 or done % self.window:
            return
        if done > 0:
            self.ours.append((clock(device) - self.start) / self.window)
            start = clock(device)
            self.train(self.window)
            self.bare.append((clock(device) - start) / self.window)
        self.start = clock(device)


def ours(turns: Turns, rounds: int, device: torch.device, tracked: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tracker = trackers.wandb(Path(folder), "loop", {}, "genai") if tracked else None
        record = Record(Path(folder), tracker)
        record.cut(None)
        lit = LitModel(model(), data(), functools.partial(adamw, lr=1e-3), EMA, record)
        far = 10**9  # what is due at the last step comes after `turns`, the first of the callbacks
        callbacks = [turns, Evaluate(far, 32), Samples(ddim, far, n=2), Save(far), Progress(), Stop()]
        trainer = L.Trainer(
            max_steps=WARMUP + rounds * turns.window, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator=device.type.replace("cuda", "gpu"),
            devices=1, callbacks=callbacks, plugins=[File({}, {})], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(lit)
        trackers.finish(failed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--window", type=int, default=50)
    args = parser.parse_args()
    os.environ.update(WANDB_SILENT="true", WANDB_MODE="offline")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # as it is where nothing imports Lightning, so for the bare loop
    device = setup()
    rows = []
    for name, tracked in (("ours", False), ("ours, W&B offline", True)):
        turns = Turns(args.window, bare(device))
        ours(turns, args.rounds, device, tracked)
        added = [a - b for a, b in zip(turns.ours, turns.bare, strict=True)]
        rows.append(
            {
                "loop": name,
                "ms/step": spread(turns.ours, 1e3, 3),
                "bare ms/step": spread(turns.bare, 1e3, 3),
                "added ms": round(1e3 * statistics.median(added), 3),
                "ours / bare": ratio(turns.ours, turns.bare),
            }
        )
    report("loop", device, rows, rounds=args.rounds, window=args.window)


if __name__ == "__main__":
    main()
