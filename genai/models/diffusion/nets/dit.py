"""A Transformer that denoises patches: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genai.core.errors import UserError, at_least
from genai.core.precision import downcast
from genai.models.diffusion.nets.conditioning import add_conditions
from genai.nn.attention import Attention, Context, ContextKeyValues, CrossAttention
from genai.nn.embed import time_embedding
from genai.nn.init import zero
from genai.nn.norm import RMSNorm
from genai.nn.text_encoder import TextEncoder
from genai.nn.transformer import GELU, MLP


class DiTBlock(nn.Module):
    """Self-attention and an MLP, each scaled, shifted and gated by the embedding ("adaLN-Zero", section 3.2).

    The gates are 0 at first, so a new block is the identity. Between the two comes cross-attention to the caption, if
    there is one.
    """

    def __init__(self, width: int, heads: int, ratio: float, context_width: int | None):
        super().__init__()
        self.attention = Attention(width, heads, qk_norm=RMSNorm, bias=True, causal=False)
        self.cross = None if context_width is None else CrossAttention(width, context_width, heads)
        self.mlp = MLP(width, GELU("tanh"), ratio, bias=True)
        self.modulation = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, emb: Tensor, context: Context | ContextKeyValues | None = None) -> Tensor:
        """Map x (B, T, width) to the same shape; emb (B, width) is already activated."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1))
        if self.cross is not None:
            assert context is not None
            x = x + self.cross(F.layer_norm(x, x.shape[-1:]), context)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return norm(x) * (1 + scale) + shift for x (B, T, width); shift and scale (B, 1, width)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class DiT(nn.Module):
    """Diffusion Transformer for images or latents of any size that `patch` divides (Peebles and Xie, 2023).

    Args:
        shape: (C, H, W).
        patch: side of the squares that become one token each.
        width, layers, heads, ratio: size of the Transformer; ratio is the MLP's inner width over `width`.
        classes: number of labels, None for none; the embedding has one more row, the null label.
        text: caption encoder, None for none; its summary is added to the time embedding, its states enter by
            cross-attention.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        out_channels, out_per_channel: channels of the output, as for a UNet.

    Raises UserError if the network cannot take the shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        ratio: float = 4.0,
        classes: int | None = None,
        text: TextEncoder | None = None,
        gradient_checkpointing: bool = False,
        out_channels: int | None = None,
        out_per_channel: int = 1,
    ):
        super().__init__()
        if len(shape) != 3 or shape[1] % at_least(patch, 1, "model.net.patch") or shape[2] % patch:
            raise UserError(f"a DiT takes [C, H, W] whose sides model.net.patch={patch} divides, got {list(shape)}")
        if width % 4:
            raise UserError(f"model.net.width={width} must be a multiple of 4, for positions in two directions")
        c, h, w = shape
        self.patch, self.width, self.gradient_checkpointing = patch, width, gradient_checkpointing
        self.stem = nn.Linear(c * patch**2, width)
        self.register_buffer("positions", positions(h // patch, w // patch, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if classes is None else nn.Embedding(classes + 1, width)
        self.text = text
        self.summary = None if text is None else nn.Linear(text.width, width)
        context_width = None if text is None else text.width
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ratio, context_width) for _ in range(layers))
        self.modulation = zero(nn.Linear(width, 2 * width))
        self.head = zero(nn.Linear(width, (out_channels or c * out_per_channel) * patch**2))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        states: Tensor | None = None,
        real: Tensor | None = None,
        projected: Sequence[ContextKeyValues] | None = None,
    ) -> Tensor:
        """Denoise x (B, C, H, W) at time (B,) in [0, 1000) -> (B, out_channels, H, W).

        label is int64 (B,), states and real are the `Context` of a caption, projected what `project` made of it, if it
        was called.
        """
        emb = self.time(downcast(time_embedding(time, self.width), self.stem.weight))
        emb, context = add_conditions(emb, self.label, label, self.summary, states, real)
        height = x.shape[2] // self.patch
        patches = F.pixel_unshuffle(downcast(x, self.stem.weight), self.patch).flatten(2).mT
        h = self.stem(patches) + self.positions  # (B, T, width)
        for block, seen in zip(self.blocks, projected or [context] * len(self.blocks), strict=True):
            if self.gradient_checkpointing and self.training:
                h = checkpoint(block, h, emb, seen, use_reentrant=False)
            else:
                h = block(h, emb, seen)
        out = self.head(modulate(h, *self.modulation(emb)[:, None].chunk(2, -1)))  # type: ignore[arg-type]
        return F.pixel_shuffle(out.mT.unflatten(2, (height, -1)), self.patch)

    def project(self, context: Context) -> list[ContextKeyValues]:
        """Return the keys and values of a caption for every block, to be reused by many calls."""
        return [block.cross.project(context) for block in self.blocks]  # type: ignore[union-attr,operator]


def positions(height: int, width: int, dim: int) -> Tensor:
    """Return sinusoidal position embeddings (height width, dim): half of each encodes the row, half the column."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([time_embedding(axis.flatten().float(), dim // 2) for axis in (row, column)], 1)
