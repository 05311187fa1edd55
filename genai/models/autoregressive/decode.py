"""Sampling from an autoregressive model: the prompt is read in one call, then one token at a time is drawn.

Sampler functions `(model, seeds, cond, on_step, ...) -> Batch`. `cond` may hold prompts, `tokens` int64 (B, T) padded
on the left, and with them `pad` (B,), the number of padding tokens, `lead` (B,), the number of tokens after the padding
that begin every text (such as a beginning-of-text token) and do not count as the prompt's own, and `stop` (B,), the id that
ends a sample. Everything else in it is for the model. The returned Batch holds

    tokens      int64 (B, max_new_tokens), `stop` after the end
    length      (B,) tokens before the end
    log_prob    (B, max_new_tokens) ln p of each token under the unmodified model; 0 after the end
    characters  (B,) of the text of these tokens that are before the end; only for a sampler that is given `stop`

A sample ends with the id that `cond` has for it, or where the sampler's argument `stop` says, whichever is first. The id counts
in `log_prob`; tokens of a stop string, and all after it, are replaced by the id (0 if there is none), with ln p 0.

Token i of sample b is drawn by inverse CDF from Philox stream 3, element i, of seeds[b].
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from genai.core import rng
from genai.core.cuda_graph import capture, warn_no_graph
from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Autoregressive, Batch, Capturable, Ending, OnStep, Stop, for_models

# Tokens between two checks of whether all samples have stopped. The host waits for the device at each, so they are rare.
CHECK_STOP_EVERY = 32


@for_models(Autoregressive)
def generate(
    model: Autoregressive,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int | None = None,
    cuda_graph: bool | None = None,
    *,
    stop: Stop | None = None,
) -> Batch:
    """Draw tokens from softmax(logits / temperature), truncated by `distribution`; temperature 0 takes the most likely
    token.

    Args:
        max_new_tokens: tokens to draw; None draws as many as the model's context holds.
        repetition_penalty: divides positive logits of tokens that occur in the prompt or were drawn before, and
            multiplies negative ones (Keskar et al., 2019, section 4.1).
        no_repeat_ngram: no sequence of so many tokens occurs twice in prompt and sample (Paulus et al., 2018, section 2.5), as
            long as a token is left.
        cuda_graph: replay reading and drawing a token as one CUDA graph; None does so on a GPU.
        stop: tells where a sample ends by its ids.

    Returns the Batch described above. Raises UserError for an argument out of range.
    """
    options = temperature, top_k, top_p, min_p
    check_options(*options)
    number(repetition_penalty, "sampler.repetition_penalty", 0, open_low=True)
    if no_repeat_ngram is not None:
        at_least(no_repeat_ngram, 1, "sampler.no_repeat_ngram")
    if cuda_graph not in (None, True, False):
        raise UserError(f"sampler.cuda_graph={cuda_graph} must be true, false or null")
    n = model.length if max_new_tokens is None else at_least(max_new_tokens, 1, "sampler.max_new_tokens")
    prompt = prompt_of(model, seeds, cond)
    ends = Ends(prompt.stop, stop)
    writer = _Writer(model, prompt, n, options, repetition_penalty, no_repeat_ngram)
    with torch.inference_mode(), _without_onednn(model):
        token = writer.begin(rng.uniform(seeds.to(prompt.tokens.device), (n,), stream=rng.TOKENS))
        step = _Graph(writer.step) if _uses_graph(cuda_graph, writer) else writer.step
        for i in range(n):
            if i > 0:
                token = step(token)
            if on_step is not None:
                on_step(i, n, {"tokens": writer.tokens[:, : i + 1]})
            if i % CHECK_STOP_EVERY == CHECK_STOP_EVERY - 1 and ends.all_within(writer.tokens[:, : i + 1]):
                break
    return ends.cut(writer.tokens, writer.log_probs)


def distribution(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Return the probabilities (..., V) of logits (..., V) / temperature, truncated in this order and renormalised.

    top_k keeps the k most likely (Fan et al., 2018), top_p the fewest most likely whose probabilities sum to at least
    top_p (Holtzman et al., 2020), min_p those at least min_p times as likely as the most likely one (Nguyen et al.,
    2024).
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass of more likely tokens: the first token always stays
        p = p.masked_fill(torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p), 0)
    if min_p is not None and min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True) if top_p is not None or min_p is not None else p


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Draw by inverse CDF from p (B, V): the first index whose cumulative sum reaches u (B, n) of the total -> (B,
    n)."""
    cdf = p.cumsum(-1)
    # u = 0 would pick a leading token of probability 0, and rounding leaves the sum next to 1: u is scaled by it.
    return torch.searchsorted(cdf, u.to(cdf).clamp_min(1e-8) * cdf[:, -1:])


