"""BERT with a head of its [CLS] token, for labels of texts (Devlin et al., 2019, sections 3.2 and 4.1)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.protocols import SPECIALS, Batch, Losses
from genai.nn.token_transformer import TokenTransformer
from genai.nn.transformer import Transformer


class Reader(TokenTransformer):
    """A Transformer from the ids of texts to logits of labels.

    Args:
        source_vocab_size: number of ids of texts.
        vocab_size: number of labels and their end.
        transformer, init, transform: see `TokenTransformer`.

    Raises UserError for data without texts and labels.
    """

    def __init__(
        self,
        source_vocab_size: int,
        vocab_size: int,
        transformer: Transformer,
        init: Callable[[nn.Module], None] | None = None,
        transform: Callable[[int], nn.Module] | None = None,
    ):
        if source_vocab_size is None or vocab_size is None:
            raise UserError("this model takes texts and their labels, but this data has none: choose data=topics")
        super().__init__(source_vocab_size, transformer, False, init, transform, outputs=vocab_size)


@dataclass
class State:
    """The logits of the labels, (B, vocab_size), and whether a label has been written."""

    logits: Tensor
    written: bool = False


class BERTClassifier(nn.Module):
    """A bidirectional model of the label of a text, which it reads as [CLS], the text, [SEP].

    The label is a target of one token and its end, so that what samples and scores targets does so with labels. A batch has
    `tokens` int64 (B, 1 + 2), the end of document, label and end; and `source` int64 (B, S), a text and [SEP], padded at the end
    with negative ids.

    Args:
        field: field of the data; must be `tokens`.
        vocab_size: number of labels and their end, the last.
        source_specials: whether the last ids of texts are `SPECIALS`, see `data.source_specials`.
        length: tokens of the longest target; must be 2.
        net: a bidirectional network.

    Raises UserError for data without labels or special ids, and for a causal network.
    """

    field = "tokens"
    bound = "exact"
    """The kind of likelihood that `log_prob` returns: ln p itself, not a bound."""

    def __init__(self, field: str, vocab_size: int, source_specials: bool, length: int, net: Reader):
        super().__init__()
        if field != self.field:
            raise UserError(
                f"a BERTClassifier takes texts and their labels, but this data has {field}: choose data=topics"
            )
        if length != 2:
            raise UserError(
                f"a BERTClassifier takes a label of one token and its end, but the longest of this data has {length}: set "
                "data.target_tokenizer=word, and give labels without spaces"
            )
        if not source_specials:
            raise UserError(
                "a BERTClassifier needs an id for [CLS], which this data has none of: set data.source_specials=true"
            )
        if net.transformer.causal:
            raise UserError("a BERTClassifier reads both sides: set model.net.transformer.attention.causal=false")
        self.vocab_size, self.length, self.net = vocab_size, length, net
        self.first = vocab_size - 1
        self.start_id, self.end, self.pad = (
            net.embed.num_embeddings - len(SPECIALS) + SPECIALS.index(name) for name in ("[CLS]", "[SEP]", "[PAD]")
        )

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"net": self.net}

    def null(self) -> Batch:
        """Return the empty text (1,)."""
        return {"source": torch.full((1,), self.end, device=self.net.embed.weight.device)}

    def logits(self, batch: Batch | None, n: int) -> Tensor:
        """Return the logits of the labels of n texts, float32 or wider (n, vocab_size); the end is no label.

        Raises UserError for a text longer than the network's positions.
        """
        given = None if batch is None else batch.get("source")
        source = self.null()["source"].expand(n, -1) if given is None else given
        tokens = F.pad(source.masked_fill(source < 0, self.pad), (1, 0), value=self.start_id)
        positions = self.net.transformer.positions
        if positions is not None and tokens.shape[1] > positions:
            raise UserError(
                f"a text of {tokens.shape[1]} tokens, [CLS] and [SEP] counted, is longer than the {positions} positions of "
                "model.net: set data.longest"
            )
        first = torch.zeros((len(tokens), 1), dtype=torch.int64, device=tokens.device)
        logits = self.net(tokens, mask=(tokens != self.pad)[:, None, None], at=first)[:, 0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.masked_fill(torch.arange(self.vocab_size, device=logits.device) == self.first, -torch.inf)

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of -ln p(label | text), and how many labels are the most probable."""
        labels = batch[self.field][:, 1]
        logits, n = self.logits(batch, len(labels)), len(labels)
        right = (logits.argmax(1) == labels).float().mean()
        return Losses(F.cross_entropy(logits, labels), n, {"accuracy": (right, n)})

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p(label | text) in nats, (B,); exact, so the seed is not used. The end after a label is certain."""
        labels = batch[self.field][:, 1:2]
        return self.logits(batch, len(labels)).log_softmax(1).gather(1, labels)[:, 0]

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> State:
        """Return the state of `batch` labels before they are written; texts are read here, see `Autoregressive.start`."""
        return State(self.logits(cond, batch))

    def next(self, tokens: Tensor, state: Any) -> Tensor:
        """Return the logits (B, vocab_size) of the labels, and after a label those of the end alone."""
        if not state.written:
            state.written = True
            return state.logits
        over = torch.full_like(state.logits, -torch.inf)
        over[:, self.first] = 0
        return over
