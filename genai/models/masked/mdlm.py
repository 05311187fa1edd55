"""Masked diffusion of tokens (Sahoo et al., "Simple and Effective Masked Diffusion Language Models", 2024)."""

import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import at_least
from genai.core.protocols import Batch, Losses
from genai.models.masked.base import MaskedModel, nats_of
from genai.nn.token_transformer import TokenTransformer


class MDLM(MaskedModel):
    """A diffusion of tokens into [MASK] on the linear schedule alpha = 1 - t, and its reverse.

    The bound in continuous time (eq. 10) is -ln p <= int_0^1 E[sum of -ln p of the masked tokens] / t dt, where each of n
    tokens is masked with probability t. By the number k of masked tokens, of which the integral makes each from 1 to n equally
    likely, it is n E_k[mean of -ln p of k masked tokens]: the same expectation without the spread of k at a given t
    (Ou et al., 2024, eq. 3.6). Times are stratified over the batch, and k = ceil(t n).

    Args:
        field, vocab_size, specials, length, net: see `MaskedModel`.
        bound_samples: masks of each window that `log_prob` averages over.
    """

    bound = "lower bound"

    def __init__(
        self, field: str, vocab_size: int, specials: bool, length: int, net: TokenTransformer, bound_samples: int = 8
    ):
        super().__init__(field, vocab_size, specials, length, net)
        self.bound_samples = at_least(bound_samples, 1, "model.bound_samples")

    def eligible(self, batch: Batch) -> Tensor:
        """Return which tokens of a batch are diffused, bool (B, T): those of `mask`, else all but the first."""
        found = super().eligible(batch)
        return found if "mask" in batch else found & (torch.arange(found.shape[1], device=found.device) > 0)

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return an estimate of the bound in nats per token; the weight is the number of tokens."""
        tokens, eligible = batch[self.field], self.eligible(batch)
        b, device = len(tokens), tokens.device
        t = (torch.arange(b, device=device) + torch.rand((), device=device)) / b
        nats = self.nats(batch, eligible, t, torch.rand(tokens.shape, device=device)).sum()
        weight = eligible.sum()
        return Losses(nats / weight.clamp_min(1), weight)

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return a lower bound of ln p(tokens of `mask`, else after the first | the others) in nats, (B,).

        Item i averages over `bound_samples` masks at stratified times, drawn from seed + i.
        """
        tokens, eligible = batch[self.field], self.eligible(batch)
        seeds = (rng.seed_range(seed, len(tokens))).to(tokens.device)
        first = rng.uniform(seeds, (1,))[:, 0]
        total = torch.zeros(len(tokens), device=tokens.device, dtype=torch.float64)
        for j in range(self.bound_samples):
            order = rng.uniform(seeds, tokens.shape[1:], row=j + 1)
            total -= self.nats(batch, eligible, (j + first) / self.bound_samples, order)
        return total / self.bound_samples

    def nats(self, batch: Batch, eligible: Tensor, t: Tensor, order: Tensor) -> Tensor:
        """Return an estimate of the bound of each row in nats, (B,), at times t (B,).

        The tokens that are masked are the first of the eligible ones, bool (B, T), in the order of uniform draws (B, T).
        """
        tokens, n = batch[self.field], eligible.sum(1)
        k = (t * n).ceil().clamp_min(1)
        rank = order.masked_fill(~eligible, 2.0).argsort(1).argsort(1)
        masked = (rank < k[:, None]) & eligible
        logits = self.predict(tokens.masked_fill(masked, self.mask), documents=batch.get("document"))
        return (nats_of(logits, tokens.clamp_max(self.words - 1)) * masked).sum(1) * n / k
