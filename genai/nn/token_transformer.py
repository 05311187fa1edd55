"""A Transformer from token ids to logits, as language models, masked ones and translators have it."""

from collections.abc import Callable

from torch import Tensor, nn

from genai.core.errors import UserError
from genai.nn.cache import Cache
from genai.nn.transformer import Transformer


class HeadTransform(nn.Module):
    """A linear map, an activation and a norm between the states and the head, as BERT has them (Devlin et al., 2019)."""

    def __init__(self, width: int, activation: nn.Module, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.linear, self.activation, self.norm = nn.Linear(width, width), activation, norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., width) to the same shape."""
        return self.norm(self.activation(self.linear(x)))


class TokenTransformer(nn.Module):
    """A Transformer between an embedding and an output head: token ids int64 (B, T) -> logits (B, T, vocab_size).

    Args:
        vocab_size: number of token ids.
        transformer: causal or not.
        tied: share one matrix between embedding and head.
        init: `init(net)` sets the weights; None keeps torch's.
        transform: constructor, called with the width, of what states pass before the head; None for nothing.
        bias: give the head a bias.
        outputs: number of logits; None for one for each id, which `tied` needs.

    Raises UserError for data without token ids, whose vocab_size is None, and for tied matrices of other outputs.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: Transformer,
        tied: bool,
        init: Callable[[nn.Module], None] | None = None,
        transform: Callable[[int], nn.Module] | None = None,
        bias: bool = False,
        outputs: int | None = None,
    ):
        super().__init__()
        if vocab_size is None:
            raise UserError("this model takes tokens, but this data has none (data.levels): choose a text with data=")
        if tied and outputs not in (None, vocab_size):
            raise UserError(
                f"a head of {outputs} outputs has not the matrix of {vocab_size} ids: set model.net.tied=false"
            )
        self.embed = nn.Embedding(vocab_size, transformer.width)
        self.transformer = transformer
        self.transform = None if transform is None else transform(transformer.width)
        self.head = nn.Linear(transformer.width, vocab_size if outputs is None else outputs, bias)
        self.tied = tied
        if init is not None:
            init(self)
        if tied:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        at: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, vocab_size) at each of `tokens` int64 (B, T), which follow those in the cache.

        Args:
            mask: attention mask without a cache, see `Transformer`.
            at: positions int64 (B, n) whose logits, (B, n, vocab_size), are wanted alone.
            documents: keeps documents apart, see `Transformer`.
        """
        states = self.states(tokens, cache, mask, documents)
        if at is not None:
            states = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        return self.head(states if self.transform is None else self.transform(states))

    def states(
        self, tokens: Tensor, cache: Cache | None = None, mask: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Return the states (B, T, width) of `tokens` int64 (B, T), from which the logits are computed."""
        return self.transformer(self.embed(tokens), cache, mask, documents=documents)
