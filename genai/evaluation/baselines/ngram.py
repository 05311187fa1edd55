"""An interpolated n-gram model of token ids."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import at_least
from genai.core.protocols import Batch
from genai.evaluation.baselines.base import Baseline, TrainingData


class Order(NamedTuple):
    """All n-grams of one length that occur in the training text.

    Attributes:
        keys: sorted; index of the context among the shorter n-grams, times the vocabulary size, plus the token.
        counts: how often each occurs.
        total, kinds: for each context, how many tokens follow it, and how many different ones.
    """

    keys: np.ndarray
    counts: np.ndarray
    total: np.ndarray
    kinds: np.ndarray


class NGram(Baseline):
    """An n-gram model with Witten-Bell smoothing (Witten and Bell 1991, method C).

    p(token | context) = (count + kinds * p_shorter) / (total + kinds), down to the uniform distribution; for a context that
    never occurred it is p_shorter, the probability by the context without its first token.

    Args:
        order: n, the number of tokens of an n-gram.
        period: all n-grams are also counted by their place in periods of so many tokens, such as a bar; None: whatever the place.
            For data whose rows begin with a period, after their first token.
    """

    field = "tokens"

    def __init__(self, order: int = 5, period: int | None = None):
        self.order = at_least(order, 1, "baseline.order")
        self.period = 1 if period is None else at_least(period, 1, "baseline.period")
        self.needs = () if period is None else ("bar",)
        self.what = f"interpolated {order}-gram" + ("" if period is None else f" with the place in {period}")

    def fit(self, data: TrainingData, seed: int) -> "NGram":
        self.vocabulary, self.orders = data.levels or 0, []
        tokens = np.atleast_2d(data.x.numpy())  # (N, T)
        counted = targets(data)
        context, contexts = self._places(tokens), self.period
        for _ in range(self.order):
            keys, counts = np.unique(self._keys(context, tokens)[counted & (context >= 0)], return_counts=True)
            if not len(keys):  # all rows are shorter
                break
            before = keys // self.vocabulary
            total, kinds = np.bincount(before, counts, contexts), np.bincount(before, minlength=contexts)
            self.orders.append(Order(keys, counts, total, kinds))
            context, contexts = _after(self._indices(self.orders[-1], context, tokens)), len(keys)
        return self

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p (B,) in nats of tokens (B, T + 1), all but the first, or of those in `mask`."""
        nats = torch.from_numpy(np.log(self.each(batch["tokens"].numpy()))[:, 1:])
        return (nats * batch["mask"][:, 1:] if "mask" in batch else nats).sum(1)

    def each(self, tokens: np.ndarray) -> np.ndarray:
        """Return the probability of every token (B, T) given those before it in its row."""
        p, context = np.full(tokens.shape, 1 / self.vocabulary), self._places(tokens)
        for order in self.orders:
            gram = self._indices(order, context, tokens)
            count = np.where(gram >= 0, order.counts[gram], 0)
            total, kinds = (np.where(context >= 0, of[context], 0) for of in (order.total, order.kinds))
            p = witten_bell(p, count, total, kinds)
            context = _after(gram)
        return p

    def distribution(self, context: list[int]) -> np.ndarray:
        """Return the distribution (V,) of the token that follows a context."""
        rows = np.tile(np.array(context, dtype=np.int64), (self.vocabulary, 1)).reshape(self.vocabulary, -1)
        return self.each(np.concatenate([rows, np.arange(self.vocabulary)[:, None]], 1))[:, -1]

    def _places(self, tokens: np.ndarray) -> np.ndarray:
        """Return the context of no token (N, T): the place in the period, 0 for the token after the first."""
        return np.broadcast_to((np.arange(tokens.shape[1]) - 1) % self.period, tokens.shape)

    def _keys(self, context: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return context * self.vocabulary + tokens

    def _indices(self, order: Order, context: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the index of each n-gram among those that occur, -1 for one that does not."""
        keys = self._keys(context, tokens)
        at = np.searchsorted(order.keys, keys).clip(max=len(order.keys) - 1)
        return np.where((context >= 0) & (order.keys[at] == keys), at, -1)


def _after(gram: np.ndarray) -> np.ndarray:
    """Return the n-gram that ends before each token, its context one order higher; -1 at the beginning of a row."""
    return np.concatenate([np.full_like(gram[:, :1], -1), gram[:, :-1]], 1)


def witten_bell(p: np.ndarray, count: np.ndarray, total: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return (count + kinds p) / (total + kinds), or p where `total` is 0."""
    return np.where(total > 0, (count + kinds * p) / np.maximum(total + kinds, 1), p)


def targets(data: TrainingData) -> np.ndarray:
    """Return which tokens (N, T) are counted: those of the mask, all of a text, all but the first of rows."""
    if data.mask is not None:
        return data.mask.numpy()
    found = np.ones(np.atleast_2d(data.x.numpy()).shape, bool)
    found[:, 0] = data.x.ndim == 1
    return found
