"""Metric cards of samples: images and vectors by their features, texts by their words and the training text."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai import checkpoint, progress, sampling
from genai.checkpoint import Loaded
from genai.checkpoint.build import reason
from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.core.runs import Card, Facts
from genai.data.base import Data, first_items, random_order
from genai.data.stream import batches
from genai.evaluation.baselines.reference import reference_scores
from genai.evaluation.cards import card, data_facts
from genai.evaluation.features import Extractor, FeatureSet, extract_features
from genai.evaluation.metrics import Answers, GeneratedSet, GeneratedTexts, Metric, RealFakePair, compute
from genai.evaluation.plan import CheckedPlan, Plan
from genai.metrics.intervals import interval, over_seeds
from genai.metrics.memorisation import memorisation
from genai.modalities.base import save

SEARCHED = 1000  # number of samples, and of held-out items, whose nearest training item is searched for
FIRST = 16  # size of the first batch, so that a time left is shown early
CHARACTERS = 10_000_000  # length of training text in which copies are searched for


def sample_batches(
    loaded: Loaded, n: int, seed: int, batch_size: int, clock: progress.Task, sampler: Facts | None = None
) -> Iterator[Batch]:
    """Yield n samples batch by batch, of all classes in turn; the very first batch is small, for an estimate of the time."""
    starts = [0, *range(min(batch_size if clock.done else FIRST, n), n, batch_size), n]
    for start, stop in itertools.pairwise(starts):
        turns = {name: condition.in_turn(start, stop) for name, condition in loaded.conditions.items()}
        asked: Any = {name: turn for name, turn in turns.items() if turn is not None}
        yield sampling.sample(loaded, stop - start, seed + start, sampler=sampler, batch_size=batch_size, **asked)
        clock.add(stop - start)


def _sampler(loaded: Loaded, plan: Plan) -> Facts:
    """Return the config node of the sampler that a plan uses."""
    return plan.sampler or loaded.config["sampler"]


def check_extractor(extractor: Extractor, data: Data, split: str, metrics: Mapping[str, Metric]) -> None:
    """Try an extractor on one image. Raises UserError if it fails, or if it cannot give what a metric needs."""
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


def sample_cards(loaded: Loaded, checked: CheckedPlan, extractor: Extractor, folder: Path) -> list[Card]:
    """Make a card for each metric of samples, from `repeats` sets of n samples and the items of a split.

    Also writes a picture of the samples that lie nearest to training items to `folder`.
    """
    plan, data, n, metrics = checked.plan, checked.images, checked.n, checked.sample_metrics
    split = plan.split
    reads = {name for metric in metrics.values() for name in metric.reads}
    whole = data.splits[split]
    real = extract_features(random_order(whole) if split == "train" else whole, data.field, extractor, reads)
    values, first = {name: [] for name in metrics}, []
    with progress.task("evaluating", n * plan.repeats, "samples") as clock:
        for k in range(plan.repeats):
            fake = FeatureSet(extractor, reads)
            for batch in sample_batches(loaded, n, plan.seed + k * n, plan.batch_size, clock, plan.sampler):
                x = data.modality.quantize(batch[data.field], data.levels)
                fake.add(x, batch.get("label"))
                if k == 0 and sum(map(len, first)) < SEARCHED:
                    first.append(x)
            sets = RealFakePair(real, fake)
            for name, metric in metrics.items():
                values[name].append(compute(name, metric, sets).item())
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
        "sampler": _sampler(loaded, plan),
        **_copies(data, torch.cat(first)[:SEARCHED], folder),
    }
    spreads = {name: over_seeds(found) for name, found in values.items()}
    return [
        card(name, metrics[name], s.mean, s.min, s.max, floors.get(name), others.get(name, {}), facts)
        for name, s in spreads.items()
    ]


def _floors(
    data: Data, metrics: Mapping[str, Metric], split: str, n: int, real: FeatureSet
) -> tuple[str | None, dict[str, float]]:
    """Return (name, scores) of another split: the metrics of n of its items against this split's; (None, {}) if none has n.

    The training split comes last, since the classifier that extracts the features was trained on it.
    """
    for other in ("val", "test", "train"):
        if other != split and other in data.splits and len(data.splits[other]) >= n:
            sets = RealFakePair(
                real, extract_features(first_items(data, other, n), data.field, real.extractor, real.parts)
            )
            return other, {
                name: compute(name, metric, sets).item() for name, metric in metrics.items() if not metric.uses_labels
            }
    return None, {}


def _copies(data: Data, samples: Tensor, folder: Path) -> Card:
    """Return the card's facts on memorisation, and write the ten nearest pairs to nearest.png or nearest.txt."""
    whole = data.splits["train"]
    parts = progress.track(
        batches(whole, 5000),
        "looking for copies of",
        len(whole),
        "training items",
        lambda batch: len(batch[data.field]),
    )
    maps = data.modality.maps
    train = (maps(batch[data.field]) for batch in parts)
    held_out = data.splits["test" if "test" in data.splits else "val"]
    copies = memorisation(maps(samples), train, maps(next(batches(held_out, SEARCHED))[data.field]))
    nearest = copies.closest(10)
    theirs = data.items("train", torch.tensor([j for _, j in nearest]))
    pairs = torch.stack([samples[[i for i, _ in nearest]], theirs]).flatten(0, 1)
    original = torch.arange(len(pairs)) >= len(nearest)
    shown = data.modality.preview({data.field: pairs, "original": original}, len(nearest))
    save(shown, folder / "nearest", folder.parent)
    reason = {} if copies.reason is None else {"memorised_reason": copies.reason}
    return {
        "memorised": copies.is_memorised,
        **reason,
        "copies": copies.copies,
        "distance_ratio": round(copies.ratio, 4),
        "share_too_close": round(copies.close, 4),
        "looked_at": len(samples),
    }


