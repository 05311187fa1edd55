"""The one ruler of likelihoods: nats of whole samples of discrete data to figures that compare across families.

A figure belongs here only if it is -ln of a probability that sums to 1 over all values the data can take, or an upper bound
of that. Densities, reconstruction errors and losses with other weights are none, whatever their unit.
"""

import math
from typing import Any

from torch import Tensor


def per_dimension(nats: Tensor, dimensions: int, levels: int | None) -> dict[str, Any]:
    """Bits per dimension, mean over samples with its standard error, of nats (N,); `levels` values for each dimension."""
    bits = nats / (dimensions * math.log(2))
    return {
        "bits_per_dim": round(bits.mean().item(), 4),
        "standard_error": round((bits.std() / math.sqrt(len(bits))).item(), 4),
        "nats": round(nats.mean().item(), 2),
        "levels": levels,
    }


def per_token(nats: Tensor, tokens: int, characters: float) -> dict[str, Any]:
    """Of a text of so many tokens and characters, nats (N,) in all: per token, and in bits per character, which compare
    across tokenizers."""
    each = nats.sum().item() / tokens
    return {
        "nats_per_token": round(each, 4),
        "perplexity": round(math.exp(each), 4),
        "bits_per_character": round(nats.sum().item() / math.log(2) / characters, 4),
        "tokens": tokens,
    }


def perplexity(counts: Tensor) -> float:
    """e to the entropy of how often each of K codes occurs, counts (K,): how many equally likely ones that is worth."""
    p = counts.double() / counts.sum()
    return math.exp(-p.xlogy(p).sum().item())
