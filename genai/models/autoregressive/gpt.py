"""GPT: a decoder-only Transformer over token ids (Radford et al., 2019)."""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Batch, Losses
from genai.models.autoregressive.likelihood import mean_loss, nats_of
from genai.nn.cache import Cache
from genai.nn.token_transformer import TokenTransformer
from genai.nn.transformer import Transformer


class Window:
    """The decoding state of a GPT with learned positions for a text longer than its context.

    Up to `length` tokens it is a cache; after that the last `length` tokens are encoded again for each new token.
    """

    def __init__(self, net: Transformer, batch: int, length: int, pad: Tensor | None):
        self.net, self.length, self.pad, self.read = net, length, pad, 0
        self.cache = Cache(net, batch, length, length, pad)

    def take(self, tokens: Tensor) -> tuple[Tensor, Cache]:
        """Return the tokens and the cache to call the network with, given new tokens (B, T)."""
        text = torch.cat([self.text, tokens], 1) if self.read else tokens
        self.text, self.read = text[:, -self.length :], self.read + tokens.shape[1]
        first = self.read - self.length
        if first <= 0:
            return tokens, self.cache
        pad = None if self.pad is None else (self.pad - first).clamp_min(0)
        return self.text, Cache(self.net, len(tokens), self.length, self.length, pad)

    def reorder(self, index: Tensor) -> None:
        """Let row i continue row index[i], int64 (B,)."""
        self.text = self.text[index]
        self.cache.reorder(index)


class GPT(nn.Module):
    """A model of the next token, trained by maximum likelihood; it decodes with a key-value cache.

    Texts may be longer than the context: each position then attends to the last `length`. With relative positions a
    ring buffer does that; with learned ones the whole window is encoded again for each token, see `Window`.

    Args:
        field: field of the data; must be `tokens`.
        vocab_size: number of token ids.
        length: context in tokens, as trained.
        net: maps tokens and an optional cache to logits, such as TokenTransformer.

    Raises UserError for another field, or a context longer than the network's positions.
    """

    field = "tokens"
    bound = "exact"
    """The kind of likelihood that `log_prob` returns: ln p itself, not a bound."""
    first = 0
    """The id that stands in for an empty prompt."""

    def __init__(self, field: str, vocab_size: int, length: int, net: TokenTransformer):
        super().__init__()
        if field != self.field:
            raise UserError(f"a GPT takes {self.field}, but this data has {field}: choose a text data set with data=")
        positions = net.transformer.positions
        if positions is not None and length > positions:
            raise UserError(f"data.shape=[{length}] is longer than the {positions} positions of model.net")
        self.vocab_size, self.length, self.net = vocab_size, length, net

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"net": self.net}

    def nats(self, batch: Batch) -> Tensor:
        """Return -ln p of each token of batch[tokens] (B, T) given those before it, 0 where `mask` is false: (B, T -
        1). Where the batch has `document` (B, T), given those of the same document."""
        documents = batch["document"][:, :-1] if "document" in batch else None
        logits = self.net(batch[self.field][:, :-1], documents=documents)
        return nats_of(logits, {name: value for name, value in batch.items() if name != "document"})

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of `nats` over all targets, 0 if there are none; the weight is their number."""
        return mean_loss(self.nats(batch), batch)

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p(tokens after the first | first) in nats, (B,), over `mask`; exact, so the seed is not used."""
        return -self.nats(batch).sum(1)

    def start(
        self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None, rewinds: bool = False
    ) -> Cache | Window:
        """Return an empty cache for `batch` texts of `total` tokens, see `Rewindable.start`."""
        net, window = self.net.transformer, min(total, self.length)
        encodes_again = total > self.length and net.positions is not None
        if encodes_again and rewinds:
            raise UserError(
                f"prompt and sampler.max_new_tokens must fit into the {self.length} learned positions of a model: shorten "
                "them, or use sampler=generate"
            )
        if rewinds:
            return Cache(net, batch, total, total, pad, self.length)
        if total > self.length:
            how = "encoded again for each token" if encodes_again else "kept in a sliding cache"
            sentence = (
                f"past the {window} tokens of the model's context each new token attends to the last {window}, {how}"
            )
            print(sentence, file=sys.stderr)
        if encodes_again:
            return Window(net, batch, window, pad)
        return Cache(net, batch, window, total, pad)

    def next(self, tokens: Tensor, state: Cache | Window) -> Tensor:
        """Read tokens int64 (B, T) and return logits float32 (B, vocab_size) of the token after them."""
        if isinstance(state, Window):
            tokens, state = state.take(tokens)
        if tokens.shape[1] <= state.capacity:
            return self.net(tokens, state)[:, -1].float()
        state.reserve(tokens.shape[1])
        # A prompt longer than the context is read in pieces, so that each position sees the `length` before it.
        for part in tokens.split(self.length, 1):
            logits = self.net(part, state)[:, -1].float()
        state.slide()
        return logits

    def scores(self, tokens: Tensor, state: Cache) -> Tensor:
        """Read tokens int64 (B, T) and return logits float32 (B, T, vocab_size) of the token after each."""
        return self.net(tokens, state).float()

    def rewind(self, state: Cache, n: int) -> None:
        """Forget the n tokens read last."""
        state.rewind(n)

    def reorder(self, state: Cache | Window, index: Tensor) -> None:
        """Let row i of a state continue row index[i], int64 (B,)."""
        state.reorder(index)

    def fix(self, state: Cache | Window) -> bool:
        """Make every later step the same work, for a CUDA graph; returns False if the state cannot be fixed."""
        if isinstance(state, Window):
            return False
        state.fix()
        return True
