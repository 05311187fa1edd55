"""Sampling hidden tokens: a whole text in any order, or the gaps of a prompt.

Sampler functions `(model, seeds, cond, on_step, ...) -> Batch`. `cond` may hold prompts, `tokens` int64 (B, T) with hidden
tokens, padded on the left, with `pad` (B,), the amount of padding, as `encode_prompts` makes them; the first token of each is
context and no part of the sample. A prompt without hidden tokens is continued. The returned Batch holds

    tokens    int64 (B, T), samples with their prompts, padded on the right
    given     bool (B, T), which tokens the prompt gave
    length    (B,) tokens of each sample
    log_prob  (B, T) ln p of each token that was drawn, given the tokens that were known then; 0 elsewhere

Uniforms are drawn from Philox stream 3 by seed, pass and position.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genai.core import rng
from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch, OnStep, for_models
from genai.models.masked.base import MaskedModel, draw


@for_models(MaskedModel)
def ancestral(
    model: MaskedModel,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    steps: int = 64,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
) -> Batch:
    """Draw from the reverse of masked diffusion in `steps` steps of equal time (Sahoo et al., 2024, eq. 7).

    A token that is hidden at time t is revealed by time s with probability (t - s) / t, and then drawn given all that are known
    at t: each position has a uniform time of its own, at which it is revealed. More steps draw fewer at once.

    Args:
        steps: calls of the network at most; those in which no token is revealed are left out.
        temperature: divides the logits.
        max_new_tokens: tokens after a prompt without hidden ones; None for as many as the model's windows have.

    Returns the Batch described above. Raises UserError for an argument out of range.
    """
    at_least(steps, 1, "sampler.steps")
    number(temperature, "sampler.temperature", 0)
    canvas = canvas_of(model, seeds, cond, max_new_tokens)
    times = rng.uniform(canvas.seeds, canvas.tokens.shape[1:], stream=rng.TOKENS)
    # Step i goes from time 1 - i / steps to 1 - (i + 1) / steps; where times are equal to a bound does not matter.
    due = ((1 - times) * steps).long().clamp_max(steps - 1).where(canvas.hidden, steps)
    busy = {*due.unique().tolist()}
    canvas, due = canvas.of(model), due.to(next(model.parameters()).device)
    with torch.inference_mode():
        for i in range(steps):
            if i in busy:
                canvas.reveal(model, due == i, temperature, row=0)
            if on_step is not None:
                on_step(i, steps, canvas.batch())
    return canvas.batch()


@for_models(MaskedModel)
def fill(
    model: MaskedModel,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    steps: int | None = None,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
) -> Batch:
    """Reveal the tokens of which the model is most certain, then predict again (Chang et al., "MaskGIT", 2022, section 3.2).

    Args:
        steps: calls of the network, in each of which as many tokens are revealed; None reveals one at a time.
        temperature: divides the logits; 0 takes the most probable token.
        max_new_tokens: as for `ancestral`.

    Returns the Batch described above. Raises UserError for an argument out of range.
    """
    if steps is not None:
        at_least(steps, 1, "sampler.steps")
    number(temperature, "sampler.temperature", 0)
    canvas = canvas_of(model, seeds, cond, max_new_tokens)
    n = max(int(canvas.hidden.sum(1).max()), 1) if steps is None else steps
    canvas = canvas.of(model)
    with torch.inference_mode():
        for i in range(n):
            left = canvas.hidden.sum(1)
            canvas.reveal(model, canvas.hidden, temperature, row=i, most=-(-left // (n - i)))
            if on_step is not None:
                on_step(i, n, canvas.batch())
    return canvas.batch()


class Canvas(NamedTuple):
    """Texts with hidden tokens, which are revealed in place."""

    seeds: Tensor
    """int64 (B,)"""
    tokens: Tensor
    """int64 (B, T), padded on the right; the first is context."""
    given: Tensor
    """bool (B, T), which tokens a prompt gave."""
    hidden: Tensor
    """bool (B, T), which are still hidden."""
    lengths: Tensor
    """int64 (B,)"""
    log_prob: Tensor
    """(B, T)"""

    def of(self, model: MaskedModel) -> "Canvas":
        """Return the canvas on the model's device."""
        device = next(model.parameters()).device
        return Canvas(*(part.to(device) for part in self))

    def reveal(self, model: MaskedModel, now: Tensor, temperature: float, row: int, most: Tensor | None = None) -> None:
        """Draw the hidden tokens of `now`, bool (B, T), or of those the `most` (B,) likely ones, by uniforms of a row."""
        logits = model.predict(self.tokens, padded=True)
        u = rng.uniform(self.seeds, self.tokens.shape[1:], row=row + 1, stream=rng.TOKENS)  # row 0 has times
        drawn = draw(logits, temperature, u)
        found = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        if most is not None:
            order = found.masked_fill(~now, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
            now = now & (order < most[:, None])
        self.tokens.copy_(torch.where(now, drawn, self.tokens))
        self.log_prob.copy_(torch.where(now, found, self.log_prob))
        self.hidden.logical_and_(~now)

    def batch(self) -> Batch:
        """Return copies of the samples without the context in front."""
        parts = {"tokens": self.tokens, "given": self.given, "log_prob": self.log_prob}
        return {**{name: part[:, 1:].clone() for name, part in parts.items()}, "length": self.lengths - 1}


def canvas_of(model: MaskedModel, seeds: Tensor, cond: Batch | None, max_new_tokens: int | None) -> Canvas:
    """Return the prompts of `cond`, token 0 without any, with room to fill, on the CPU.

    Raises UserError for a prompt that is too long.
    """
    most = model.length + 1
    if max_new_tokens is not None:
        at_least(max_new_tokens, 1, "sampler.max_new_tokens")
    if cond is None or "tokens" not in cond:
        rows, width = [torch.zeros(1, dtype=torch.int64)] * len(seeds), 1
    else:
        tokens, pad = cond["tokens"].cpu(), cond["pad"].tolist()
        rows, width = [row[n:] for row, n in zip(tokens, pad, strict=True)], tokens.shape[1]
    if not any((row == model.mask).any() for row in rows):
        # As wide for every batch of a call, whatever its prompts.
        width = most if max_new_tokens is None else width + max_new_tokens
        rows = [
            torch.cat([row, row.new_full((most - len(row) if max_new_tokens is None else max_new_tokens,), model.mask)])
            for row in rows
            if len(row) < most
        ]
    if width > most or len(rows) < len(seeds):
        raise UserError(
            f"prompt and sampler.max_new_tokens must fit into the {model.length} tokens that this model reads at once: "
            "shorten them"
        )
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence(rows, batch_first=True, padding_value=model.pad)
    tokens = torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=model.pad)
    hidden = tokens == model.mask
    given = ~hidden & (tokens != model.pad)
    return Canvas(seeds, tokens, given, hidden, lengths, torch.zeros(tokens.shape))
