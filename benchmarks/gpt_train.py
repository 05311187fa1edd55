"""Training speed of a GPT.

    python -m benchmarks.gpt_train [--rounds 7] [--through]

Compares gpt_nano with a plain loop like nanoGPT's, Hugging Face GPT-2, litgpt and x-transformers. The shape is nanoGPT's for a
CPU: 4 layers, width 128, 12 windows of 64 tokens. A step is the forward pass, the backward pass, clipping and AdamW with the
settings of the recipe in every case; nanoGPT's AdamW is not fused on a CPU. --through also runs `train.py` for 600 steps, in
turns with the plain loop over the same text, and compares the whole loops by wall-clock time, without evaluation.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import gpt
from benchmarks.common import installed, interleave, left_out, parse, ratio, report, setup, spread
from genai.checkpoint.build import build_typed

BATCH, LENGTH = 12, 64


def step(
    model: nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], optimizer: Any, vocab: int
) -> Callable[[], None]:
    device = next(model.parameters()).device
    tokens = torch.randint(0, vocab, (BATCH, LENGTH + 1), device=device)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return one


def theirs(model: nn.Module, device: torch.device, logits: Callable[[Any], torch.Tensor] = lambda out: out) -> Callable:
    model = model.to(device).train()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    fused = device.type == "cuda"  # as nanoGPT does
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-3, betas=(0.9, 0.99), fused=fused)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        out = logits(model(tokens[:, :-1]))
        return F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())

    return step(model, loss, optimizer, gpt.VOCAB)


def ours(device: torch.device) -> Callable:
    model = gpt.ours(LENGTH).to(device).train()
    optimizer = build_typed(gpt.config(LENGTH)["optim"])(model)
    return step(model, lambda tokens: model({"tokens": tokens}, 0).total, optimizer, gpt.VOCAB)


def through(rounds: int) -> tuple[float, list[float], list[float]]:
    """(ratio of tokens/s, those of train.py, those of the plain loop) by wall-clock time, each alone on the machine in turn."""
    ours_, plain = [], []
    text = "".join(chr(97 + i * i % 23) for i in range(200_000))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(text)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        for k in range(rounds):
            run = Path(folder) / f"run{k}"
            command = [
                sys.executable,
                "train.py",
                "model=gpt_nano",
                "data=text_file",
                f"data.path={path}",
                f"data.cache={folder}/cache",
                f"data.shape=[{LENGTH}]",
                f"data.batch_size={BATCH}",
                "max_steps=600",
                f"run_dir={run}",
                "logger=none",
                "callbacks.samples=null",
                "callbacks.evaluate=null",
                "callbacks.save=null",
                "log_every_steps=50",
            ]
            subprocess.run(command, check=True, capture_output=True, env=environment)
            rates = re.findall(r"perf/steps_per_second,([\d.]+)", (run / "metrics.csv").read_text())
            ours_.append(statistics.median(map(float, rates[2:])) * BATCH * LENGTH)
            script = "import benchmarks.gpt_train as b; b.plain_loop()"
            done = subprocess.run(
                [sys.executable, "-c", script], check=True, capture_output=True, env=environment, text=True
            )
            plain.append(float(done.stdout))
    return statistics.median(a / b for a, b in zip(ours_, plain, strict=True)), ours_, plain


def plain_loop() -> None:
    """Print the tokens/s of a loop like nanoGPT's over random windows, the median over groups of 50 steps."""
    import time

    torch.set_num_threads(1)
    model = gpt.Plain(LENGTH)
    data = torch.randint(0, gpt.VOCAB, (200_000,))
    one_step = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    rates = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(50):
            at = torch.randint(len(data) - LENGTH, (BATCH,))
            tokens = torch.stack([data[i : i + LENGTH + 1] for i in at])
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            one_step.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            one_step.step()
            loss.item()  # nanoGPT prints it
        rates.append(50 * BATCH * LENGTH / (time.perf_counter() - start))
    print(statistics.median(rates[2:]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--through", action="store_true")
    return parse(parser, rounds=1, through=False)


def main() -> None:
    args = arguments()
    device = setup()
    cases = {
        "genai (gpt_nano)": ours(device),
        "plain loop, as nanoGPT": theirs(gpt.Plain(LENGTH), device),
    }
    if installed("transformers"):
        cases["Hugging Face GPT-2"] = theirs(gpt.hugging_face(LENGTH), device, lambda out: out.logits)
    if installed("litgpt"):
        cases["litgpt"] = theirs(gpt.litgpt(LENGTH), device)
    if installed("x_transformers"):
        cases["x-transformers"] = theirs(gpt.x_transformers(LENGTH), device)
    seconds = interleave(cases, args.rounds, 10, device, warmup=3)
    floor = seconds["plain loop, as nanoGPT"]
    rows = [
        {
            "system": name,
            "ms/step": spread(times, 1e3, 1),
            "tokens/s": round(BATCH * LENGTH / statistics.median(times)),
            "speed relative to plain loop": round(ratio(floor, times), 3),
        }
        for name, times in seconds.items()
    ]
    if args.through:
        whole, a, b = through(3)
        for name, rates, relative in (
            ("train.py, whole loop, wall clock", a, whole),
            ("plain loop, wall clock", b, 1.0),
        ):
            row = {
                "system": name,
                "ms/step": spread([BATCH * LENGTH / rate for rate in rates], 1e3, 1),
                "tokens/s": round(statistics.median(rates)),
                "speed relative to plain loop": round(relative, 3),
            }
            rows.append(row)
    else:
        left_out.append("--through")
    report("gpt_train", args, device, rows, shape=f"{BATCH} x {LENGTH} tokens")


if __name__ == "__main__":
    main()
