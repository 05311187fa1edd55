"""Sequence to sequence: an encoder reads the source, a decoder with attention to it writes the target (Vaswani et al., 2017)."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, number
from genai.core.protocols import Batch, Losses
from genai.models.autoregressive.likelihood import mean_loss, nats_of
from genai.nn.attention import Context, ContextKeyValues
from genai.nn.cache import Cache
from genai.nn.transformer import Transformer


class EncoderDecoder(nn.Module):
    """Two Transformers with their embeddings and an output head.

    Args:
        source_vocab_size: number of ids of sources.
        vocab_size: number of ids of targets.
        encoder: a Transformer that is not causal.
        decoder: a causal Transformer with cross-attention to the encoder's states.
        tied: share one matrix between the decoder's embedding and the head (Press and Wolf, 2017).
        shared: share the embedding between encoder and decoder, whose vocabularies must then be one; with `tied` all three
            matrices are one (Vaswani et al., 2017, section 3.4).
        init: `init(net)` sets the weights; None keeps torch's.

    Raises UserError for data without sources, and for vocabularies or Transformers that do not fit each other.
    """

    def __init__(
        self,
        source_vocab_size: int,
        vocab_size: int,
        encoder: Transformer,
        decoder: Transformer,
        tied: bool,
        shared: bool,
        init: Callable[[nn.Module], None] | None = None,
    ):
        super().__init__()
        if source_vocab_size is None or vocab_size is None:
            raise UserError(
                "a Seq2Seq takes pairs of texts, but this data has none (data.source_levels): choose them with data="
            )
        if encoder.causal or not decoder.causal or encoder.crosses or not decoder.crosses:
            raise UserError(
                "the encoder of a Seq2Seq must have attention.causal=false and no cross, its decoder causal attention and "
                "cross: set them in model.net.encoder and model.net.decoder"
            )
        if shared and (source_vocab_size != vocab_size or encoder.width != decoder.width):
            raise UserError(
                f"model.net.shared=true needs one vocabulary and one width, but sources have {source_vocab_size} ids and "
                f"targets {vocab_size}, and the widths are {encoder.width} and {decoder.width}: set it to false"
            )
        self.source_embed = nn.Embedding(source_vocab_size, encoder.width)
        self.embed = nn.Embedding(vocab_size, decoder.width)
        self.encoder, self.decoder = encoder, decoder
        self.head = nn.Linear(decoder.width, vocab_size, bias=False)
        self.tied = tied
        if init is not None:
            init(self)
        if tied:
            self.head.weight = self.embed.weight
        if shared:
            self.source_embed.weight = self.embed.weight

    def encode(self, source: Tensor) -> Context:
        """Encode sources int64 (B, S), padded at the end with negative ids, each with at least one id."""
        real = source >= 0
        return Context(self.encoder(self.source_embed(source.clamp_min(0)), mask=real[:, None, None]), real)

    def forward(
        self, tokens: Tensor, context: Context | Sequence[ContextKeyValues], cache: Cache | None = None
    ) -> Tensor:
        """Return logits (B, T, vocab_size) of the token after each of `tokens` int64 (B, T), which follow those in the cache."""
        return self.head(self.decoder(self.embed(tokens), cache, context=context))


class State(NamedTuple):
    """The decoding state: the decoder's cache, and what its blocks attend to, computed once."""

    cache: Cache
    context: list[ContextKeyValues]


class Seq2Seq(nn.Module):
    """A model of a target given a source, trained by maximum likelihood with label smoothing.

    A batch has `tokens` int64 (B, 1 + T), which begin with the end of document, their `mask`, and `source` int64 (B, S), padded
    at the end with negative ids.

    Args:
        field: field of the data; must be `tokens`.
        vocab_size: number of ids of targets, of which the last is the end.
        length: tokens of the longest target, its end included.
        net: encoder and decoder.
        label_smoothing: of the training loss; the validation loss is the likelihood.

    Raises UserError for another field, or targets longer than the decoder's positions.
    """

    field = "tokens"
    bound = "exact"
    """The kind of likelihood that `log_prob` returns: ln p itself, not a bound."""

    def __init__(self, field: str, vocab_size: int, length: int, net: EncoderDecoder, label_smoothing: float = 0.1):
        super().__init__()
        if field != self.field:
            raise UserError(f"a Seq2Seq takes pairs of texts, but this data has {field}: choose them with data=")
        number(label_smoothing, "model.label_smoothing", 0, 1)
        positions = net.decoder.positions
        if positions is not None and length > positions:
            raise UserError(f"data.shape=[{length}] is longer than the {positions} positions of model.net.decoder")
        self.vocab_size, self.length, self.net, self.label_smoothing = vocab_size, length, net, label_smoothing
        self.first = vocab_size - 1

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"encoder": self.net.encoder, "decoder": self.net.decoder}

    def null(self) -> Batch:
        """Return the empty source (1,): its end alone."""
        end = self.net.source_embed.num_embeddings - 1
        return {"source": torch.full((1,), end, device=self.net.source_embed.weight.device)}

    def source_of(self, batch: Batch | None, n: int) -> Tensor:
        """Return the sources (n, S) of a batch; without any they are empty."""
        given = None if batch is None else batch.get("source")
        return self.null()["source"].expand(n, -1) if given is None else given

    def nats(self, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """Return -ln p (B, T) of each token after the first, given those before it and the source, 0 where `mask` is false."""
        tokens = batch[self.field]
        context = self.net.encode(self.source_of(batch, len(tokens)))
        return nats_of(self.net(tokens[:, :-1], context), batch, smoothing)

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of `nats` over all targets, 0 if there are none; in training with label smoothing."""
        return mean_loss(self.nats(batch, self.label_smoothing if self.training else 0.0), batch)

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p(target | source) in nats, (B,), over `mask`; exact, so the seed is not used."""
        return -self.nats(batch).sum(1)

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> State:
        """Return the state of `batch` targets before their first token; sources are encoded here, see `Autoregressive.start`."""
        context = self.net.decoder.project(self.net.encode(self.source_of(cond, batch)))
        return State(Cache(self.net.decoder, batch, total, total, pad), context)

    def next(self, tokens: Tensor, state: State) -> Tensor:
        """Read tokens int64 (B, T) and return logits float32 (B, vocab_size) of the token after them."""
        return self.net(tokens, state.context, state.cache)[:, -1].float()

    def fix(self, state: State) -> bool:
        """Make every later step the same work, for a CUDA graph."""
        state.cache.fix()
        return True

    def reorder(self, state: State, index: Tensor) -> None:
        """Let row i continue row index[i], which has the same source."""
        state.cache.reorder(index)