class Prompt(NamedTuple):
    """The prompts of a batch, on the model's device."""

    tokens: Tensor
    """int64 (B, T), padded on the left."""
    lead: Tensor
    """(B or 1,) number of tokens after the padding that are not the prompt's own."""
    pad: Tensor | None
    """(B,) number of padding tokens; None for none."""
    stop: Tensor | None
    """(B,) the id that ends a sample."""
    cond: Batch | None
    """Conditions of the model."""

    def occurrences(self, vocab_size: int) -> Tensor:
        """Return which ids occur in each prompt, bool (B, vocab_size), not counting padding and leading tokens."""
        before = self.lead if self.pad is None else self.lead + self.pad
        own = torch.arange(self.tokens.shape[1], device=self.tokens.device) >= before.view(-1, 1)
        own = own.expand_as(self.tokens).long()
        return self.tokens.new_zeros(len(self.tokens), vocab_size).scatter_add_(1, self.tokens * own, own) > 0


def prompt_of(model: Autoregressive, seeds: Tensor, cond: Batch | None) -> Prompt:
    """Return the prompts in `cond`, one per seed; without `tokens` in it, each is the model's `first` token alone."""
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in (cond or {}).items() if name not in ("tokens", "lead", "pad")}
    stop = given.pop("stop", None)
    if cond is None or "tokens" not in cond:
        first = torch.full((len(seeds), 1), model.first, device=device)
        return Prompt(first, torch.ones(1, dtype=torch.int64, device=device), None, stop, given or None)
    pad, lead = cond.get("pad"), cond.get("lead", torch.zeros(1, dtype=torch.int64))
    pad = None if pad is None or not pad.any() else pad.to(device)
    return Prompt(cond["tokens"].to(device), lead.to(device), pad, stop, given or None)


