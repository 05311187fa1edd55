"""A text encoder trained along with the network it conditions."""

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, at_least
from genai.core.protocols import PAD
from genai.nn.attention import Attention, Context, LearnedPositions
from genai.nn.norm import LayerNorm
from genai.nn.transformer import GELU, MLP, Transformer


class TextEncoder(nn.Module):
    """A small bidirectional Transformer over the bytes of a caption.

    A caption is int64 (B, length), bytes of UTF-8 from 0 to 255, padded at the end with `PAD`; one of padding alone is
    "no caption". A learned state is prepended, so that even that leaves something to attend to; it serves as the
    summary.

    Args:
        length: length of captions in bytes.
        width, layers, heads: size of the Transformer.

    Raises UserError for a length below 1.
    """

    def __init__(self, length: int, width: int = 128, layers: int = 2, heads: int = 4):
        super().__init__()
        self.length, self.width = at_least(length, 1, "model.net.text.length"), width
        self.embed, self.begin = nn.Embedding(256, width), nn.Parameter(torch.randn(width))
        self.transformer = Transformer(
            width,
            layers,
            lambda n: Attention(n, heads, causal=False),
            lambda n: MLP(n, GELU()),
            LayerNorm,
            lambda n: LearnedPositions(n, length + 1),
        )

    def null(self) -> Tensor:
        """Return the empty caption, int64 (length,)."""
        return torch.full((self.length,), PAD, device=self.begin.device)

    def forward(self, caption: Tensor) -> Context:
        """Encode captions int64 (B, length) -> a Context of states (B, length + 1, width)."""
        real = torch.nn.functional.pad(caption != PAD, (1, 0), value=True)
        x = self.embed(caption.clamp_max(PAD - 1))
        x = torch.cat([self.begin.expand(len(x), 1, -1), x], 1)
        return Context(self.transformer(x, mask=real[:, None, None]), real)


def check_text(text: nn.Module | None) -> nn.Module | None:
    """Return the text encoder of a network, or None. Raises UserError for a module that lacks the attributes of a TextEncoder."""
    if text is not None and not all(hasattr(text, name) for name in ("width", "length", "null")):
        raise UserError(
            f"model.net.text is a {type(text).__name__}, and a TextEncoder is needed: of a run of model=contrastive that is "
            "part=encoders.text.text"
        )
    return text
