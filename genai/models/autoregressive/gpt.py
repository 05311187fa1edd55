"""GPT: a decoder-only Transformer over token ids (Radford et al., 2019)."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.protocols import Batch, Losses
from genai.nn.transformer import Cache, Transformer


class Decoder(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab_size) of the next ones.

    Args:
        vocab_size: ids.
        transformer: causal.
        tied: one matrix embeds ids and gives logits.
        init: `init(decoder)` sets the weights; None keeps torch's.
    """

    def __init__(
        self, vocab_size: int, transformer: Transformer, tied: bool, init: Callable[[nn.Module], None] | None = None
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, transformer.width)
        self.transformer = transformer
        self.head = nn.Linear(transformer.width, vocab_size, bias=False)
        self.tied = tied
        if init is not None:
            init(self)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self.head(self.transformer(self.embed(tokens), cache))


class GPT(nn.Module):
    """Maximum likelihood of the next token.

    Args:
        field: of the data, tokens.
        vocab_size: ids.
        length: context in tokens, as trained.
        net: tokens and an optional cache -> logits, such as Decoder.
    """

    bound = "exact"

    def __init__(self, field: str, vocab_size: int, length: int, net: Decoder):
        super().__init__()
        if field != "tokens":
            raise UserError(f"a GPT takes tokens, but this data has {field}: choose a text with data=")
        most = net.transformer.positions
        if most is not None and length > most:
            raise UserError(f"data.shape=[{length}] is longer than the {most} positions of model.net")
        self.vocab_size, self.length, self.net = vocab_size, length, net

    def nets(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def nats(self, batch: Batch) -> Tensor:
        """-ln p of each token (B, T) given those before it, 0 where `mask` is false: (B, T - 1)."""
        tokens = batch["tokens"]
        logits = self.net(tokens[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(tokens[:, 1:])
        return nats * batch["mask"][:, 1:] if "mask" in batch else nats

    def forward(self, batch: Batch, step: int) -> Losses:
        """The mean over all targets, 0 of none; their number is the weight."""
        nats = self.nats(batch)
        if "mask" not in batch:
            return Losses(nats.sum() / nats.numel(), nats.numel())
        weight = batch["mask"][:, 1:].sum()
        return Losses(nats.sum() / weight.clamp_min(1), weight)

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """ln p(tokens after the first | first) in nats (B,), of those in `mask`; exact, the seed is not used."""
        return -self.nats(batch).sum(1)
