"""Comparable likelihoods: -ln p of whole samples of discrete data, converted to units that all model families share.

Only -ln p of a probability that sums to 1 over all values of the data, or an upper bound of it, may be converted here. Densities,
reconstruction errors and losses with other weights are not likelihoods of the data, whatever their unit.
"""

import math

from torch import Tensor

from genai.core.runs import Facts


def per_dimension(nats: Tensor, dimensions: int, levels: int | None) -> Facts:
    """Convert nats (N,) to bits per dimension: the mean over samples with its standard error.

    `levels` is the number of values of each dimension, which is reported with it.
    """
    bits = nats / (dimensions * math.log(2))
    return {
        "bits_per_dim": round(bits.mean().item(), 4),
        "standard_error": round((bits.std() / math.sqrt(len(bits))).item(), 4),
        "nats": round(nats.mean().item(), 2),
        "levels": levels,
    }


def per_token(nats: Tensor, tokens: int, characters: float) -> Facts:
    """Convert nats (N,) of a text to nats per token, and to bits per character, which are comparable across tokenizers."""
    each = nats.sum().item() / tokens
    return {
        "nats_per_token": round(each, 4),
        "perplexity": round(math.exp(each), 4),
        "bits_per_character": round(nats.sum().item() / math.log(2) / characters, 4),
        "tokens": tokens,
    }


def per_hidden(nats: float, right: float, hidden: int) -> Facts:
    """Convert nats of hidden tokens, of which some were guessed right, to means over all of them.

    No likelihood of the text: each token is given others that are scored as well, hence pseudo-perplexity (Salazar et al., 2020).
    """
    mean = nats / hidden
    return {
        "masked_nats": round(mean, 4),
        "masked_accuracy": round(right / hidden, 4),
        "pseudo_perplexity": round(math.exp(mean), 4),
        "masked_tokens": hidden,
    }


def perplexity(counts: Tensor) -> float:
    """Compute the perplexity exp(entropy) of code counts (K,): the number of equally likely codes with that entropy."""
    p = counts.double() / counts.sum()
    return math.exp(-p.xlogy(p).sum().item())


def per_sample(nats: Tensor, samples: int, levels: int | None) -> Facts:
    """Convert nats (N,) of clips of audio, of `samples` samples in all, to bits per sample; clips may differ in length."""
    each = nats.sum().item() / samples
    return {"bits_per_sample": round(each / math.log(2), 4), "samples": samples, "levels": levels}


def per_step(nats: Tensor, steps: int) -> Facts:
    """Convert nats (N,) of melodies, of `steps` steps in all, to nats per step; the events of all voices at a step are one."""
    return {"nats_per_step": round(nats.sum().item() / steps, 4), "steps": steps}
