"""The best of several candidates: another model says which one suits what was asked for (Ramesh et al., 2021, section 2.6)."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Batch, Embedder, OnStep


def reranked(run: Callable[..., Batch], scorer: Embedder, field: str, candidates: int) -> Callable[..., Batch]:
    """Return a sampler that draws candidates by `run` and keeps, of each sample, the one whose `field` suits its conditions most.

    That is measured by the mean cosine similarity of the scorer's embeddings of the candidate and of each condition that it
    embeds. The first candidate of a sample has the sample's own seed, and the seeds of the others follow from it, so that a
    sample still depends on its seed alone. The first of equals is kept.

    Returns the sampler's batch with `similarity` (n,) and `candidate` int64 (n,), the number of the one that was kept. Raises
    UserError for conditions, or samples, that the scorer does not embed.
    """

    @torch.inference_mode()
    def best(
        model: nn.Module, seeds: Tensor, cond: Batch | None = None, on_step: OnStep | None = None, **given: Tensor
    ) -> Batch:
        device = next(model.parameters()).device
        asked = embed(scorer, cond or {}, device)
        if not asked:
            raise UserError(
                "rerank= compares samples with what they are asked for, and scorer= embeds nothing of it: give prompt=, or name "
                "another scorer="
            )
        kept: Batch = {}
        for k in range(candidates):
            own = seeds if k == 0 else torch.tensor([rng.mix(seed, k) for seed in seeds.tolist()])
            found = run(model, own, cond, on_step and _counted(on_step, k, candidates), **given)
            drawn = embed(scorer, {field: found[field]}, device)
            if not drawn:
                raise UserError(
                    f"scorer= embeds no {field}, which samples of this model are: name one that was trained on it"
                )
            similarity = torch.stack([(drawn[0] * other).sum(1) for other in asked]).mean(0).cpu()
            found = {**found, "similarity": similarity, "candidate": torch.full((len(seeds),), k)}
            kept = _choose(similarity > kept["similarity"], found, kept) if kept else found
        return kept

    return best


def note(folder: Path, names: Sequence[str], batch: Batch, candidates: int, scorer: object) -> list[str]:
    """Write to rerank.json which candidate of each sample was kept, of how many and by which model; returns the file's name."""
    rows = zip(names, batch["candidate"].tolist(), batch["similarity"].tolist(), strict=True)
    kept = {name: {"candidate": k, "similarity": round(value, 4)} for name, k, value in rows}
    about = {"candidates": candidates, "scorer": str(scorer), "kept": kept}
    (folder / "rerank.json").write_text(json.dumps(about, indent=1) + "\n")
    return [f"rerank.json (each the best of {candidates} by {scorer})"]


def embed(scorer: Embedder, batch: Batch, device: torch.device) -> list[Tensor]:
    """Return the scorer's embeddings (n, D) of the fields of a batch, of those that it knows."""
    return list(scorer.embed_media({name: value.to(device) for name, value in batch.items()}).values())


def _choose(rows: Tensor, new: Batch, old: Batch) -> Batch:
    """Return a batch with these rows, bool (n,), from the first and the others from the second."""
    chosen = {}
    for name, value in new.items():
        here = rows.to(value.device).view(-1, *[1] * (value.ndim - 1))
        chosen[name] = torch.where(here, value, old[name])
    return chosen


def _counted(on_step: OnStep, k: int, candidates: int) -> OnStep:
    """Return on_step with the steps counted over all candidates."""

    @functools.wraps(on_step)
    def counted(i: int, steps: int, state: Batch) -> None:
        on_step(k * steps + i, candidates * steps, state)

    return counted