def text_cards(loaded: Loaded, checked: CheckedPlan) -> list[Card]:
    """Make a card for each metric of texts, from `repeats` sets of n texts; the floor is n pieces of the split, as long."""
    plan, n, metrics = checked.plan, checked.n, checked.sample_metrics
    data: Any = checked.images
    split = plan.split
    train = _text(data, "train", CHARACTERS)
    values, longest = {name: [] for name in metrics}, 1
    with progress.task("evaluating", n * plan.repeats, "texts") as clock:
        for k in range(plan.repeats):
            parts = sample_batches(loaded, n, plan.seed + k * n, plan.batch_size, clock, plan.sampler)
            made = [text for batch in parts for text in data.modality.preview(batch)]
            longest = max(longest, *map(len, made))
            for name, metric in metrics.items():
                values[name].append(compute(name, metric, GeneratedTexts(made, train)).item())
    whole = _text(data, split, n * longest)
    length = len(whole) // n
    pieces = GeneratedTexts([whole[i * length : (i + 1) * length] for i in range(n)], train)
    floors = (
        {} if split == "train" else {name: compute(name, metric, pieces).item() for name, metric in metrics.items()}
    )
    return _set_cards(loaded, checked, values, floors, train_characters=len(train))


def set_cards(loaded: Loaded, checked: CheckedPlan) -> list[Card]:
    """Make a card for each metric of sets of samples, as the modality compares them, from `repeats` sets of n.

    The floor is n items of the split, cut to the length of the samples.
    """
    plan, n, metrics = checked.plan, checked.n, checked.sample_metrics
    data: Any = checked.images
    train = _compared(data, "train", len(data.splits["train"]), None)
    values, length = {name: [] for name in metrics}, 0
    with progress.task("evaluating", n * plan.repeats, "samples") as clock:
        for k in range(plan.repeats):
            parts = sample_batches(loaded, n, plan.seed + k * n, plan.batch_size, clock, plan.sampler)
            x = torch.cat([batch[data.field] for batch in parts])
            made, length = GeneratedSet(data.modality.compared(x), train), x.shape[1]
            for name, metric in metrics.items():
                values[name].append(compute(name, metric, made).item())
    real = GeneratedSet(_compared(data, plan.split, n, length), train)
    floors = {name: compute(name, metric, real).item() for name, metric in metrics.items() if plan.split != "train"}
    return _set_cards(loaded, checked, values, floors)


