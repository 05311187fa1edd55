"""Cards of samples: images in an extractor's features, texts beside what was learned from."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai import sampling
from genai.checkpoint import Loaded
from genai.checkpoint.build import reason
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.data.base import Data, first_items, random_order
from genai.data.stream import batches
from genai.evaluation.baselines.reference import reference_scores
from genai.evaluation.cards import card, data_facts
from genai.evaluation.clock import Clock
from genai.evaluation.features import Extractor, FeatureSet, extract_features
from genai.evaluation.metrics import CheckedPlan, GeneratedTexts, Metric, RealFakePair, compute
from genai.metrics.intervals import over_seeds
from genai.metrics.memorisation import memorisation
from genai.modalities.base import save

LOOKED_AT = 1000  # samples and held-out items whose nearest training item is looked for
FIRST = 16  # samples that an estimate of the time is made from
CHARACTERS = 10_000_000  # of training text that copies are looked for in


def sample_batches(loaded: Loaded, n: int, seed: int, batch_size: int, clock: Clock) -> Iterator[Batch]:
    """n samples, the classes in turn, batch by batch; the first batch of all is small."""
    told: Any = loaded.conditions.get("label")
    starts = [0, *range(min(batch_size if clock.done else FIRST, n), n, batch_size), n]
    for start, stop in itertools.pairwise(starts):
        label = None if told is None else told.preview({"label": torch.arange(start, stop) % told.classes})
        yield sampling.sample(loaded, stop - start, seed + start, label=label, batch_size=batch_size)
        clock.add(stop - start)


def check_extractor(extractor: Extractor, data: Data, split: str, metrics: Mapping[str, Metric]) -> None:
    """Let it see one image. Raises UserError where it fails on it, and for a metric that it cannot serve."""
    image = next(batches(data.splits[split], 1, 1))[data.field]
    try:
        _, logits = extractor(image)
    except RuntimeError as error:
        raise UserError(
            f"the extractor fails on an image {list(image.shape)} ({reason(error)}): choose another network, extractor.net="
        ) from error
    for name, metric in metrics.items():
        if metric.uses_labels and not extractor.labels:
            raise UserError(f"metrics: {name} needs extractor=classifier: choose that, or leave it out")
        if "probabilities" in metric.reads and logits is None:
            raise UserError(
                f"metrics: {name} needs extractor=classifier or inception: choose one of these, or leave it out"
            )


def sample_cards(loaded: Loaded, checked: CheckedPlan, extractor: Extractor, folder: Path) -> list[dict[str, Any]]:
    """Cards by metric of `repeats` sets of n samples beside the items of a split, and the nearest pairs to look at."""
    plan, data, n, metrics = checked.plan, checked.images, checked.n, checked.sampled
    split = plan.split
    reads = {name for metric in metrics.values() for name in metric.reads}
    whole = data.splits[split]
    real = extract_features(random_order(whole) if split == "train" else whole, data.field, extractor, reads)
    clock, values, first = Clock(n * plan.repeats, "samples"), {name: [] for name in metrics}, []
    for k in range(plan.repeats):
        fake = FeatureSet(extractor, reads)
        for batch in sample_batches(loaded, n, plan.seed + k * n, plan.batch_size, clock):
            x = data.modality.quantize(batch[data.field], data.levels)
            fake.add(x, batch.get("label"))
            if k == 0 and sum(map(len, first)) < LOOKED_AT:
                first.append(x)
        sets = RealFakePair(real, fake)
        for name, metric in metrics.items():
            values[name].append(compute(name, metric, sets).item())
    clock.stop()
    floor, floors = _floors(data, metrics, split, n, real)
    others = reference_scores(data, metrics, split, n, real) if plan.baselines else {}
    facts = {
        "protocol": {
            "n": n,
            "split": split,
            "real": real.moments.n,
            "repeats": plan.repeats,
            **data_facts(checked),
            "levels": data.levels,
            **extractor.facts,
            "dtype": loaded.dtype,
        },
        "floor_of": floor,
        "sampler": loaded.config["sampler"],
        **_copies(data, torch.cat(first)[:LOOKED_AT], folder),
    }
    spreads = {name: over_seeds(found) for name, found in values.items()}
    return [
        card(name, metrics[name], s.mean, s.min, s.max, floors.get(name), others.get(name, {}), facts)
        for name, s in spreads.items()
    ]


def _floors(
    data: Data, metrics: Mapping[str, Metric], split: str, n: int, real: FeatureSet
) -> tuple[str | None, dict[str, float]]:
    """What n items of another split score against those of this one, and which has as many; one that a judge did not learn
    from comes first."""
    for other in ("val", "test", "train"):
        if other != split and other in data.splits and len(data.splits[other]) >= n:
            sets = RealFakePair(
                real, extract_features(first_items(data, other, n), data.field, real.extractor, real.parts)
            )
            return other, {
                name: compute(name, metric, sets).item() for name, metric in metrics.items() if not metric.uses_labels
            }
    return None, {}


def _copies(data: Data, samples: Tensor, folder: Path) -> dict[str, Any]:
    """Whether samples are copies of training items, and the ten nearest pairs as nearest.png or .txt."""
    train = (batch[data.field] for batch in batches(data.splits["train"], 5000))
    held_out = data.splits["test" if "test" in data.splits else "val"]
    copies = memorisation(samples, train, next(batches(held_out, LOOKED_AT))[data.field])
    nearest = copies.closest(10)
    theirs = data.items("train", torch.tensor([j for _, j in nearest]))
    pairs = torch.stack([samples[[i for i, _ in nearest]], theirs]).flatten(0, 1)
    save(data.modality.preview({data.field: pairs}, len(nearest)), folder / "nearest", folder.parent)
    reason = {} if copies.reason is None else {"memorised_reason": copies.reason}
    return {
        "memorised": copies.flagged,
        **reason,
        "copies": copies.copies,
        "distance_ratio": round(copies.ratio, 4),
        "share_too_close": round(copies.close, 4),
        "looked_at": len(samples),
    }


def text_cards(loaded: Loaded, checked: CheckedPlan) -> list[dict[str, Any]]:
    """Cards by metric of `repeats` sets of n texts; their floor is what as many as long pieces of the split have."""
    plan, n, metrics = checked.plan, checked.n, checked.sampled
    data: Any = checked.images
    split = plan.split
    train = _text(data, "train", CHARACTERS)
    clock, values = Clock(n * plan.repeats, "texts"), {name: [] for name in metrics}
    longest = 1
    for k in range(plan.repeats):
        parts = sample_batches(loaded, n, plan.seed + k * n, plan.batch_size, clock)
        made = [text for batch in parts for text in data.modality.preview(batch)]
        longest = max(longest, *map(len, made))
        for name, metric in metrics.items():
            values[name].append(compute(name, metric, GeneratedTexts(made, train)).item())
    clock.stop()
    whole = _text(data, split, n * longest)
    length = len(whole) // n
    pieces = GeneratedTexts([whole[i * length : (i + 1) * length] for i in range(n)], train)
    floors = (
        {} if split == "train" else {name: compute(name, metric, pieces).item() for name, metric in metrics.items()}
    )
    facts = {
        "protocol": {
            "n": n,
            "split": split,
            "repeats": plan.repeats,
            **data_facts(checked),
            "vocabulary": data.levels,
            "max_new_tokens": loaded.config["sampler"].get("max_new_tokens") or data.shape[0],
            "train_characters": len(train),
        },
        "sampler": loaded.config["sampler"],
    }
    spreads = {name: over_seeds(found) for name, found in values.items()}
    return [card(name, metrics[name], s.mean, s.min, s.max, floors.get(name), {}, facts) for name, s in spreads.items()]


def _text(data: Any, split: str, most: int) -> str:
    """The first characters of a split, at most so many."""
    part, parts, length = data.splits[split], [], 0
    for batch in batches(part, max(1, min(1024, math.ceil(most / part.length)))):
        fresh = batch[data.field][:, 1:][batch["mask"][:, 1:]]
        parts += data.modality.preview({data.field: fresh[None]})
        length += len(parts[-1])
        if length >= most:
            break
    return "".join(parts)[:most]
