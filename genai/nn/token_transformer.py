"""A Transformer from token ids to logits, as language models, masked ones and translators have it."""

from collections.abc import Callable

from torch import Tensor, nn

from genai.core.errors import UserError
from genai.nn.cache import Cache
from genai.nn.transformer import Transformer


class TokenTransformer(nn.Module):
    """A Transformer between an embedding and an output head: token ids int64 (B, T) -> logits (B, T, vocab_size).

    Args:
        vocab_size: number of token ids.
        transformer: causal or not.
        tied: share one matrix between embedding and head.
        init: `init(net)` sets the weights; None keeps torch's.

    Raises UserError for data without token ids, whose vocab_size is None.
    """

    def __init__(
        self, vocab_size: int, transformer: Transformer, tied: bool, init: Callable[[nn.Module], None] | None = None
    ):
        super().__init__()
        if vocab_size is None:
            raise UserError("this model takes tokens, but this data has none (data.levels): choose a text with data=")
        self.embed = nn.Embedding(vocab_size, transformer.width)
        self.transformer = transformer
        self.head = nn.Linear(transformer.width, vocab_size, bias=False)
        self.tied = tied
        if init is not None:
            init(self)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None, documents: Tensor | None = None) -> Tensor:
        """Return logits (B, T, vocab_size) at each of `tokens` int64 (B, T), which follow those in the cache.

        `documents` keeps documents apart, see `Transformer`.
        """
        return self.head(self.transformer(self.embed(tokens), cache, documents=documents))