class _Writer:
    """The buffers of the samples being drawn, and the step that draws a token. The position is a tensor on the device, so that
    a CUDA graph can advance it.

    Args:
        n: tokens to draw.
        options: temperature, top_k, top_p and min_p, see `distribution`.
        penalty: repetition penalty.
        ngram: tokens of a sequence that may not occur twice, None for any.
    """

    def __init__(
        self, model: Autoregressive, prompt: Prompt, n: int, options: tuple, penalty: float, ngram: int | None = None
    ):
        self.model, self.prompt, self.n, self.options, self.penalty = model, prompt, n, options, penalty
        self.texts = None if ngram is None else _Texts(prompt, n, ngram)
        # Allocated outside inference mode: autograd refuses to save inference tensors.
        self.tokens = prompt.tokens.new_zeros(len(prompt.tokens), n)
        self.log_probs = torch.zeros(self.tokens.shape, device=self.tokens.device)

    def begin(self, uniforms: Tensor) -> Tensor:
        """Read the prompts (prefill) and draw the first tokens (B, 1); token i of a sample uses `uniforms` (B, n) at i."""
        tokens = self.prompt.tokens
        self.uniforms, self.at = uniforms, torch.zeros(1, dtype=torch.int64, device=tokens.device)
        self.occurs = None if self.penalty == 1 else self.prompt.occurrences(self.model.vocab_size)
        total = tokens.shape[1] + self.n - 1  # the last token is not read
        self.state = self.model.start(self.prompt.cond, len(tokens), total, self.prompt.pad)
        return self.write(self.model.next(tokens, self.state))

    def step(self, token: Tensor) -> Tensor:
        """Read a token (B, 1) and draw the next (B, 1)."""
        return self.write(self.model.next(token, self.state))

    def write(self, logits: Tensor) -> Tensor:
        """Draw the next token (B, 1) from logits (B, V) and store it with its log-probability."""
        penalised = logits if self.occurs is None else torch.where(self.occurs, self.penalise(logits), logits)
        if self.texts is not None:
            penalised = self.texts.ban(penalised, self.at)
        if self.options[0] == 0:
            token = penalised.argmax(-1, keepdim=True)
        else:
            token = draw(distribution(penalised, *self.options), self.uniforms.index_select(1, self.at))
        self.tokens.index_copy_(1, self.at, token)
        self.log_probs.index_copy_(1, self.at, logits.log_softmax(-1).gather(1, token))
        if self.occurs is not None:
            self.occurs.scatter_(1, token, True)
        if self.texts is not None:
            self.texts.add(token, self.at)
        self.at.add_(1)
        return token

    def penalise(self, logits: Tensor) -> Tensor:
        """Apply the repetition penalty to logits (B, V)."""
        return torch.where(logits > 0, logits / self.penalty, logits * self.penalty)


class _Texts:
    """Prompts and what is written after them, as the n-grams that may not occur twice. Every step is the same work.

    Args:
        prompt: of the batch.
        n: tokens to draw.
        size: tokens of an n-gram.
    """

    def __init__(self, prompt: Prompt, n: int, size: int):
        self.start, self.size = prompt.tokens.shape[1], size
        self.tokens = torch.cat([prompt.tokens, prompt.tokens.new_zeros(len(prompt.tokens), n)], 1)
        before = prompt.lead if prompt.pad is None else prompt.lead + prompt.pad
        first = torch.arange(max(self.tokens.shape[1] - size + 1, 0), device=self.tokens.device)
        self.last, self.own = first + size - 1, first >= before.view(-1, 1)  # (M,), (B or 1, M) of the M n-grams

    def ban(self, logits: Tensor, at: Tensor) -> Tensor:
        """Return logits (B, V) of token `at`, int64 (1,), with -inf for those that would repeat an n-gram."""
        if not len(self.last):
            return logits
        end = self.start + at
        grams = self.tokens.unfold(1, self.size, 1)  # (B, M, size)
        context = end + torch.arange(1 - self.size, 0, device=at.device)
        # Where fewer tokens are written than a context has, no n-gram is complete: any index will do.
        latest = self.tokens.index_select(1, context.clamp_min(0))[:, None]  # (B, 1, size - 1)
        repeats = (grams[..., :-1] == latest).all(-1) & self.own & (self.last < end)
        ids = grams[..., -1] * repeats  # the first token of a sample need be no id of the vocabulary
        banned = torch.zeros_like(logits, dtype=torch.int64).scatter_add_(1, ids, repeats.long()) > 0
        return logits.masked_fill(banned & ~banned.all(-1, keepdim=True), float("-inf"))

    def add(self, token: Tensor, at: Tensor) -> None:
        """Append a token (B, 1), which is token `at` of each sample."""
        self.tokens.index_copy_(1, self.start + at, token)


