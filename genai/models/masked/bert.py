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
        whole_words: choose all tokens of a word or none, by `word` (B, T) of a batch, see `data.words`.

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
        whole_words: bool = False,
    ):
        super().__init__(field, vocab_size, specials, length, net)
        self.whole_words = whole_words
        self.share = number(share, "model.share", 0, 1, open_low=True)
        self.random, self.kept = number(random, "model.random", 0, 1), number(kept, "model.kept", 0, 1)
        if random + kept > 1:
            raise UserError(
                f"model.random={random} and model.kept={kept} are parts of the chosen tokens: make their sum at most 1"
            )

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of -ln p of the chosen tokens, and how many are most probable; the weight is their number."""
        tokens = batch[self.field]
        eligible = self.eligible(batch)
        at, chosen = self.choose_words(eligible, self.words_of(batch)) if self.whole_words else self.choose(eligible)
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

    def choose_words(self, eligible: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Choose all eligible tokens, bool (B, T), of some `words`, int64 (B, T), as `choose` does; here n = T.

        The words are laid in random order around a circle of as many places as there are eligible tokens, and those that begin
        in a random arc of the share's length are chosen: each with just that probability, however long it is.
        """
        key = torch.rand(words.shape, device=words.device).gather(1, words)  # one for each word
        key, at = key.sort(dim=1, stable=True)
        counted, n = eligible.gather(1, at), eligible.sum(1, keepdim=True)
        place = counted.cumsum(1) - counted.long()
        new = torch.ones_like(counted)
        new[:, 1:] = key[:, 1:] != key[:, :-1]
        begin = place.masked_fill(~new, 0).cummax(1).values
        turn = torch.rand((len(words), 1), device=words.device)
        return at, counted & ((begin / n.clamp_min(1) + turn) % 1 < self.share)

    @staticmethod
    def words_of(batch: Batch) -> Tensor:
        """Return the number of each token's word, int64 (B, T). Raises UserError for a batch without."""
        if "word" not in batch:
            raise UserError(
                "model.whole_words=true needs the words of a text, which this data has not: set data.words=true"
            )
        return batch["word"]

    def corrupt(self, tokens: Tensor) -> Tensor:
        """Return tokens int64 (B, n) with each replaced by [MASK], by a random one, or kept."""
        u = torch.rand(tokens.shape, device=tokens.device)
        noise = torch.randint(self.words, tokens.shape, device=tokens.device)
        changed = torch.where(u < self.random, noise, torch.full_like(tokens, self.mask))
        return torch.where(u >= 1 - self.kept, tokens, changed)
