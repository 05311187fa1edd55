"""Writing with an autoregressive model: a cache filled once with the prompt, then one token after the other.

Sampler functions `(model, seeds, cond, on_step, ...) -> Batch`. `cond` holds tokens int64 (B, T), prompts padded on
the left, and may hold `pad` (B,), how much, `lead` (B,), how many tokens after the padding only begin a text and are none of
the prompt's, and `stop` (B,), the id that ends a sample. The Batch holds

    tokens    int64 (B, max_new_tokens), `stop` after the end
    length    (B,) tokens before the end
    log_prob  (B, max_new_tokens) ln p of each token by the model itself, whatever shaped the draw; 0 after the end

Token i of sample b is drawn by inverse CDF from Philox stream 3, element i, of seeds[b].
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from genai.core import rng
from genai.core.cuda_graph import capture, say
from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch, OnStep, for_models
from genai.models.autoregressive.gpt import GPT
from genai.nn.transformer import Cache

LOOK_EVERY = 32  # tokens between two questions to the device whether all have stopped


@for_models(GPT)
def generate(
    model: GPT,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    cuda_graph: bool | None = None,
) -> Batch:
    """Draw from softmax(logits / temperature), cut as `distribution` says; temperature 0 takes the likeliest.

    Args:
        max_new_tokens: None: as many as the model's context is long.
        repetition_penalty: divides positive logits of tokens that occur in the prompt or were written (Keskar et al., 2019,
            section 4.1), and multiplies negative ones, which dividing would favour.
        cuda_graph: replay reading and drawing a token as one CUDA graph; None does on a GPU.

    A prompt longer than the context is read as what is written past it is, see `_Reader`. Raises UserError for an argument out
    of range.
    """
    check(temperature, top_k, top_p, min_p)
    number(repetition_penalty, "sampler.repetition_penalty", 0, open_low=True)
    if cuda_graph not in (None, True, False):
        raise UserError(f"sampler.cuda_graph={cuda_graph} must be true, false or null")
    n = model.length if max_new_tokens is None else at_least(max_new_tokens, 1, "sampler.max_new_tokens")
    tokens, pad, stop = begin(model, seeds, cond)
    given = tokens.shape[1]
    text = torch.cat([tokens, tokens.new_zeros(len(tokens), n)], 1)
    logs = torch.zeros(len(tokens), n, device=text.device)  # made here, for what inference mode makes autograd refuses
    with torch.inference_mode(), _small_kernels(model.net.head.weight):
        u = rng.uniform(seeds.to(text.device), (n,), stream=rng.TOKENS)
        seen = None if repetition_penalty == 1 else _seen(tokens, pad, cond, model.vocab_size)
        at = torch.zeros(1, dtype=torch.int64, device=text.device)  # which new token, where a graph can see it
        reader = _Reader(model, text, given, pad)

        def write(logits: Tensor) -> Tensor:
            """Draw the next token (B, 1) and note it."""
            shaped = logits if seen is None else torch.where(seen, _penalised(logits, repetition_penalty), logits)
            if temperature == 0:
                token = shaped.argmax(-1, keepdim=True)
            else:
                token = draw(distribution(shaped, temperature, top_k, top_p, min_p), u.index_select(1, at))
            text.index_copy_(1, at + given, token)
            logs.index_copy_(1, at, logits.log_softmax(-1).gather(1, token))
            if seen is not None:
                seen.scatter_(1, token, True)
            at.add_(1)
            return token

        def step(token: Tensor) -> Tensor:
            return write(reader.next(token))

        token = write(reader.first())
        advance = _graph_of(step, reader) if _graphed(cuda_graph, reader) else step
        for i in range(n):
            if i > 0:
                token = advance(token)
            written = text[:, given : given + i + 1]
            if on_step is not None:
                on_step(i, n, {"tokens": written})
            if stop is not None and i % LOOK_EVERY == LOOK_EVERY - 1 and (written == stop[:, None]).any(1).all():
                break
    return finished(text[:, given:], logs, stop)


def distribution(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Probabilities (..., V) of logits / temperature, cut and renormalised in this order.

    top_k keeps the k likeliest (Fan et al., 2018), top_p the fewest likeliest whose probabilities sum to at least
    top_p (Holtzman et al., 2020), min_p those at least min_p times as likely as the likeliest (Nguyen et al., 2024).
    """
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], float("-inf"))
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        p = p.masked_fill(torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p), 0)
    if min_p is not None and min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True) if top_p is not None or min_p is not None else p


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: the first index at which the sum of p (B, V) reaches u (B, n) in [0, 1] of the whole -> (B, n)."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, u.to(cdf).clamp_min(1e-8) * cdf[:, -1:])  # never one of probability 0


