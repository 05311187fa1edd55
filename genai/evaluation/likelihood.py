"""One pass over a split: the likelihood of its items, and what a model gives back of them."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from genai.build import build_typed
from genai.checkpoint import Loaded
from genai.core.errors import UserError
from genai.core.protocols import Batch, Reconstructing, Scorable, check_sampler
from genai.data.base import Data, part
from genai.data.stream import batches
from genai.evaluation.clock import Clock
from genai.metrics import likelihood as units
from genai.metrics.images import WINDOW, psnr, ssim
from genai.metrics.intervals import Interval, bootstrap

Score = Callable[[Batch, int], Tensor]
REPORTED = {"lower bound": "upper bound"}  # of ln p, and so of what is reported, which is -ln p in some unit
SOLVED = "upper bound up to the error of the ODE's solver"


def possible(loaded: Loaded, data: Data, method: Any = None) -> list[str]:
    """The metrics that a model can have of its data's items."""
    names = []
    if isinstance(loaded.model, Scorable) or method is not None:
        names += ["nats_per_token", "bits_per_character"] if data.modality.windowed else ["bits_per_dim"]
    if isinstance(loaded.model, Reconstructing):
        names += ["reconstruction_psnr_db"]
        names += ["reconstruction_ssim"] if min(data.shape[1:], default=0) >= WINDOW else []
    return names


def run(
    loaded: Loaded, data: Data, split: str, n: int, seed: int, batch_size: int, method: Any
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """The facts of one pass, and the mean of each metric with its bootstrap interval."""
    model: Any = loaded.model
    reconstructs = isinstance(loaded.model, Reconstructing)
    score, device = scorer(loaded, data, method), loaded.device
    codes = torch.zeros(getattr(model, "vocabulary", None) or 0, dtype=torch.int64)
    nats, decibels, likeness, targets, clock = [], [], [], [], Clock(n, "items")
    for batch in batches(part(data, split, n), batch_size):
        batch = {name: value.to(device) for name, value in batch.items()}
        if score is not None:
            with loaded.computing():
                nats.append(-score(batch, seed + clock.done).cpu())
        if reconstructs:
            with loaded.computing():
                again = model.reconstruct(batch)
            decibels.append(psnr(again, batch[model.field]).cpu())
            if again.ndim == 4 and min(again.shape[2:]) >= WINDOW:
                likeness.append(ssim(again, batch[model.field]).cpu())
        if len(codes):
            with loaded.computing():
                codes += model.encode(batch[data.field]).flatten().bincount(minlength=len(codes)).cpu()
        if "mask" in batch:
            targets.append(batch["mask"][:, 1:].sum(1).cpu())
        clock.add(len(next(iter(batch.values()))))
    clock.stop()
    facts: dict[str, Any] = {}
    means: dict[str, Interval] = {}
    if nats:
        each = torch.cat(nats).double() + 0.0  # 0, not -0, for what is certain
        facts |= _likelihood(each, torch.cat(targets) if targets else None, data, split, model)
        facts["bound"] = REPORTED.get(model.bound, model.bound) if method is None else SOLVED
        facts |= {} if method is None else {"likelihood": method}
        given = list(model.null()) if hasattr(model, "null") else []
        facts |= {"given": given} if given else {}
        means |= _means(facts, each)
    for name, values in (("reconstruction_psnr_db", decibels), ("reconstruction_ssim", likeness)):
        if values:
            means[name] = _interval(torch.cat(values))
            facts[name] = round(means[name].mean, 2 if name.endswith("db") else 4)
    facts |= _codes(codes, n) if len(codes) else {}
    return facts, means


def scorer(loaded: Loaded, data: Data, method: Any) -> Score | None:
    """`score(batch, seed)` -> ln p (B,), the model's own or by `method`; None for a model that only reconstructs.

    Raises UserError if there is nothing to evaluate.
    """
    if method is not None:
        function = build_typed(method)
        check_sampler(function, loaded.model, "likelihood")
        return functools.partial(function, loaded.model, levels=data.levels)
    if isinstance(loaded.model, Scorable):
        return loaded.model.log_prob
    if isinstance(loaded.model, Reconstructing):
        return None
    flows = hasattr(loaded.model, "denoise") and loaded.model.codec is None  # a diffusion model of the data itself
    hint = "choose likelihood=probability_flow" if flows else "measure its samples with metrics=[frechet,recall]"
    raise UserError(
        f"{loaded.path} has no likelihood of its own: {type(loaded.model).__name__} has no log_prob; {hint}"
    )


def _likelihood(nats: Tensor, targets: Tensor | None, data: Any, split: str, model: Any) -> dict[str, Any]:
    """In the unit of the data's kind; a model of binary images counts two values of grey ones."""
    if targets is None:
        return units.per_dimension(nats, math.prod(data.shape), getattr(model, "levels", data.values))
    part, tokens = data.splits[split], int(targets.sum())
    window = {"context": part.length, "context_overlap": part.overlap, "vocabulary": data.levels}
    return units.per_token(nats, tokens, tokens * part.characters / part.tokens) | window


def _means(facts: dict[str, Any], nats: Tensor) -> Iterator[tuple[str, Interval]]:
    """Nats of each item in the units of the facts: all are in proportion to their sum."""
    mean = nats.mean().item()  # 0 of a text of one symbol
    for name in ("bits_per_dim", "nats_per_token", "bits_per_character"):
        if name in facts:
            yield name, _interval(nats * (facts[name] / mean if mean else 1.0))


def _interval(values: Tensor) -> Interval:
    """Of the mean of values (N,); one alone has none."""
    if len(values) < 2 or not values.isfinite().all():
        return Interval(*[values.double().mean().item()] * 3)
    return bootstrap(values)


def _codes(counts: Tensor, n: int) -> dict[str, Any]:
    """What the token ids of n samples are worth: code perplexity, and bits of a sample if each costs its entropy."""
    perplexity, tokens = units.perplexity(counts), int(counts.sum()) // n
    bits = {"bits_per_sample": round(tokens * math.log2(perplexity), 1), "tokens_per_sample": tokens}
    return {"code_perplexity": round(perplexity, 1), "codes": len(counts), **bits}
