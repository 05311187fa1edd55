"""Scores of hidden tokens over a whole split: each position once, hidden together with a stated share of its window."""

import torch
from torch import Tensor

from genai.core import rng
from genai.core.protocols import Batch, Infiller
from genai.core.runs import Facts
from genai.metrics import likelihood

SHARE = 0.15  # of the targets of an item that are hidden at a time (Devlin et al., 2019)


def score(model: Infiller, batch: Batch, field: str, first: int) -> Tensor:
    """Return of each item the nats of its targets, the number of right guesses, and that of targets: float64 (B, 3).

    The targets, those of `mask` or all, are cut into groups in a fixed random order, that of item first + i of the split. Each
    group is hidden in a pass of its own. The last is filled up with targets that have been scored and now are only hidden.
    """
    tokens = batch[field]
    target = batch["mask"] if "mask" in batch else torch.ones_like(tokens, dtype=torch.bool)
    n = target.sum(1, keepdim=True)
    size = (SHARE * n).round().clamp_min(1)
    order = rng.uniform(rng.seed_range(first, len(tokens)).to(tokens.device), tokens.shape[1:], stream=rng.MASK)
    rank = order.masked_fill(~target, 2.0).argsort(1).argsort(1)
    found = torch.zeros(len(tokens), 3, dtype=torch.float64, device=tokens.device)
    for k in range(int((n / size).ceil().max())):
        last = ((k + 1) * size).minimum(n)
        hidden = target & (rank < last) & (rank >= last - size)
        counted = hidden & (rank >= k * size)
        nats, right = model.score_hidden(batch, hidden)
        found += torch.stack([(of * counted).sum(1).double() for of in (nats, right, counted)], 1)
    return found


def facts_of(found: Tensor) -> Facts:
    """Return the means of scores (N, 3) over all targets, with the share that was hidden at a time."""
    nats, right, n = found.sum(0).tolist()
    return {**likelihood.per_hidden(nats, right, int(n)), "masked_share": SHARE}
