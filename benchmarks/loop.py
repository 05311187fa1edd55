"""What the training loop adds to a step: all callbacks and loggers over a bare loop on the same stream.

    python -m benchmarks.loop [--rounds 5] [--steps 600]

Both train the same small MLP with fused AdamW on the same DataLoader. Ours is everything `train.py` runs: Lightning,
averaging, clipping, the finite check, seeding, metrics.csv, W&B offline, the progress callback, logging every 50
steps; evaluation, grids and saves fall outside the timed window. Target: at most 0.6 ms added per step.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

from benchmarks.common import report, setup, spread
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


def model() -> DDPM:
    torch.manual_seed(0)
    return DDPM(MLP(2, 64, 2), cosine(200), [2], "vector", clip=None)


def data() -> Toy2D:
    return Toy2D("moons", 10_000, "vector", [2], None, None, 32)


class Clock(L.Callback):
    """Process CPU seconds per step between `first` and the last step."""

    def __init__(self, first: int):
        self.first = first

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.first:
            self.start = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == trainer.max_steps:
            self.seconds = (time.process_time() - self.start) / (trainer.max_steps - self.first)


def ours(steps: int, device: torch.device, tracked: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        tracker = trackers.wandb(Path(folder), "loop", {}, "genai") if tracked else None
        record = Record(Path(folder), tracker)
        record.cut(None)
        lit = LitModel(model(), data(), functools.partial(adamw, lr=1e-3), EMA, record)
        clock, far = Clock(100), 10**9
        # what is due at the last step comes after the clock, the first of the callbacks, has stopped
        callbacks = [clock, Evaluate(far, 32), Samples(ddim, far, n=2), Save(far), Progress(), Stop()]
        trainer = L.Trainer(
            max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator=device.type.replace("cuda", "gpu"), devices=1, callbacks=callbacks,
            plugins=[File({}, {})], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(lit)
        trackers.finish(failed=False)
        return clock.seconds


def bare(steps: int, device: torch.device) -> float:
    net, start = model().to(device), 0.0
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    for step, ([batch],) in enumerate(zip(train_loader(data(), 1, 0, 0), strict=False)):
        if step == 100:
            start = time.process_time()
        if step == steps:
            break
        loss = net({name: value.to(device) for name, value in batch.items()}, step).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.process_time() - start) / (steps - 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    device = setup()
    loops = {
        "bare": lambda: bare(args.steps, device),
        "ours": lambda: ours(args.steps, device, tracked=False),
        "ours, W&B offline": lambda: ours(args.steps, device, tracked=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, loop in loops.items():
            seconds[name].append(loop())
    rows = []
    for name, values in seconds.items():
        added = statistics.median(a - b for a, b in zip(values, seconds["bare"], strict=True))
        rows.append({"loop": name, "ms/step": spread(values, 1e3, 3), "added ms": round(1e3 * added, 3)})
    report("loop", device, rows, rounds=args.rounds, steps=args.steps)


if __name__ == "__main__":
    main()
