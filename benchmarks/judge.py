"""What a judge of MNIST says of class-conditional samples: the class asked for, recall, and Fréchet distance.

    python -m benchmarks.judge <run> [<run> ...] [--root data] [--n 1000] [--set standing_batches=16]

The judge is a small convolutional network trained on real MNIST; distances are taken in its last hidden layer, against as many
test images. Compare only figures with one n. The line of the test images is the other half of them against the first.
"""

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import genai
from benchmarks.common import setup
from genai import checkpoint
from genai.data.base import Data
from genai.data.stream import Stream, batches
from genai.metrics.frechet import Moments, frechet
from genai.metrics.manifold import precision_recall


class Judge(nn.Module):
    """(N, 1, 28, 28) in [-1, 1] -> logits (N, 10); `features` (N, 64) are its last hidden layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(32 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))

    def learn(self, data: Data, steps: int = 3000, batch_size: int = 128) -> "Judge":
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        stream = iter(Stream(data.splits["train"], batch_size, 1, 0, 0, 0, 1))
        for _ in range(steps):
            (batch,) = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(self(batch["image"]), batch["label"]).backward()
            optimizer.step()
            schedule.step()
        return self.eval()


def facts_of(judge: Judge, data: Data, n: int) -> tuple[float, float, torch.Tensor]:
    """Accuracy on the test split, recall of n of its images by n others, and those images."""
    test = next(batches(data.splits["test"], 2 * n, 2 * n))
    with torch.inference_mode():
        parts = [(judge(b["image"]).argmax(1) == b["label"]).double().mean() for b in batches(data.splits["test"], 500)]
        floor = precision_recall(judge.features(test["image"][:n]), judge.features(test["image"][n:])).recall
    return float(np.mean(parts)), floor, test["image"][:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--root", help="folder of the data, if not where the run had it")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--set", nargs="*", default=[], help="arguments of the sampler, key=number")
    args = parser.parse_args()
    setup()
    arguments = {key: float(value) for key, value in (given.split("=") for given in args.set)}
    loaded = [genai.load(run) for run in args.runs]
    node = loaded[0].config["data"]
    data = checkpoint.build({**node, "root": args.root or node["root"]})
    judge = Judge().learn(data)
    right, floor, real = facts_of(judge, data, args.n)
    with torch.inference_mode():
        features = judge.features(real)
        moments = Moments().add(features)
        other = judge.features(next(batches(data.splits["test"], 2 * args.n, 2 * args.n))["image"][args.n :])
        distance = frechet(Moments().add(other), moments)
        print(f"test images: accuracy {right:.4f}, recall {floor:.3f}, Fréchet distance {distance:.2f}")
        for run in loaded:
            batch = genai.sample(run, n=args.n, **{k: int(v) if v == int(v) else v for k, v in arguments.items()})
            x = judge.features(batch["image"])
            accuracy = (judge(batch["image"]).argmax(1) == batch["label"]).double().mean().item()
            distance = frechet(Moments().add(x), moments)
            recall = precision_recall(features, x).recall
            print(f"{run.path}: accuracy {accuracy:.4f}, recall {recall:.3f}, Fréchet distance {distance:.2f}")


if __name__ == "__main__":
    main()