def _compared(data: Any, split: str, n: int, length: int | None) -> list[Any]:
    """Return the first n items of a split, token ids of which the first is none of theirs, cut to `length`, as compared."""
    rows = [batch[data.field][:, 1:][:, :length] for batch in batches(data.splits[split], 1024, n)]
    return data.modality.compared(torch.cat(rows))


def _set_cards(
    loaded: Loaded, checked: CheckedPlan, values: Mapping[str, list[float]], floors: Mapping[str, float], **more: int
) -> list[Card]:
    """Return a card for each metric of sets of token sequences, by its values for each set; `more` joins the protocol."""
    plan, data, metrics = checked.plan, checked.images, checked.sample_metrics
    facts = {
        "protocol": {
            "n": checked.n,
            "split": plan.split,
            "repeats": plan.repeats,
            **data_facts(checked),
            "vocabulary": data.levels,
            "max_new_tokens": _sampler(loaded, plan).get("max_new_tokens") or data.shape[0],
            **more,
        },
        "sampler": _sampler(loaded, plan),
    }
    spreads = {name: over_seeds(found) for name, found in values.items()}
    return [card(name, metrics[name], s.mean, s.min, s.max, floors.get(name), {}, facts) for name, s in spreads.items()]


def _text(data: Any, split: str, most: int) -> str:
    """Return the first `most` characters of a split, or all."""
    part, parts, length = data.splits[split], [], 0
    for batch in batches(part, max(1, min(1024, math.ceil(most / part.length)))):
        fresh = batch[data.field][:, 1:][batch["mask"][:, 1:]]
        parts += data.modality.preview({data.field: fresh[None]})
        length += len(parts[-1])
        if length >= most:
            break
    return "".join(parts)[:most]


def answer_cards(loaded: Loaded, checked: CheckedPlan) -> list[Card]:
    """Make a card for each metric of answers, from what the sampler writes for the first n items of a split."""
    plan, data, metrics = checked.plan, checked.images, checked.sample_metrics
    part, written = first_items(data, plan.split, checked.n), []
    run = sampling.bind(loaded, plan.sampler, {})
    with progress.task("evaluating", checked.n, "items") as clock:
        for batch in batches(part, plan.batch_size):
            size = len(batch[data.field])
            asked = {name: batch[name] for name in loaded.conditions if name in batch}
            cond = {**data.modality.condition({}, size), **asked}
            with checkpoint.explain_errors(loaded), loaded.autocast():
                found = run(loaded.model, rng.seed_range(plan.seed + clock.done, size), cond, None)
            rows = zip(found[data.field].tolist(), found["length"].tolist(), strict=True)
            written += [row[:length] for row, length in rows]
            clock.add(size)
    answers = Answers.of(data, part, written)
    others = reference_scores(data, metrics, plan.split, checked.n) if plan.baselines else {}
    protocol = {
        "n": checked.n,
        "split": plan.split,
        **data_facts(checked),
        "vocabulary": data.levels,
        "dtype": loaded.dtype,
    }
    facts = {"protocol": protocol, "sampler": _sampler(loaded, plan)}
    means = {name: interval(compute(name, metric, answers)) for name, metric in metrics.items()}
    return [card(name, metrics[name], *mean, None, others.get(name, {}), facts) for name, mean in means.items()]


SET_CARDS = {"texts": text_cards, "melodies": set_cards, "answers": answer_cards}
"""Functions that compute the cards of sets of samples that have no features, by the modality's `comparison`."""
