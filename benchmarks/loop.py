"""Overhead of the training loop.

    python -m benchmarks.loop [--rounds 40] [--window 50]

Compares `train.py`, with all its callbacks and loggers, with a bare loop. Both train the same small MLP with the same optimiser
on a DataLoader over the same stream. `train.py` runs Lightning, averaging, clipping, the check for non-finite values, seeding,
metrics.csv, W&B offline, the progress callback and logging every 50 steps; evaluation, grids and checkpoints fall outside the
timed windows. The two take turns, a window of steps each; windows are short because a shared machine changes its speed within
seconds, so the ratio is steadier than the milliseconds. Target: at most 0.6 ms added to a step of 1 ms.
"""

import argparse
import copy
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning as L

from benchmarks.common import clock, parse, ratio, report, setup, spread
from genai.cli import compose_config
from genai.train.lit import LitModel
from genai.train.run import run

WARMUP = 100
FAR = 10**9


class Bare:
    """The shortest loop that trains `lit`'s model on its data."""

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
    """A callback that trains each peer for as many steps after each window of the run; `seconds` per step of each, by window.

    A peer is built from the LitModel and trains for WARMUP steps before the first window; the run itself is "ours".
    """

    peers: ClassVar[Mapping[str, Callable[[LitModel], Any]]] = {"bare": Bare}
    seconds: dict[str, list[float]]

    def __init__(self, window: int):
        self.window = window
        Turns.seconds = {name: [] for name in ("ours", *self.peers)}

    def on_train_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        self.made = {name: make(pl_module) for name, make in self.peers.items()}
        for peer in self.made.values():
            peer.train(WARMUP)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_) -> None:
        done, device = trainer.global_step - WARMUP, pl_module.device
        if done < 0 or done % self.window:
            return
        if done > 0:
            self.seconds["ours"].append((clock(device) - self.start) / self.window)
            for name, peer in self.made.items():
                start = clock(device)
                peer.train(self.window)
                self.seconds[name].append((clock(device) - start) / self.window)
        self.start = clock(device)


def trained(turns: type[Turns], rounds: int, window: int, *overrides: str) -> dict[str, list[float]]:
    """Seconds per step of `train.py` with these overrides and of its peers, by window; `turns` is imported by its name."""
    with tempfile.TemporaryDirectory() as folder:
        never = [f"callbacks.{name}.every_steps={FAR}" for name in ("evaluate", "samples", "save")]
        steps = f"max_steps={WARMUP + rounds * window + 1}"
        callback = f"+callbacks.turns={{_target_: {turns.__module__}.{turns.__qualname__}, window: {window}}}"
        run(compose_config("train", [*overrides, *never, steps, f"run_dir={folder}", callback]))
    return Turns.seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--window", type=int, default=50)
    return parse(parser, rounds=2, window=2)


def main() -> None:
    args = arguments()
    os.environ.update(WANDB_SILENT="true", WANDB_MODE="offline")
    device = setup()
    rows = []
    shape = ["data=toy2d", "model=ddpm_mlp", "model.net.width=64", "model.net.blocks=2", "data.batch_size=32"]
    for name, logger in (("train.py logger=none", "none"), ("train.py, W&B offline", "wandb")):
        seconds = trained(Turns, args.rounds, args.window, *shape, f"logger={logger}")
        ours, bare = seconds["ours"], seconds["bare"]
        rows.append(
            {
                "loop": name,
                "ms/step": spread(ours, 1e3, 3),
                "bare loop, ms/step": spread(bare, 1e3, 3),
                "added ms": round(1e3 * statistics.median(a - b for a, b in zip(ours, bare, strict=True)), 3),
                "time relative to bare loop": ratio(ours, bare),
            }
        )
    report("loop", args, device, rows, rounds=args.rounds, window=args.window)


if __name__ == "__main__":
    main()
