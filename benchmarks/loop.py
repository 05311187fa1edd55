"""What the whole training loop adds to a step, over the shortest loop one could write by hand.

    python -m benchmarks.loop [--rounds 15] [--window 200]

`genai.train.run.run` as train.py calls it: Lightning, averaged weights, gradient clipping, the watch for what is not
finite, per-step seeds, running means, every callback, metrics.csv, an offline Weights & Biases run, logging every 50
steps; evaluation, samples and saving fall outside the windows. The loop by hand is the same model, data loader and
fused AdamW: loss, backward, step. The two take turns, a window of steps each. Target: 0.6 ms added.
"""

import argparse
import copy
import logging
import os
import tempfile
from typing import Any

import lightning as L
import torch
from omegaconf import OmegaConf

from benchmarks.common import clock, report, setup, spread
from genai.cli import composed
from genai.data.stream import train_loader

WARMUP = 100


class Rounds(L.Callback):
    """After each window of steps of the run, the same number of steps by hand."""

    def __init__(self, rounds: int, window: int):
        self.rounds, self.window = rounds, window
        self.whole: list[float] = []
        self.by_hand: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.model = copy.deepcopy(pl_module.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.batches = iter(train_loader(pl_module.data, 1, 1, 0))
        self.hand(WARMUP, pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        done, device = trainer.global_step - WARMUP, pl_module.device
        if done < 0 or done % self.window or len(self.whole) == self.rounds:
            return
        if done > 0:
            self.whole.append((clock(device) - self.start) / self.window)
            start = clock(device)
            self.hand(self.window, device)
            self.by_hand.append((clock(device) - start) / self.window)
        self.start = clock(device)

    def hand(self, steps: int, device: torch.device) -> None:
        for step in range(steps):
            (batch,) = next(self.batches)
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            self.optimizer.zero_grad(set_to_none=True)
            self.model(batch, step).total.backward()
            self.optimizer.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        added = [whole - hand for whole, hand in zip(self.whole, self.by_hand, strict=True)]
        cases = {"by hand": self.by_hand, "whole loop": self.whole, "added": added}
        rows = [{"loop": name, "ms/step": spread(values, 1e3, 3)} for name, values in cases.items()]
        parameters = sum(p.numel() for p in self.model.parameters())
        report("loop", pl_module.device, rows, rounds=self.rounds, window=self.window, parameters=parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--window", type=int, default=200)
    args = parser.parse_args()
    from genai.train.run import run

    setup()
    os.environ["WANDB_MODE"] = "offline"
    logging.disable(logging.WARNING)
    steps = WARMUP + args.rounds * args.window + 1
    never = [f"callbacks.{name}.every_steps=null" for name in ("evaluate", "samples", "save")]
    with tempfile.TemporaryDirectory() as folder:
        small = ["model=ddpm_mlp", "data=toy2d", "callbacks.samples.n=1", "trainer.precision=32-true"]
        cfg = composed("train", [f"run_dir={folder}/run", f"max_steps={steps}", *small, *never])
        target = {"_target_": "benchmarks.loop.Rounds", "rounds": args.rounds, "window": args.window}
        cfg.callbacks = OmegaConf.merge(cfg.callbacks, {"rounds": target})
        run(cfg)


if __name__ == "__main__":
    main()
