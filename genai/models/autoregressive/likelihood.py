"""The loss of models of the next token, over the targets that `mask` leaves."""

import torch
from torch import Tensor
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.protocols import Batch, Losses


def nats_of(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Return -ln p (B, T - 1) of the tokens after the first by their logits (B, T - 1, vocab_size), 0 where `mask` is false.

    With label smoothing it is the cross-entropy from (1 - smoothing) onehot + smoothing / vocab_size (Szegedy et al., 2016,
    section 7), which is no likelihood. Raises UserError for documents that a model would have to keep apart, and does not.
    """
    if "document" in batch:
        raise UserError("data.separate=true is for a model that keeps documents apart, such as model=gpt: leave it out")
    targets = batch["tokens"][:, 1:]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    nats = nats.view_as(targets)
    return nats * batch["mask"][:, 1:] if "mask" in batch else nats


def mean_loss(nats: Tensor, batch: Batch) -> Losses:
    """Return the mean of nats (B, T - 1) over all targets, 0 if there are none; the weight is their number."""
    if "mask" not in batch:
        return Losses(nats.sum() / nats.numel(), nats.numel())
    weight = batch["mask"][:, 1:].sum()
    # Without a target the loss is 0 / 1 and its weight 0, not nan.
    return Losses(nats.sum() / weight.clamp_min(1), weight)
