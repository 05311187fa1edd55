"""One pass over a split: the likelihood of its items, guesses of their hidden parts, embeddings, and reconstructions."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from genai import progress
from genai.checkpoint import Loaded
from genai.checkpoint.build import build_typed
from genai.checkpoint.load import null_conditions
from genai.core.errors import UserError
from genai.core.protocols import Batch, Embedder, Infiller, Reconstructor, Scorable, check_sampler
from genai.core.runs import Facts
from genai.data.base import Data, Split, Subset, first_items
from genai.data.stream import batches
from genai.evaluation import hidden
from genai.evaluation.metrics import PASS_KINDS, Metric, can_compute, compute, compute_pairs, standard_metrics
from genai.evaluation.plan import CheckedPlan
from genai.metrics import likelihood as units
from genai.metrics import retrieval
from genai.metrics.intervals import Interval, interval

Score = Callable[[Batch, int], Tensor]
REPORTED_BOUND = {"lower bound": "upper bound"}  # a lower bound of ln p is an upper bound of -ln p, which is reported
ODE_BOUND = "upper bound up to the error of the ODE's solver"


@dataclasses.dataclass
class Collected:
    """The scores of the items of one pass, batch by batch, on the CPU."""

    nats: list[Tensor] = dataclasses.field(default_factory=list)
    """-ln p (B,), if the model has a likelihood."""
    targets: list[Tensor] = dataclasses.field(default_factory=list)
    """The number of predicted elements (B,), where masks tell it."""
    guesses: list[Tensor] = dataclasses.field(default_factory=list)
    """Scores (B, 3) of `hidden.score`, if the model fills in."""
    labels: list[Tensor] = dataclasses.field(default_factory=list)
    """Labels (B,), or indices without, if the model embeds."""
    embeddings: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    """Embeddings (B, D) by medium."""
    values: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    """Values (B,) of metrics of reconstructions, by name."""
    codes: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """How often each code occurs (K,), if the model is a codec of tokens."""


def run(loaded: Loaded, data: Data, checked: CheckedPlan) -> tuple[Facts, dict[str, Interval]]:
    """Evaluate the model on the first n items of the split.

    Returns the facts of the pass, and the mean of each metric with its bootstrap interval. All metrics of a pass that the model
    can have are computed, also those not asked for: they cost little, and its facts report them.
    """
    plan, n, metrics = checked.plan, checked.n, {**checked.available, **checked.pass_metrics}
    model: Any = loaded.model
    found = collect(loaded, data, checked, metrics)
    of_kind = {kind: {k: m for k, m in metrics.items() if m.kind == kind} for kind in PASS_KINDS}
    facts: Facts = {}
    means: dict[str, Interval] = {}
    if found.nats:
        each = torch.cat(found.nats).double() + 0.0  # turns -0 into 0 for items of probability 1
        predicted = int(torch.cat(found.targets).sum()) if found.targets else None
        levels = getattr(model, "levels", data.values)
        facts |= data.modality.units(each, predicted, data.splits[plan.split], data.shape, levels)
        facts["bound"] = REPORTED_BOUND.get(model.bound, model.bound) if plan.likelihood is None else ODE_BOUND
        facts |= {} if plan.likelihood is None else {"likelihood": plan.likelihood}
        facts |= {"given": given} if (given := [*null_conditions(model)]) else {}
        scored = of_kind["likelihoods"].items()
        means |= {name: interval(compute(name, metric, each, facts)) for name, metric in scored}
    if found.guesses:
        each = torch.cat(found.guesses)
        facts |= hidden.facts_of(each)
        for name, metric in of_kind["hidden"].items():
            means[name] = Interval(*map(metric.of_mean, interval(compute(name, metric, each))))
    if found.labels:
        each, whole = torch.cat(found.labels), {name: torch.cat(parts) for name, parts in found.embeddings.items()}
        scored = of_kind["retrieval"].items()
        means |= {name: interval(compute(name, metric, each, whole)) for name, metric in scored}
        facts |= {name: round(means[name].mean, 4) for name, _ in scored}
        facts["retrieval"] = {
            f"{one}_to_{other}": round(retrieval.hits(whole[one], whole[other], each).mean().item(), 4)
            for one, other in itertools.permutations(whole, 2)
        }
    for name, part, rows in _corpora(first_items(data, plan.split, n)):
        own: Facts = {}
        if found.nats:
            each, predicted = torch.cat(found.nats).double()[rows], int(torch.cat(found.targets)[rows].sum())
            own |= data.modality.units(each + 0.0, predicted, part, data.shape, data.values)
        own |= hidden.facts_of(torch.cat(found.guesses)[rows]) if found.guesses else {}
        facts["corpora"] = {**facts.get("corpora", {}), name: own}
    for name, values in found.values.items():
        means[name] = interval(torch.cat(values))
        facts[name] = round(means[name].mean, 2 if metrics[name].unit == "dB" else 4)
    facts |= _codes(found.codes, n) if len(found.codes) else {}
    return facts, means


def collect(loaded: Loaded, data: Data, checked: CheckedPlan, metrics: Mapping[str, Metric]) -> Collected:
    """Compute everything that the model can be asked of the first n items of the split."""
    plan, device = checked.plan, loaded.device
    model: Any = loaded.model
    score = scorer(loaded, data, plan.likelihood)
    infills, embeds, reconstructs = (isinstance(loaded.model, kind) for kind in (Infiller, Embedder, Reconstructor))
    codes = torch.zeros(getattr(model, "vocabulary", None) or 0, dtype=torch.int64)
    found = Collected(codes=codes)
    found.values = {name: [] for name, metric in metrics.items() if metric.kind == "reconstructions"}
    with progress.task("evaluating", checked.n, "items") as clock:
        for batch in batches(first_items(data, plan.split, checked.n), plan.batch_size):
            batch = {name: value.to(device) for name, value in batch.items()}
            size = len(next(iter(batch.values())))
            with loaded.autocast():
                if score is not None:
                    found.nats.append(-score(batch, plan.seed + clock.done).cpu())
                if infills:
                    found.guesses.append(hidden.score(model, batch, data.field, clock.done).cpu())
                if embeds:
                    for name, part in model.embed_media(batch).items():
                        found.embeddings.setdefault(name, []).append(part.cpu())
                    own = batch["label"].cpu() if "label" in batch else clock.done + torch.arange(size)
                    found.labels.append(own)
                again: Any = model.reconstruct(batch) if reconstructs else None
                if len(codes):
                    codes += model.encode(batch[data.field]).flatten().bincount(minlength=len(codes)).cpu()
            for name, values in found.values.items() if reconstructs else ():
                values.append(compute_pairs(name, metrics[name], data, again, batch[model.field]))
            if "mask" in batch:
                found.targets.append(batch["mask"][:, 1:].sum(1).cpu())
            clock.add(size)
    return found


def scorer(loaded: Loaded, data: Data, method: object) -> Score | None:
    """Return `score(batch, seed) -> ln p` (B,) in nats: the model's own likelihood, or that of the config node `method`.

    Returns None for a model that only reconstructs, fills in or embeds. Raises UserError for a model with neither.
    """
    if method is not None:
        function = build_typed(method)
        check_sampler(function, loaded.model, "likelihood")
        return functools.partial(function, loaded.model, levels=data.levels)
    if isinstance(loaded.model, Scorable):
        return loaded.model.log_prob
    if isinstance(loaded.model, Reconstructor | Infiller | Embedder):
        return None
    flows = hasattr(loaded.model, "denoise") and loaded.model.codec is None  # a diffusion model of the data itself
    can = [name for name, metric in standard_metrics().items() if can_compute(metric, loaded, data)]
    hint = f"choose metrics= among {', '.join(can)}" if can else "there is no metric for it"
    hint = "choose likelihood=probability_flow" if flows else hint
    raise UserError(
        f"{loaded.path} has no likelihood of its own: {type(loaded.model).__name__} has no log_prob; {hint}"
    )


def _corpora(items: Split) -> Iterator[tuple[str, Split, Tensor]]:
    """Yield the name of each corpus of items, its split, and which items, int64 (n,); nothing for a text that is not mixed."""
    whole: Any = items.split if isinstance(items, Subset) else items
    if not hasattr(whole, "parts"):
        return
    owner = whole.owner[items.index] if isinstance(items, Subset) else whole.owner
    for k, (name, part) in enumerate(whole.parts.items()):
        if len(rows := (owner == k).nonzero()[:, 0]):
            yield name, part, rows


def _codes(counts: Tensor, n: int) -> Facts:
    """Return the code perplexity of a VQ-VAE's token counts (K,) over n samples, and an image's bits by their entropy."""
    perplexity, tokens = units.perplexity(counts), int(counts.sum()) // n
    bits = {"bits_per_image": round(tokens * math.log2(perplexity), 1), "tokens_per_image": tokens}
    return {"code_perplexity": round(perplexity, 1), "codes": len(counts), **bits}
