"""One pass over a split: the likelihood of its items, guesses of their hidden parts, embeddings, and reconstructions."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
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
from genai.evaluation.metrics import can_compute, compute, compute_pairs, standard_metrics
from genai.evaluation.plan import CheckedPlan
from genai.metrics import likelihood as units
from genai.metrics import retrieval
from genai.metrics.intervals import Interval, interval

Score = Callable[[Batch, int], Tensor]
REPORTED_BOUND = {"lower bound": "upper bound"}  # a lower bound of ln p is an upper bound of -ln p, which is reported
ODE_BOUND = "upper bound up to the error of the ODE's solver"


def run(loaded: Loaded, data: Data, checked: CheckedPlan) -> tuple[Facts, dict[str, Interval]]:
    """Evaluate the model on the first n items of the split.

    Returns the facts of the pass, and the mean of each metric with its bootstrap interval. All metrics of a pass that the model
    can have are computed, also those not asked for: they cost little, and its facts report them.
    """
    plan, n, metrics = checked.plan, checked.n, {**checked.available, **checked.pass_metrics}
    model: Any = loaded.model
    reconstructs, infills = isinstance(loaded.model, Reconstructor), isinstance(loaded.model, Infiller)
    embeds = isinstance(loaded.model, Embedder)
    score, device = scorer(loaded, data, plan.likelihood), loaded.device
    codes = torch.zeros(getattr(model, "vocabulary", None) or 0, dtype=torch.int64)
    values = {name: [] for name, metric in metrics.items() if metric.kind == "reconstructions"}
    nats, targets, guesses, labels = [], [], [], []
    embeddings: dict[str, list[Tensor]] = {}
    with progress.task("evaluating", n, "items") as clock:
        for batch in batches(first_items(data, plan.split, n), plan.batch_size):
            batch = {name: value.to(device) for name, value in batch.items()}
            if score is not None:
                with loaded.autocast():
                    nats.append(-score(batch, plan.seed + clock.done).cpu())
            if infills:
                with loaded.autocast():
                    guesses.append(hidden.score(model, batch, data.field, clock.done).cpu())
            if embeds:
                with loaded.autocast():
                    for name, found in model.embed_media(batch).items():
                        embeddings.setdefault(name, []).append(found.cpu())
                size = len(next(iter(batch.values())))
                labels.append(batch["label"].cpu() if "label" in batch else clock.done + torch.arange(size))
            if reconstructs:
                with loaded.autocast():
                    again = model.reconstruct(batch)
                for name, found in values.items():
                    found.append(compute_pairs(name, metrics[name], data, again, batch[model.field]))
            if len(codes):
                with loaded.autocast():
                    codes += model.encode(batch[data.field]).flatten().bincount(minlength=len(codes)).cpu()
            if "mask" in batch:
                targets.append(batch["mask"][:, 1:].sum(1).cpu())
            clock.add(len(next(iter(batch.values()))))
    facts: Facts = {}
    means: dict[str, Interval] = {}
    if nats:
        each = torch.cat(nats).double() + 0.0  # turns -0 into 0 for items of probability 1
        predicted = int(torch.cat(targets).sum()) if targets else None
        levels = getattr(model, "levels", data.values)
        facts |= data.modality.units(each, predicted, data.splits[plan.split], data.shape, levels)
        facts["bound"] = REPORTED_BOUND.get(model.bound, model.bound) if plan.likelihood is None else ODE_BOUND
        facts |= {} if plan.likelihood is None else {"likelihood": plan.likelihood}
        facts |= {"given": given} if (given := [*null_conditions(model)]) else {}
        scored = {name: metric for name, metric in metrics.items() if metric.kind == "likelihoods"}
        means |= {name: interval(compute(name, metric, each, facts)) for name, metric in scored.items()}
    if guesses:
        each = torch.cat(guesses)
        facts |= hidden.facts_of(each)
        scored = {name: metric for name, metric in metrics.items() if metric.kind == "hidden"}
        for name, metric in scored.items():
            means[name] = Interval(*map(metric.of_mean, interval(compute(name, metric, each))))
    if labels:
        each, whole = torch.cat(labels), {name: torch.cat(parts) for name, parts in embeddings.items()}
        scored = {name: metric for name, metric in metrics.items() if metric.kind == "retrieval"}
        means |= {name: interval(compute(name, metric, each, whole)) for name, metric in scored.items()}
        facts |= {name: round(means[name].mean, 4) for name in scored}
        facts["retrieval"] = {
            f"{one}_to_{other}": round(retrieval.hits(whole[one], whole[other], each).mean().item(), 4)
            for one, other in itertools.permutations(whole, 2)
        }
    for name, part, rows in _corpora(first_items(data, plan.split, n)):
        own: Facts = {}
        if nats:
            each, predicted = torch.cat(nats).double()[rows], int(torch.cat(targets)[rows].sum())
            own |= data.modality.units(each + 0.0, predicted, part, data.shape, data.values)
        own |= hidden.facts_of(torch.cat(guesses)[rows]) if guesses else {}
        facts["corpora"] = {**facts.get("corpora", {}), name: own}
    for name, found in values.items():
        means[name] = interval(torch.cat(found))
        facts[name] = round(means[name].mean, 2 if metrics[name].unit == "dB" else 4)
    facts |= _codes(codes, n) if len(codes) else {}
    return facts, means


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
