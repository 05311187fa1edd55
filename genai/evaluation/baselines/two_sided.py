"""Counts of tokens given their neighbours on both sides."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import at_least
from genai.core.protocols import Batch
from genai.evaluation.baselines.base import Baseline, TrainingData
from genai.evaluation.baselines.ngram import targets

MOST = 10**7  # probabilities in memory at once


class Table(NamedTuple):
    """The contexts of so many tokens to the left and right, with the tokens between.

    Attributes:
        contexts: sorted; index of the context that is one token shorter, times the vocabulary size, plus that token.
        first: where the tokens of each context begin in the next two, and where the last one's end.
        tokens, counts: the tokens of all contexts, and how often each occurs there.
    """

    contexts: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray


class TwoSidedNGram(Baseline):
    """Counts of tokens given up to `order` neighbours on each side, with Witten-Bell smoothing (method C) as in `NGram`.

    Contexts grow by turns to the left and to the right, as far as neighbours are not hidden; each is smoothed by the one before.

    Args:
        order: neighbours on each side.
    """

    field = "tokens"

    def __init__(self, order: int = 3):
        self.order = at_least(order, 0, "baseline.order")
        self.what = f"counts given {order} tokens on each side"

    def fit(self, data: TrainingData, seed: int) -> "TwoSidedNGram":
        self.vocabulary, self.tables = data.levels or 0, {}
        tokens = np.atleast_2d(data.x.numpy())  # (N, T)
        counted = targets(data)
        known = np.ones(tokens.shape, bool)
        found: dict[tuple[int, int], np.ndarray] = {}
        for left, right in self.sizes():
            longer = self._longer(found, tokens, known, left, right)
            here = counted & (longer >= 0)
            contexts = np.unique(longer[here])
            at = np.searchsorted(contexts, longer).clip(max=max(len(contexts) - 1, 0))
            found[left, right] = np.where(here, at, -1)
            keys, counts = np.unique(found[left, right][here] * self.vocabulary + tokens[here], return_counts=True)
            first = np.searchsorted(keys, np.arange(len(contexts) + 1) * self.vocabulary)
            self.tables[left, right] = Table(contexts, first, keys % self.vocabulary, counts)
        return self

    def sizes(self) -> list[tuple[int, int]]:
        """Return the numbers of tokens to the left and right of all contexts, each after the one that it is an extension of."""
        return [(left, right) for left in range(self.order + 1) for right in range(self.order + 1)]

    def _longer(self, found: dict, tokens: np.ndarray, known: np.ndarray, left: int, right: int) -> np.ndarray:
        """Return each position's context (N, T) by that of one token less, as in `Table.contexts`; -1 where there is none."""
        if (left, right) == (0, 0):
            return np.zeros(tokens.shape, np.int64)
        shorter, by = (found[left, right - 1], right) if right else (found[left - 1, right], -left)
        width = tokens.shape[1]
        at = np.arange(width) + by
        inside = (at >= 0) & (at < width)
        at = at.clip(0, width - 1)
        usable = inside & known[:, at] & (shorter >= 0)
        return np.where(usable, shorter * self.vocabulary + tokens[:, at], -1)

    def score_hidden(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln p (B, T) in nats of the hidden tokens given the others, and whether each is the most probable."""
        tokens, known = batch[self.field].numpy(), ~hidden.numpy()
        found: dict[tuple[int, int], np.ndarray] = {}
        for size in self.sizes():
            longer, contexts = self._longer(found, tokens, known, *size), self.tables[size].contexts
            at = np.searchsorted(contexts, longer).clip(max=max(len(contexts) - 1, 0))
            found[size] = np.where((longer >= 0) & (contexts[at] == longer), at, -1)
        reach = [self._reach(known, by) for by in (-1, 1)]
        nats, right = np.zeros(tokens.shape), np.zeros(tokens.shape, bool)
        rows, columns = np.nonzero(~known)
        step = max(MOST // self.vocabulary, 1)
        for first in range(0, len(rows), step):
            part = rows[first : first + step], columns[first : first + step]
            p = self._distributions({size: of[part] for size, of in found.items()}, *(of[part] for of in reach))
            wanted = tokens[part]
            nats[part] = -np.log(p[np.arange(len(p)), wanted])
            right[part] = p.argmax(1) == wanted
        return torch.from_numpy(nats), torch.from_numpy(right)

    def _reach(self, known: np.ndarray, by: int) -> np.ndarray:
        """Return how many neighbours of each position, up to `order`, are known on the side `by`, without a gap."""
        reach, going = np.zeros(known.shape, np.int64), np.ones(known.shape, bool)
        for n in range(1, self.order + 1):
            moved = np.zeros_like(known)
            if n < known.shape[1]:
                inner, outer = (slice(n, None), slice(None, -n)) if by < 0 else (slice(None, -n), slice(n, None))
                moved[:, inner] = known[:, outer]
            going &= moved
            reach += going
        return reach

    def _distributions(self, found: dict, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the distribution (n, V) of each of n tokens by their contexts and the reach to both sides (n,)."""
        p = np.full((len(left), self.vocabulary), 1 / self.vocabulary)
        for n in range(2 * self.order + 1):
            wide = np.minimum(n // 2, right)  # as far to the right as it may, and further where the left has no more
            far = np.minimum(n - wide, left)
            wide = np.minimum(n - far, right)
            for size, table in self.tables.items():
                rows = np.flatnonzero((far == size[0]) & (wide == size[1]) & (far + wide == n) & (found[size] >= 0))
                if len(rows):
                    context = found[size][rows]
                    first, kinds = table.first[context], np.diff(table.first)[context]
                    ends = kinds.cumsum()
                    at = np.arange(ends[-1]) + np.repeat(first - ends + kinds, kinds)
                    counts = np.zeros((len(rows), self.vocabulary))
                    counts[np.repeat(np.arange(len(rows)), kinds), table.tokens[at]] = table.counts[at]
                    p[rows] = (counts + kinds[:, None] * p[rows]) / (counts.sum(1) + kinds)[:, None]
        return p
