"""What guidance gives and takes: accuracy of the digit asked for, and recall, against the guidance weight.

    pip install -e ".[notebooks]"
    python -m benchmarks.guidance <run of experiment=latent_mnist_text> [--root data] [--n 1000] [--guidance 1 1.5 2 3 4 6 8]

Prompts go over the ten digits in turn. The judge is a small convolutional network trained on real MNIST; recall is the share of
n real test images that lie among the samples, within the distance of a sample to its third neighbour, in the judge's last hidden
layer (Kynkaanniemi et al., 2019, eq. 2). Prints a table and writes results/guidance.json and docs/guidance.png.
"""

import argparse
import json

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import genai
from benchmarks.common import RESULTS, hardware, setup
from benchmarks.quality import ROOT
from genai import checkpoint
from genai.data.base import Data
from genai.data.stream import Stream, batches


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


def recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> float:
    """Share of real features (N, D) within some fake one's distance to its k-th neighbour among the fakes (M, D)."""
    radius = torch.cdist(fake, fake).sort(1).values[:, k]
    return (torch.cdist(real, fake) <= radius).any(1).double().mean().item()


def plot(rows: list[dict], floor: float) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    w = [row["guidance"] for row in rows]
    axes.plot(w, [row["accuracy"] for row in rows], "o-", label="accuracy of the digit asked for")
    axes.plot(w, [row["recall"] for row in rows], "s-", label="recall")
    axes.axhline(floor, color="grey", linestyle=":", label="recall of other real images")
    axes.set(xlabel="guidance", ylim=(None, 1.01))
    axes.legend()
    figure.savefig(ROOT / "docs" / "guidance.png", dpi=110)


@torch.inference_mode()
def measure(loaded: checkpoint.Loaded, judge: Judge, real: torch.Tensor, n: int, guidance: list[float]) -> list[dict]:
    names, rows = loaded.config["data"]["names"], []
    wanted = torch.arange(n) % len(names)
    prompts = [f"a handwritten {name}" for name in names]
    for w in guidance:
        x = genai.sample(loaded, n=n, prompt=prompts, guidance=w)["image"]
        accuracy = (judge(x).argmax(1) == wanted).double().mean().item()
        covered = recall(judge.features(real), judge.features(x))
        rows.append({"guidance": w, "accuracy": round(accuracy, 4), "recall": round(covered, 4)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--root", help="folder of the data, if not where the run had it")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 6, 8])
    args = parser.parse_args()
    device = setup()
    loaded = genai.load(args.run)
    node = loaded.config["data"]["images"]
    data = checkpoint.build({**node, "root": args.root or node["root"]})
    judge = Judge().learn(data)
    test = next(batches(data.splits["test"], 2 * args.n, 2 * args.n))
    with torch.inference_mode():
        right = np.mean(
            [(judge(b["image"]).argmax(1) == b["label"]).double().mean() for b in batches(data.splits["test"], 500)]
        )
        floor = recall(judge.features(test["image"][: args.n]), judge.features(test["image"][args.n :]))
    print(f"judge: {right:.4f} on test images; recall of {args.n} real images by {args.n} others {floor:.4f}")
    rows = measure(loaded, judge, test["image"][: args.n], args.n, args.guidance)
    facts = {"hardware": hardware(device), "n": args.n, "sampler": loaded.config["sampler"], "step": loaded.step}
    result = {**facts, "judge_accuracy": round(float(right), 4), "recall_of_real": round(floor, 4), "rows": rows}
    (RESULTS / "guidance.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, floor)


if __name__ == "__main__":
    main()
