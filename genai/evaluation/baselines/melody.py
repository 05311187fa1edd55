"""Baselines of melodies: counts of events given the last onsets and the beat, and the keys of a step given those before."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genai.core.errors import UserError, at_least, number
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


class Logistic(Baseline):
    """A logistic regression of whether each key sounds at a step on the keys that sound at the step before.

    Its likelihood is of the keys alone, and so is at most as hard as that of the events of voices, which also say who sounds them
    and what is struck again: a model of events that is better than this is better at more.

    Args:
        voices: of a melody.
        penalty: of half the squared weights, for each training step.
    """

    field, needs = "tokens", ("bar",)

    def __init__(self, voices: int = 4, penalty: float = 1e-5):
        self.voices, self.penalty = at_least(voices, 1, "baseline.voices"), number(penalty, "baseline.penalty", 0)
        self.what = "logistic regression of each key on the keys before"

    def fit(self, data: TrainingData, seed: int) -> "Logistic":
        tokens = data.x.shape[1] - 1
        if tokens % self.voices:
            raise UserError(
                f"baseline.voices={self.voices}, but windows have {tokens} tokens: give the voices of the data"
            )
        self.keys = (data.levels or 2) - 2
        before, now, real = self.frames(data.x, torch.from_numpy(targets(data)))
        before, now = before[real], now[real]
        self.weight = torch.zeros(self.keys + 1, self.keys, requires_grad=True)  # the last row is the bias
        descent = torch.optim.LBFGS([self.weight], max_iter=60, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            descent.zero_grad()
            nats = F.binary_cross_entropy_with_logits(self.logits(before), now, reduction="sum") / len(now)
            total = nats + self.penalty / 2 * self.weight.square().sum()
            total.backward()
            return total

        descent.step(loss)  # type: ignore[arg-type]
        self.weight = self.weight.detach()
        return self

    def frames(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which keys sound before and at each step, float32 (N, S, keys), and which steps are targets, bool (N, S)."""
        n, steps = len(tokens), (tokens.shape[1] - 1) // self.voices
        events = tokens[:, 1:].view(n, steps, self.voices)
        last = torch.where(events > 0, torch.arange(steps)[:, None], -1).cummax(1).values
        held = events.gather(1, last.clamp_min(0)).where(last >= 0, 1)  # ids of what sounds: 1 is silence
        frames = F.one_hot((held - 1).clamp_min(0), self.keys + 1)[..., 1:].amax(2).float()
        before = F.pad(frames, (0, 0, 1, 0))[:, :-1]
        return before, frames, mask[:, 1:].view(n, steps, self.voices).all(2)

    def logits(self, frames: Tensor) -> Tensor:
        """Return logits (..., keys) of the keys of the next step."""
        return frames @ self.weight[:-1] + self.weight[-1]

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p (B,) in nats of the keys at each step, given those before it, over `mask`."""
        tokens = batch["tokens"]
        before, now, real = self.frames(tokens, batch.get("mask", torch.ones_like(tokens, dtype=torch.bool)))
        nats = F.binary_cross_entropy_with_logits(self.logits(before), now, reduction="none").sum(2)
        return -(nats * real).double().sum(1)
