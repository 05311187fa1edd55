"""Beam search: the most likely text by following several at once (Graves, 2012; Wu et al., 2016, section 7)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from genai.core.errors import at_least, number
from genai.core.protocols import Batch, OnStep, Reorderable, for_models
from genai.models.autoregressive import decode


@for_models(Reorderable)
def beam(
    model: Reorderable,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    beams: int = 4,
    length_penalty: float = 0.0,
    max_new_tokens: int | None = None,
) -> Batch:
    """Search for the text of the highest score ln p / ((5 + tokens) / 6)^length_penalty, its end counted as a token.

    Of all continuations of the `beams` best texts by one token, the `beams` best are kept; one that has ended stays as it is. The
    search stops where no open text can still win. With as many beams as there are texts it is exhaustive, with one it takes the
    most likely token each time.

    Args:
        max_new_tokens: tokens at which a text is cut; None for the model's context.

    Returns the Batch described in `decode`, with `score` (B,); the seeds change nothing. Raises UserError for an argument out of
    range.
    """
    at_least(beams, 1, "sampler.beams")
    number(length_penalty, "sampler.length_penalty", -10, 10)
    n = model.length if max_new_tokens is None else at_least(max_new_tokens, 1, "sampler.max_new_tokens")
    prompt = decode.prompt_of(model, seeds, cond)
    every = 1 if prompt.tokens.device.type == "cpu" else decode.CHECK_STOP_EVERY
    with torch.inference_mode():
        read = prompt.tokens.repeat_interleave(beams, 0)
        given = prompt.cond and {name: value.repeat_interleave(beams, 0) for name, value in prompt.cond.items()}
        pad = None if prompt.pad is None else prompt.pad.repeat_interleave(beams, 0)
        state = model.start(given, len(read), read.shape[1] + n - 1, pad)  # the last token is not read
        texts = Texts.begin(len(seeds), beams, n, prompt.stop, read.device)
        best = Texts.begin(len(seeds), 1, n, prompt.stop, read.device, float("-inf"))
        for i in range(n):
            logits = model.next(read, state)
            texts, source = texts.extended(logits.view(len(seeds), beams, -1), i, length_penalty, prompt.stop)
            final = texts.ended if i < n - 1 else torch.ones_like(texts.ended)
            best = best.better(texts, final, length_penalty)
            if on_step is not None and getattr(on_step, "counts_only", False):
                on_step(i, n, {})
            if i == n - 1 or ((i + 1) % every == 0 and not texts.can_win(best, i, n, length_penalty).any()):
                break
            first = beams * torch.arange(len(seeds), device=read.device)[:, None]
            model.reorder(state, (first + source).flatten())
            read = texts.tokens[:, :, i].reshape(-1, 1)
    found = decode.Ends(prompt.stop, None).cut(best.tokens[:, 0], best.log_probs[:, 0].float())
    if on_step is not None:  # not before, as another text may become the best
        on_step(n - 1, n, {"tokens": found["tokens"]})
    return {**found, "score": best.score(length_penalty)[:, 0].float()}


def penalty(length: Any, power: float) -> Any:
    """Return what ln p of a text of so many tokens, a number or a tensor, is divided by (Wu et al., 2016, eq. 14)."""
    return ((length + 5) / 6) ** power


class Texts(NamedTuple):
    """K texts for each of B samples, whose unwritten tokens are the id that ends them."""

    tokens: Tensor
    """int64 (B, K, n)"""
    log_probs: Tensor
    """float64 (B, K, n), ln p of each token."""
    total: Tensor
    """float64 (B, K), ln p of the text; -inf where there is none."""
    length: Tensor
    """int64 (B, K), tokens written, the end among them."""
    ended: Tensor
    """bool (B, K)"""

    @classmethod
    def begin(cls, b: int, k: int, n: int, stop: Tensor | None, device: torch.device, first: float = 0.0) -> "Texts":
        """Return one empty text with ln p `first` for each sample, and k - 1 that are none."""
        tokens = torch.zeros(b, k, n, dtype=torch.int64, device=device)
        total = torch.full((b, k), float("-inf"), dtype=torch.float64, device=device)
        total[:, 0] = first
        return cls(
            tokens if stop is None else tokens + stop[:, None, None],
            torch.zeros(b, k, n, dtype=torch.float64, device=device),
            total,
            torch.zeros(b, k, dtype=torch.int64, device=device),
            torch.zeros(b, k, dtype=torch.bool, device=device),
        )

    def score(self, power: float) -> Tensor:
        """Return the scores (B, K)."""
        return self.total / penalty(self.length.double(), power)

    def extended(self, logits: Tensor, i: int, power: float, stop: Tensor | None) -> tuple["Texts", Tensor]:
        """Return the best texts with token i, by its logits (B, K, V), and the texts that they continue, int64 (B, K)."""
        log_p = logits.double().log_softmax(-1)
        if stop is not None:  # a text that has ended goes on with its end at no cost
            end = stop[:, None, None].expand(*self.total.shape, 1)
            after = torch.full_like(log_p, float("-inf")).scatter_(2, end, 0.0)
            log_p = torch.where(self.ended[..., None], after, log_p)
        total = self.total[..., None] + log_p
        length = self.length + ~self.ended
        score = total / penalty(length.double(), power)[..., None]
        chosen = score.flatten(1).topk(total.shape[1]).indices
        source, token = chosen // log_p.shape[2], chosen % log_p.shape[2]
        rows = source[..., None].expand_as(self.tokens)
        tokens, log_probs = self.tokens.gather(1, rows), self.log_probs.gather(1, rows)
        tokens[:, :, i], log_probs[:, :, i] = token, log_p.flatten(1).gather(1, chosen)
        ended = self.ended.gather(1, source)
        if stop is not None:
            ended = ended | (token == stop[:, None])
        return Texts(tokens, log_probs, total.flatten(1).gather(1, chosen), length.gather(1, source), ended), source

    def better(self, others: "Texts", final: Tensor, power: float) -> "Texts":
        """Return the best text (B, 1, ...) among these, one for each sample, and those of others where `final` (B, K) is true."""
        score, at = others.score(power).masked_fill(~final, float("-inf")).max(1, keepdim=True)
        wins = score > self.score(power)
        found = []
        for own, theirs in zip(self, others, strict=True):
            shape = (-1, 1, *[1] * (own.ndim - 2))
            taken = theirs.gather(1, at.view(shape).expand(-1, 1, *theirs.shape[2:]))
            found.append(torch.where(wins.view(shape), taken, own))
        return Texts(*found)

    def can_win(self, best: "Texts", i: int, n: int, power: float) -> Tensor:
        """Return whether a text that has not ended after token i may still get a better score than `best`, bool (B,)."""
        most = max(penalty(i + 2, power), penalty(n, power))
        return (~self.ended & (self.total / most > best.score(power))).any(1)
