"""Baselines of melodies: counts of events given the last onsets and the beat."""

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import at_least
from genai.core.protocols import Batch
from genai.evaluation.baselines.base import Baseline, TrainingData
from genai.evaluation.baselines.ngram import targets, witten_bell

LONG = 64  # steps since the last onset from which on they are one


class Onsets(Baseline):
    """Counts of events given the last two that were no holds, the steps since the last one, and the place in the bar.

    Witten-Bell smoothing as in `NGram`, by contexts each finer than the one before: the place; the steps since; the last event;
    the one before it.

    Args:
        period: steps of a bar.
    """

    field, needs = "tokens", ("bar",)

    def __init__(self, period: int = 16):
        self.period = at_least(period, 1, "baseline.period")
        self.what = "last two onsets, time since and place in the bar"

    def fit(self, data: TrainingData, seed: int) -> "Onsets":
        self.vocabulary, self.tables = data.levels or 0, []
        tokens, counted = data.x.numpy(), targets(data)
        for context in self.contexts(tokens):
            keys, counts = np.unique((context * self.vocabulary + tokens)[counted], return_counts=True)
            seen, at = np.unique(keys // self.vocabulary, return_inverse=True)
            self.tables.append((keys, counts, seen, np.bincount(at, counts), np.bincount(at)))
        return self

    def contexts(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Return the contexts (N, T) of each token as numbers, the coarsest first."""
        n, length = tokens.shape
        places = np.arange(length) - 1
        last = np.where(tokens > 0, np.arange(length), -1)
        last = np.maximum.accumulate(np.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1], 1)  # before each token
        rows, found = np.arange(n)[:, None], np.pad(tokens, ((0, 0), (0, 1)))  # at -1 stands a hold
        before = np.where(last >= 0, last[rows, last], -1)
        since = np.minimum(np.arange(length) - last, LONG)
        chain = [np.broadcast_to(places % self.period, tokens.shape)]
        for value, size in (
            (since, LONG + 1),
            (found[rows, last], self.vocabulary),
            (found[rows, before], self.vocabulary),
        ):
            chain.append(chain[-1] * size + value)
        return chain

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p (B,) in nats of tokens (B, 1 + T), all but the first, or of those in `mask`."""
        tokens = batch["tokens"].numpy()
        p = np.full(tokens.shape, 1 / self.vocabulary)
        for context, (keys, counts, seen, total, kinds) in zip(self.contexts(tokens), self.tables, strict=True):
            count = _look_up(keys, counts, context * self.vocabulary + tokens)
            p = witten_bell(p, count, _look_up(seen, total, context), _look_up(seen, kinds, context))
        nats = torch.from_numpy(np.log(p)[:, 1:])
        return (nats * batch["mask"][:, 1:] if "mask" in batch else nats).sum(1)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key, 0 where it is not among the sorted keys."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