class _Reader:
    """Logits (B, V) of the next token, with the cheapest memory that is exact.

    Within the context a cache holds it all. Past it, be it in the prompt, each position sees the last `length`: positions that
    only know distances go on with a ring of these; learned ones have none to go on with, so the last `length` tokens are read
    anew each time.
    """

    def __init__(self, model: GPT, text: Tensor, given: int, pad: Tensor | None):
        self.model, self.text, self.at, self.pad = model, text, given, pad
        total, length = text.shape[1] - 1, model.length  # the last token is not read
        self.anew = total > length and model.net.transformer.positions is not None
        if total > length:
            how = "reading it anew for each token" if self.anew else "by a sliding cache"
            sentence = f"past the {length} tokens the model was trained on, each new one sees the last {length}, {how}"
            print(sentence, file=sys.stderr)
        window = min(total, length)
        kept, most = (window, window) if self.anew else (max(window, given), total)
        self.cache = Cache(model.net.transformer, len(text), kept, most, pad, window)

    def first(self) -> Tensor:
        if self.anew and self.at > self.model.length:
            return self._last()
        for part in self.text[:, : self.at].split(self.model.length, 1):
            logits = self.model.net(part, self.cache)[:, -1].float()
        if self.at > self.model.length:
            self.cache.slide()
        return logits

    def next(self, token: Tensor) -> Tensor:
        self.at += 1
        if self.anew and self.at > self.model.length:
            return self._last()
        return self.model.net(token, self.cache)[:, -1].float()

    def _last(self) -> Tensor:
        """Of the last `length` tokens alone."""
        first = self.at - self.model.length
        pad = None if self.pad is None else (self.pad - first).clamp_min(0)
        cache = Cache(self.model.net.transformer, len(self.text), self.model.length, self.model.length, pad)
        return self.model.net(self.text[:, first : self.at], cache)[:, -1].float()


def _graphed(cuda_graph: bool | None, reader: _Reader) -> bool:
    on_gpu = reader.text.is_cuda
    if cuda_graph and not on_gpu:
        say(f"the model is on {reader.text.device}")
    elif cuda_graph and reader.anew:
        say("the text is read anew for each token")
    return cuda_graph is not False and on_gpu and not reader.anew


def _graph_of(step: Callable[[Tensor], Tensor], reader: _Reader) -> Callable[[Tensor], Tensor]:
    """`step` as a graph from its second call on; the first warms up what is chosen at first use."""
    reader.cache.fix()
    calls, graph = 0, None

    def stepped(token: Tensor) -> Tensor:
        nonlocal calls, graph
        calls += 1
        if calls == 2:
            try:
                graph = capture(lambda inputs: step(inputs["token"]), {"token": token})
            except RuntimeError as error:
                say(str(error).strip().splitlines()[0])
        return step(token) if graph is None else graph({"token": token})

    return stepped


@contextmanager
def _small_kernels(weight: Tensor) -> Iterator[None]:
    """Without oneDNN where nothing but GELU asks for it: it takes 7 us to begin one, torch's own kernel 1."""
    was = torch.backends.mkldnn.enabled
    alone = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available()
    torch.backends.mkldnn.enabled = was and not alone  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was


def check(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    number(temperature, "sampler.temperature", 0)
    if top_k is not None:
        at_least(top_k, 1, "sampler.top_k")
    if top_p is not None:
        number(top_p, "sampler.top_p", 0, 1, open_low=True)
    if min_p is not None:
        number(min_p, "sampler.min_p", 0, 1)


def begin(model: GPT, seeds: Tensor, cond: Batch | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Prompts, padding (None where there is none) and stop ids on the model's device; token 0 if nothing is given."""
    device = next(model.parameters()).device
    if cond is None:
        return torch.zeros(len(seeds), 1, dtype=torch.int64, device=device), None, None
    tokens, pad, stop = cond["tokens"], cond.get("pad"), cond.get("stop")
    pad = None if pad is None or not pad.any() else pad.to(device)
    return tokens.to(device), pad, None if stop is None else stop.to(device)


def _seen(tokens: Tensor, pad: Tensor | None, cond: Batch | None, vocab_size: int) -> Tensor:
    """Which ids occur in each prompt (B, V), of which padding and what begins a text, such as token 0 alone, are no part."""
    lead = torch.tensor(1) if cond is None else cond.get("lead", torch.tensor(0))
    before = lead.to(tokens.device) + (0 if pad is None else pad)
    real = torch.arange(tokens.shape[1], device=tokens.device) >= before.view(-1, 1)
    return tokens.new_zeros(len(tokens), vocab_size).scatter_add_(1, tokens, real.expand_as(tokens).long()) > 0


def _penalised(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def finished(tokens: Tensor, logs: Tensor, stop: Tensor | None) -> Batch:
    """Everything after the first stop is stop, with ln p 0."""
    n = tokens.shape[1]
    if stop is None:
        return {"tokens": tokens, "length": torch.full((len(tokens),), n, device=tokens.device), "log_prob": logs}
    stopped = tokens == stop[:, None]
    after = stopped.cumsum(1) - stopped.long() > 0
    length = (~stopped & ~after).sum(1)
    return {
        "tokens": torch.where(after, stop[:, None], tokens),
        "length": length,
        "log_prob": logs.masked_fill(after, 0),
    }
