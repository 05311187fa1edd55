"""Metric cards: a figure of samples with everything that decides it, so that it can be compared or refused.

Each is JSON: the value over `repeats` independent sets of samples with the least and the largest, the protocol, what real data
scores against real data at the same n, and whether the samples are copies. Fréchet and kernel distances, precision,
recall, density and coverage are taken in a judge's features against the first n images of a split; samples are rounded to the
data's grey levels first.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai import judge as judges
from genai import sampling
from genai.checkpoint import Loaded
from genai.core.errors import UserError, at_least
from genai.data.base import Data
from genai.data.io import grid, to_pil
from genai.data.stream import batches
from genai.metrics.frechet import Moments, frechet
from genai.metrics.inception_score import inception_score
from genai.metrics.intervals import over_seeds
from genai.metrics.kid import kid
from genai.metrics.manifold import density_coverage, precision_recall
from genai.metrics.memorisation import memorisation


@dataclass
class Sets:
    """What a metric may look at: features and class probabilities of samples, features of real images, labels asked for."""

    real: Tensor
    fake: Tensor
    probabilities: Tensor
    label: Tensor | None


METRICS: dict[str, tuple[str, Callable[[Sets], float]]] = {
    "frechet": ("lower", lambda s: frechet(Moments().add(s.fake), Moments().add(s.real))),
    "kid": ("lower", lambda s: kid(s.real, s.fake)),
    "inception_score": ("higher", lambda s: inception_score(s.probabilities).mean),
    "precision": ("higher", lambda s: precision_recall(s.real, s.fake).precision),
    "recall": ("higher", lambda s: precision_recall(s.real, s.fake).recall),
    "density": ("higher", lambda s: density_coverage(s.real, s.fake).density),
    "coverage": ("higher", lambda s: density_coverage(s.real, s.fake).coverage),
    "accuracy": ("higher", lambda s: (s.probabilities.argmax(1) == s.label).double().mean().item()),
}


def run(
    loaded: Loaded, data: Data, metrics: list[str], split: str, n: int | None, repeats: int, seed: int, batch_size: int
) -> list[dict[str, Any]]:
    """Cards of a checkpoint's own sampler, written below the run's `cards/`. Raises UserError for a metric that there is not, or
    that this model or data cannot have, and for more samples than the split has images."""
    part, repeats = data.splits[split], at_least(repeats, 1, "repeats")
    check(loaded, data, metrics)
    n = len(part) if n is None else at_least(n, 2, "n")
    if n > len(part):
        raise UserError(
            f"n={n} is more than the {len(part)} images of split={split}: compare as many samples as images, at most those"
        )
    judge = judges.trained(data, loaded.config["data"])
    real = next(batches(part, n, n))[data.field]
    train = data.splits["train"]
    whole = next(batches(train, len(train)))[data.field]
    other = whole[n : 2 * n] if split == "train" else whole[:n]
    sets, batch = [], {}
    for k in range(repeats):
        batch = sampling.sample(loaded, n, seed + k * n, batch_size=batch_size)
        sets.append(seen(judge, real, rounded(batch[data.field], data.levels), batch.get("label")))
    floor = seen(judge, real, other, None) if len(other) == n else None
    held_out = data.splits["test" if "test" in data.splits else "val"]
    samples = rounded(batch[data.field], data.levels)
    copies = memorisation(samples, whole, next(batches(held_out, len(held_out)))[data.field])
    folder = (loaded.path.parent.parent if loaded.path.parent.name == "checkpoints" else loaded.path.parent) / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    nearest = copies.closest(10)
    pairs = torch.stack([samples[[i for i, _ in nearest]], whole[[j for _, j in nearest]]]).flatten(0, 1)
    to_pil(grid(pairs, len(nearest))).save(folder / "nearest.png")
    protocol = {
        "n": n, "split": split, "repeats": repeats, "data": loaded.config["data"]["_target_"], "levels": data.levels,
        "extractor": {"kind": "judge", "sha256": judge.sha256()[:16]}, "dtype": "float32", "resize": None,
    }  # fmt: skip
    facts = {
        "protocol": protocol, "seed": seed, "sampler": loaded.config["sampler"], "checkpoint": str(loaded.path),
        "step": loaded.step, "judge_accuracy": round(judge.accuracy(data, split), 4), "memorised": copies.flagged,
        "copies": copies.copies, "distance_ratio": round(copies.ratio, 4), "share_too_close": round(copies.close, 4),
    }  # fmt: skip
    return [card(name, sets, floor, facts, folder) for name in metrics]


def card(name: str, sets: list[Sets], floor: Sets | None, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One metric over the sets, written to `folder` and printed in short."""
    better, measure = METRICS[name]
    spread = over_seeds(measure(s) for s in sets)
    values = {"value": spread.mean, "low": spread.min, "high": spread.max}
    values |= {} if name == "accuracy" or floor is None else {"floor": measure(floor)}
    result = {"metric": name, **{k: round(v, 5) for k, v in values.items()}, "better": better, **facts}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result.get(k) for k in ("metric", "value", "low", "high", "floor", "memorised")}))
    return result


def check(loaded: Loaded, data: Data, metrics: list[str]) -> None:
    """Raise UserError for a metric that there is not, or that this model or data cannot have."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metrics={metrics}: {name} is none of {', '.join(METRICS)}")
        if name == "accuracy" and loaded.config["model"].get("classes") is None:
            raise UserError(
                "metrics: accuracy needs a model that is asked for a class, and this one is not: leave it out"
            )
    if data.field != "image":
        raise UserError(f"metrics={metrics} are of images, and this model makes {data.field}: leave metrics= out")


def rounded(x: Tensor, levels: int | None) -> Tensor:
    """Images in [-1, 1] on the data's grey levels."""
    half = ((levels or 256) - 1) / 2
    return ((x.clamp(-1, 1) + 1) * half).round() / half - 1


@torch.no_grad()
def seen(judge: judges.Judge, real: Tensor, fake: Tensor, label: Tensor | None) -> Sets:
    return Sets(judge.features(real), judge.features(fake), judge(fake).softmax(1), label)
