"""BERT's masked language model (Devlin et al., 2019, section 3.1)."""

import torch
from torch import Tensor

from genai.core.errors import UserError, number
from genai.core.protocols import Batch, Losses
from genai.models.masked.base import MaskedModel, nats_of
from genai.nn.token_transformer import TokenTransformer


class BERT(MaskedModel):
    """A bidirectional model trained to name tokens that were hidden or changed, drawn anew in every step.

    Of all tokens a share is chosen; a part `random` of those is replaced by random tokens, a part `kept` stays, and the
    others become [MASK]. The loss is the mean of -ln p of the chosen tokens.

    Args:
        field, vocab_size, specials, length, net: see `MaskedModel`.
        share: of a window's tokens that is chosen.
        random, kept: parts of the chosen tokens that are replaced by random ones, and that stay.

    Raises UserError for shares out of range.
    """

    def __init__(
        self,
        field: str,
        vocab_size: int,
        specials: bool,
        length: int,
        net: TokenTransformer,
        share: float = 0.15,
        random: float = 0.1,
        kept: float = 0.1,
    ):
        super().__init__(field, vocab_size, specials, length, net)
        self.share = number(share, "model.share", 0, 1, open_low=True)
        self.random, self.kept = number(random, "model.random", 0, 1), number(kept, "model.kept", 0, 1)
        if random + kept > 1:
            raise UserError(
                f"model.random={random} and model.kept={kept} are parts of the chosen tokens: make their sum at most 1"
            )

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of -ln p of the chosen tokens, and how many are most probable; the weight is their number."""
        tokens = batch[self.field]
        at, chosen = self.choose(self.eligible(batch))
        wanted = tokens.gather(1, at)
        seen = tokens.scatter(1, at, torch.where(chosen, self.corrupt(wanted), wanted))
        logits = self.predict(seen, at, documents=batch.get("document"))
        weight = chosen.sum()
        nats = (nats_of(logits, wanted.clamp_max(self.words - 1)) * chosen).sum()
        right = ((logits.argmax(-1) == wanted) & chosen).sum()
        mean = weight.clamp_min(1)  # without a target the loss is 0 / 1 and its weight 0, not nan
        return Losses(nats / mean, weight, {"accuracy": (right / mean, weight)})

    def choose(self, eligible: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a share of the eligible tokens, bool (B, T), uniformly: returns positions (B, n), and which of them count.

        n depends on T alone, so that nothing waits for the device. A row counts its own share, at least one if any is eligible.
        """
        n = max(round(self.share * eligible.shape[1]), 1)
        order = torch.rand(eligible.shape, device=eligible.device).masked_fill(~eligible, 2.0)
        at = order.topk(n, largest=False).indices
        counts = (self.share * eligible.sum(1, keepdim=True)).round().clamp(1, n)
        return at, eligible.gather(1, at) & (torch.arange(n, device=at.device) < counts)

    def corrupt(self, tokens: Tensor) -> Tensor:
        """Return tokens int64 (B, n) with each replaced by [MASK], by a random one, or kept."""
        u = torch.rand(tokens.shape, device=tokens.device)
        noise = torch.randint(self.words, tokens.shape, device=tokens.device)
        changed = torch.where(u < self.random, noise, torch.full_like(tokens, self.mask))
        return torch.where(u >= 1 - self.kept, tokens, changed)
