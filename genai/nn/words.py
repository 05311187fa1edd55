"""Captions as tokens, in the way that the latents of a first stage are tokens."""

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, at_least
from genai.core.protocols import PAD, Batch


class Bytes(nn.Module):
    """The bytes of a caption as token ids, 0 to 255, then `PAD`; the counterpart of `LatentTokens` for text.

    Args:
        length: bytes of a caption with its padding.

    Raises UserError for a length below 1.
    """

    field, vocab_size = "caption", PAD + 1

    def __init__(self, length: int):
        super().__init__()
        self.shape = (at_least(length, 1, "length of a caption"),)

    def check(self, batch: Batch, field: str) -> None:
        """Raise UserError for captions of another length."""
        if (found := batch[field].shape[1]) != self.shape[0]:
            raise UserError(
                f"captions of this data have data.length={found} bytes, but this model reads {self.shape[0]}: give both the same"
            )

    def encode(self, batch: Batch) -> Tensor:
        """Return the captions int64 (B, length) of a batch."""
        return batch["caption"]

    def decode(self, tokens: Tensor) -> Tensor:
        """Return captions int64 (B, length) of which everything from the first `PAD` on is `PAD`."""
        return torch.where((tokens == PAD).cumsum(1) > 0, PAD, tokens)