class _Graph:
    """A step that is replayed as a CUDA graph from its second call on; the first call tunes and compiles."""

    def __init__(self, step: Callable[[Tensor], Tensor]):
        self.step, self.calls, self.graph = step, 0, None

    def __call__(self, token: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            try:
                self.graph = capture(lambda inputs: self.step(inputs["token"]), {"token": token})
            except RuntimeError as error:
                warn_no_graph(str(error).strip().splitlines()[0])
        return self.step(token) if self.graph is None else self.graph({"token": token})


def _uses_graph(asked: bool | None, writer: _Writer) -> bool:
    """Return True if steps can be captured as a CUDA graph; warn if one was asked for and they cannot."""
    if asked is False:
        return False
    if not writer.tokens.is_cuda:
        reason = f"the model is on {writer.tokens.device}"
    elif not isinstance(writer.model, Capturable) or not writer.model.fix(writer.state):
        reason = "its steps are not the same work at each position"
    else:
        return True
    if asked:
        warn_no_graph(reason)
    return False


@contextmanager
def _without_onednn(model: Autoregressive) -> Iterator[None]:
    """Return a context in which oneDNN is off for float32 models on a CPU with MKL, where only GELU would use it.

    Launching a oneDNN kernel takes 7 us, torch's own 1 us, which shows when single tokens are decoded.
    """
    weight, enabled = next(model.parameters()), torch.backends.mkldnn.enabled
    only_gelu = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available()
    torch.backends.mkldnn.enabled = enabled and not only_gelu  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def check_options(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    """Raise UserError if an argument of `distribution` is out of range; temperature may be 0."""
    number(temperature, "sampler.temperature", 0)
    if top_k is not None:
        at_least(top_k, 1, "sampler.top_k")
    if top_p is not None:
        number(top_p, "sampler.top_p", 0, 1, open_low=True)
    if min_p is not None:
        number(min_p, "sampler.min_p", 0, 1)


class Ends:
    """The ends of samples while they are written.

    Args:
        token: (B,) the id that ends a sample; None for none.
        stop: tells where a sample ends by its ids; None for anywhere.
    """

    def __init__(self, token: Tensor | None, stop: Stop | None):
        self.token, self.stop = token, stop
        self.found: list[Ending] = []

    def all_within(self, tokens: Tensor) -> bool:
        """Return True if all samples end within their tokens (B, n) so far; the host waits for the device only if any can."""
        if self.stop is None:
            return self.token is not None and bool((tokens == self.token[:, None]).any(1).all())
        rows = tokens.tolist()
        ids = [None] * len(rows) if self.token is None else self.token.tolist()
        cut = [row[: row.index(id)] if id in row else row for row, id in zip(rows, ids, strict=True)]
        # What was found stays, so that it depends neither on later tokens nor on other samples.
        self.found = [
            old if old is not None and old.over else self.stop(row)
            for row, old in zip(cut, self.found or [None] * len(rows), strict=True)
        ]
        return all(one.over or len(row) < tokens.shape[1] for one, row in zip(self.found, cut, strict=True))

    def cut(self, tokens: Tensor, logs: Tensor) -> Batch:
        """Return the Batch of new tokens (B, n) and their ln p, see `decode`."""
        if self.stop is not None:
            self.all_within(tokens)
        device, (_, n) = tokens.device, tokens.shape
        pad = torch.zeros_like(tokens[:, 0]) if self.token is None else self.token
        if self.token is None:
            after, length = torch.zeros_like(tokens, dtype=torch.bool), torch.full((len(tokens),), n, device=device)
        else:
            stopped = tokens == pad[:, None]
            after = stopped.cumsum(1) - stopped.long() > 0
            length = (~stopped & ~after).sum(1)
        batch = {"length": length}
        if self.stop is not None:
            over, kept, characters = torch.tensor(self.found, dtype=torch.int64, device=device).unbind(1)
            batch = {"length": torch.where(over > 0, kept, length), "characters": characters}
            after = after | ((torch.arange(n, device=device) >= kept[:, None]) & (over > 0)[:, None])
        return {"tokens": torch.where(after, pad[:, None], tokens), **batch, "log_prob": logs.masked_fill(after, 0)}
