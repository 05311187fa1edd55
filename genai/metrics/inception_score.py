"""Inception score (Salimans et al. 2016, section 4) of the class probabilities of any classifier."""

from typing import NamedTuple

import torch

from genai.core.errors import UserError, at_least
from genai.metrics.rows import Array, rows


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the score over splits; the latter is 0 for one split."""

    mean: float
    std: float


def inception_score(probabilities: Array, splits: int = 10, seed: int = 0) -> InceptionScore:
    """Compute exp of the mean of KL(p(y|x) || p(y)) from class probabilities (N, K), with p(y) of each split.

    The score is between 1 and K. Samples are shuffled by `seed` before they are split, as they are often sorted by class.
    Compare only scores with equal N and `splits`: smaller splits score lower.

    Raises UserError if a row is not a distribution or there are fewer samples than splits.
    """
    p = rows(probabilities, "probabilities").double()
    # 1e-3 allows probabilities that were rounded to half precision.
    if (p < 0).any() or ((p.sum(1) - 1).abs() > 1e-3).any():
        raise UserError("probabilities must not be negative, and each row must add up to 1: give the softmax of logits")
    if at_least(splits, 1, "splits") > len(p):
        raise UserError(f"splits={splits} of {len(p)} samples would leave empty ones: give fewer")
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in p[order.to(p.device)].tensor_split(splits):
        mean = part.mean(0)
        scores.append((part.xlogy(part) - part.xlogy(mean)).sum(1).mean().exp())
    found = torch.stack(scores)
    return InceptionScore(found.mean().item(), found.std(correction=0).item())
