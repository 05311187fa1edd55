"""Speculative decoding: a small draft model proposes tokens, one call of the model verifies them (Leviathan et al.,
2023)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, OnStep, Rewindable, Stop, for_models
from genai.models.autoregressive.decode import Ends, check_options, distribution, draw, prompt_of


@for_models(Rewindable, draft=Rewindable)
def speculative(
    model: Rewindable,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    draft: Rewindable | None = None,
    ahead: int = 4,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    *,
    stop: Stop | None = None,
) -> Batch:
    """Draw from `generate`'s distribution in fewer calls of the model (Leviathan et al., 2023, algorithm 1).

    A small `draft` proposes `ahead` tokens and one call of the model verifies them. Samples are drawn one by one, since
    each accepts a different number of tokens. The uniforms of token i come from Philox stream 3, rows 1 (proposal), 2
    (verification) and 3 (correction), element i. Past the context each position attends to the last `length` of its own
    model, as in `generate`.

    Returns the Batch described in `decode`. Raises UserError for a draft that cannot rewind or has another vocabulary,
    and for a text longer than either model can read.
    """
    options = temperature, top_k, top_p, min_p
    check_options(*options)
    at_least(ahead, 1, "sampler.ahead")
    if temperature == 0:
        raise UserError(
            "sampler.temperature=0 must be above 0 for speculative decoding: set it, or use sampler=generate"
        )
    if draft is None or isinstance(draft, str):
        raise UserError(
            f"sampler.draft={draft} must be the run or checkpoint of a smaller model, named in a call of sample.py"
        )
    for part in (model, draft):
        if not isinstance(part, Rewindable):
            raise UserError(f"a {type(part).__name__} cannot rewind the tokens it has read: use sampler=generate")
    if draft.vocab_size != model.vocab_size:
        raise UserError(
            f"sampler.draft has {draft.vocab_size} tokens, this model {model.vocab_size}: they must share one tokenizer"
        )
    tokens, _, pad, end, cond = prompt_of(model, seeds, cond)
    length = min(model.length, draft.length)
    room = length - tokens.shape[1] + 1  # the last token is not read
    most = room if room > 0 else length  # none is left after a longer prompt: as many as the context holds
    n = most if max_new_tokens is None else at_least(max_new_tokens, 1, "sampler.max_new_tokens")
    written, log_probs = tokens.new_zeros(len(tokens), n), torch.zeros(len(tokens), n, device=tokens.device)
    with torch.inference_mode():
        uniforms = [rng.uniform(seeds.to(tokens.device), (n,), row, rng.TOKENS) for row in (1, 2, 3)]
        ends, starts = (None if t is None else t.cpu().tolist() for t in (end, pad))
        for b in range(len(tokens)):
            own = None if cond is None else {name: value[b : b + 1] for name, value in cond.items()}
            target, drafter = (_Reader(m, own, tokens.shape[1] + n - 1) for m in (model, draft))
            prompt = tokens[b : b + 1, 0 if starts is None else starts[b] :]
            until = None if ends is None else ends[b], stop
            parts = _speculate(target, drafter, prompt, n, ahead, [u[b : b + 1] for u in uniforms], options, *until)
            for whole, part in zip((written, log_probs), parts, strict=True):
                whole[b].copy_(part)
            if on_step is not None:
                on_step(b, len(tokens), {"tokens": written[b : b + 1]})
    return Ends(end, stop).cut(written, log_probs)


class _Reader:
    """A model and the number of tokens it has read of one text of at most `total`."""

    def __init__(self, model: Rewindable, cond: Batch | None, total: int):
        self.model, self.state, self.read = model, model.start(cond, 1, total, rewinds=True), 0

    def next(self, text: Tensor) -> Tensor:
        """Return logits (1, V) of the token after a text (1, T) that continues what was read."""
        return self.model.next(self._rest_of(text), self.state)

    def scores(self, text: Tensor) -> Tensor:
        """Return logits (1, T', V) of the token after each token that was not read before."""
        return self.model.scores(self._rest_of(text), self.state)

    def forget_after(self, n: int) -> None:
        """Forget what was read after the first n tokens."""
        if self.read > n:
            self.model.rewind(self.state, self.read - n)
            self.read = n

    def _rest_of(self, text: Tensor) -> Tensor:
        new, self.read = text[:, self.read :], text.shape[1]
        return new


def _speculate(
    model: _Reader,
    draft: _Reader,
    prompt: Tensor,
    n: int,
    ahead: int,
    uniforms: list[Tensor],
    options: tuple,
    end: int | None,
    stop: Stop | None,
) -> tuple[Tensor, Tensor]:
    """Return n new tokens (n,) of one prompt (1, T), and their ln p under the model (n,)."""
    prompt_length, text = prompt.shape[1], prompt
    log_probs: list[Tensor] = []
    ids: list[int] = []
    while (at := text.shape[1] - prompt_length) < n:
        g = min(ahead, n - at - 1)
        qs, drafted = [], text
        for j in range(g):
            qs.append(distribution(draft.next(drafted), *options))
            drafted = torch.cat([drafted, draw(qs[-1], uniforms[0][:, at + j : at + j + 1])], 1)
        raw = model.scores(drafted)[:, -g - 1 :]  # (1, g + 1, V): at each proposal, and after the last one
        p = distribution(raw, *options)
        q = torch.stack(qs, 1) if qs else p[:, :0]
        kept, token = verify(p, q, drafted[:, prompt_length + at :], *(u[:, at : at + g + 1] for u in uniforms[1:]))
        # The only time in a round that the host waits for the device: one copy brings all numbers that it needs.
        keep, *read = torch.cat([kept, drafted[0, prompt_length + at :], token[0]]).cpu().tolist()
        text = torch.cat([drafted[:, : prompt_length + at + keep], token], 1)
        fresh = text[0, prompt_length + at :]
        log_probs.append(raw[0, : len(fresh)].log_softmax(-1).gather(1, fresh[:, None])[:, 0])
        for reader in (model, draft):
            reader.forget_after(text.shape[1] - 1)
        ids += [*read[:keep], read[-1]]
        if end in ids or (stop is not None and stop(ids).over):
            break
    tokens, log_prob = text[0, prompt_length:], torch.cat(log_probs)
    missing = n - len(tokens)
    return torch.cat([tokens, tokens.new_zeros(missing)]), torch.cat([log_prob, log_prob.new_zeros(missing)])


def verify(p: Tensor, q: Tensor, drafted: Tensor, accept: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many (B,) of the g drafted tokens (B, g) are accepted, and the token (B, 1) after them.

    Token j is accepted with probability min(1, p_j / q_j). The first rejected one is drawn again from max(p - q, 0); if
    all are accepted, one more is drawn from p itself, as if q were 0 there. p (B, g + 1, V), q (B, g, V), uniforms (B,
    g + 1).
    """
    g, at = drafted.shape[1], drafted[..., None]
    # u q >= p rejects with probability 1 - p / q, without dividing by a q that may be 0.
    refused = accept[:, :g] * q.gather(2, at)[..., 0] >= p[:, :g].gather(2, at)[..., 0]
    kept = torch.cat([refused, refused.new_ones(len(refused), 1)], 1).long().argmax(1)
    rows = torch.arange(len(kept), device=kept.device)
    rest = (p - F.pad(q, (0, 0, 0, 1))).clamp_min(0)[rows, kept]
    return kept, draw(rest, correct[rows, kept, None])
