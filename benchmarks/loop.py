"""What the training loop adds to a step: `train.py` with all its callbacks and loggers over a bare loop.

    python -m benchmarks.loop [--rounds 40] [--window 50]

Both train the same small MLP with the same optimiser on a DataLoader over the same stream. Ours is `train.py` itself: Lightning,
averaging, clipping, the finite check, seeding, metrics.csv, W&B offline, the progress callback, logging every 50
steps; evaluation, grids and saves fall outside the timed windows. The two take turns, a window of steps each, short
because a shared machine changes its speed within seconds: the ratio is steadier than the milliseconds.
Target: at most 0.6 ms added to a step of 1 ms.
"""

import argparse
import copy
import os
import statistics
import tempfile

import lightning as L

from benchmarks.common import clock, ratio, report, setup, spread
from genai.cli import composed
from genai.train.lit import LitModel
from genai.train.run import run

WARMUP = 100
FAR = 10**9


class Bare:
    """The least that trains `lit`'s model on its data."""

    def __init__(self, lit: LitModel):
        self.model, self.device = copy.deepcopy(lit.model), lit.device
        self.stream = iter(lit.train_dataloader())
        self.optimizer = lit.optim(self.model)

    def train(self, steps: int) -> None:
        for step in range(steps):
            (batch,) = next(self.stream)
            loss = self.model({name: value.to(self.device) for name, value in batch.items()}, step).total
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Turns(L.Callback):
    """After each window of the run's steps, as many of the bare loop; `seconds` per step of both, by window."""

    seconds: tuple[list[float], list[float]]

    def __init__(self, window: int):
        self.window = window
        Turns.seconds = [], []

    def on_train_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        self.bare = Bare(pl_module)
        self.bare.train(WARMUP)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_) -> None:
        done, device = trainer.global_step - WARMUP, pl_module.device
        if done < 0 or done % self.window:
            return
        if done > 0:
            ours, bare = self.seconds
            ours.append((clock(device) - self.start) / self.window)
            start = clock(device)
            self.bare.train(self.window)
            bare.append((clock(device) - start) / self.window)
        self.start = clock(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--window", type=int, default=50)
    args = parser.parse_args()
    os.environ.update(WANDB_SILENT="true", WANDB_MODE="offline")
    device = setup()
    rows = []
    for name, logger in (("train.py logger=none", "none"), ("train.py, W&B offline", "wandb")):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                "data=toy2d",
                "model=ddpm_mlp",
                "model.net.width=64",
                "model.net.blocks=2",
                "data.batch_size=32",
            ]
            overrides += [f"callbacks.{name}.every_steps={FAR}" for name in ("evaluate", "samples", "save")]
            overrides += [
                f"max_steps={WARMUP + args.rounds * args.window + 1}",
                f"run_dir={folder}",
                f"logger={logger}",
            ]
            turns = f"+callbacks.turns={{_target_: {__name__}.Turns, window: {args.window}}}"
            run(composed("train", [*overrides, turns]))
        ours, bare = Turns.seconds
        rows.append(
            {
                "loop": name,
                "ms/step": spread(ours, 1e3, 3),
                "bare ms/step": spread(bare, 1e3, 3),
                "added ms": round(1e3 * statistics.median(a - b for a, b in zip(ours, bare, strict=True)), 3),
                "ours / bare": ratio(ours, bare),
            }
        )
    report("loop", device, rows, rounds=args.rounds, window=args.window)


if __name__ == "__main__":
    main()
