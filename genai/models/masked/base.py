"""The parts that models of masked tokens share: their ids, the logits of hidden tokens, and the scores of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.protocols import SPECIALS, Batch
from genai.nn.token_transformer import TokenTransformer


class MaskedModel(nn.Module):
    """A model of hidden tokens given those around them, on both sides.

    The first token of a window is context, as for a GPT: a window has `length` tokens after it.

    Args:
        field: field of the data; must be `tokens`.
        vocab_size: number of token ids, the last of which are `SPECIALS`.
        specials: whether they are, see `data.specials`.
        length: tokens of a window after the first.
        net: a bidirectional network from tokens to logits.

    Raises UserError for another field, a vocabulary without special ids, a causal network, or windows longer than its positions.
    """

    field = "tokens"

    def __init__(self, field: str, vocab_size: int, specials: bool, length: int, net: TokenTransformer):
        super().__init__()
        name = type(self).__name__
        if field != self.field:
            raise UserError(f"{name} takes {self.field}, but this data has {field}: choose a text data set with data=")
        if not specials:
            raise UserError(f"{name} needs an id for [MASK], which this data has none of: set data.specials=true")
        if any(block.attention.causal for block in net.transformer.blocks):  # type: ignore[union-attr]
            raise UserError(f"{name} reads both sides: set model.net.transformer.attention.causal=false")
        positions = net.transformer.positions
        if positions is not None and length + 1 > positions:
            raise UserError(
                f"data.shape=[{length}] and the token before it are longer than the {positions} positions of model.net"
            )
        self.words = vocab_size - len(SPECIALS)
        """Ids 0 to words - 1 are the text's own."""
        self.mask, self.pad = (self.words + SPECIALS.index(special) for special in ("[MASK]", "[PAD]"))
        self.length, self.net = length, net

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"net": self.net}

    def predict(
        self, tokens: Tensor, at: Tensor | None = None, padded: bool = False, documents: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, words) of tokens int64 (B, T), or (B, n, words) at positions `at` int64 (B, n), float32 or wider.

        With `padded` no position attends to [PAD], and with `documents` (B, T) none to another document. Special ids are never
        predicted.
        """
        mask = (tokens != self.pad)[:, None, None] if padded else None
        logits = self.net(tokens, mask=mask, at=at, documents=documents)[..., : self.words]
        return logits if logits.dtype == torch.float64 else logits.float()

    def features(self, tokens: Tensor) -> Tensor:
        """Return features (B, width) of texts int64 (B, T), padded with [PAD]: the mean state of the tokens that are none."""
        real = tokens != self.pad
        states = self.net.states(tokens, mask=real[:, None, None]).float() * real[..., None]
        return states.sum(1) / real.sum(1, keepdim=True).clamp_min(1)

    def eligible(self, batch: Batch) -> Tensor:
        """Return which tokens of a batch may be hidden, bool (B, T): those of `mask`, else all; never special ids."""
        tokens = batch[self.field]
        return (tokens < self.words) & batch["mask"] if "mask" in batch else tokens < self.words

    def score_hidden(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln p (B, T) in nats of each `hidden` token, bool (B, T), given those that are not, and whether it is the most
        probable; 0 and False elsewhere."""
        tokens = batch[self.field]
        at = hidden.byte().topk(max(int(hidden.sum(1).max()), 1)).indices
        logits = self.predict(tokens.masked_fill(hidden, self.mask), at, documents=batch.get("document"))
        wanted, real = tokens.gather(1, at), hidden.gather(1, at)
        nats = nats_of(logits, wanted.clamp_max(self.words - 1)) * real
        right = (logits.argmax(-1) == wanted) & real
        none = torch.zeros(tokens.shape, dtype=nats.dtype, device=nats.device)
        return none.scatter(1, at, nats), torch.zeros_like(hidden).scatter(1, at, right)


def nats_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return -ln p (B, n) of tokens int64 (B, n) by their logits (B, n, V)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)


def draw(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """Draw ids int64 (B, T) from softmax(logits / temperature), logits (B, T, V), by the inverse CDF at u (B, T)."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, (u.to(cdf).clamp_min(1e-8) * cdf[..., -1])[..., None])[..., 0]
