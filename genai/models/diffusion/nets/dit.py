"""A Transformer that denoises patches: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genai.core.errors import UserError, at_least
from genai.core.precision import downcast
from genai.models.diffusion.nets.conditioning import add_conditions, embedding
from genai.nn.attention import Attention, Context, ContextKeyValues, CrossAttention
from genai.nn.embed import time_embedding
from genai.nn.init import zero
from genai.nn.norm import RMSNorm
from genai.nn.text_encoder import TextEncoder, check_text
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
    """Diffusion Transformer for images, sequences or latents of any size that `patch` divides (Peebles and Xie, 2023).

    Args:
        shape: (C, H, W), or (C, T).
        patch: side of the squares, or length of the pieces, that become one token each.
        width, layers, heads, ratio: size of the Transformer; ratio is the MLP's inner width over `width`.
        classes: number of labels, None for none; the embedding has one more row, the null label.
        text: caption encoder, None for none; its summary is added to the time embedding, its states enter by
            cross-attention.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        out_channels, out_per_channel: channels of the output, as for a UNet.
        speakers: number of speakers, as `classes`.

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
        speakers: int | None = None,
    ):
        super().__init__()
        at_least(patch, 1, "model.net.patch")
        if len(shape) not in (2, 3) or any(side % patch for side in shape[1:]):
            raise UserError(
                f"a DiT takes [C, H, W] or [C, T] whose sides model.net.patch={patch} divides, got {list(shape)}"
            )
        if width % 4:
            raise UserError(f"model.net.width={width} must be a multiple of 4, for positions in two directions")
        c, *sides = shape
        tokens = [side // patch for side in sides]
        self.patch, self.width, self.gradient_checkpointing = patch, width, gradient_checkpointing
        self.stem = nn.Linear(c * patch ** len(sides), width)
        self.register_buffer("positions", positions(tokens, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label, self.speaker = embedding(classes, width), embedding(speakers, width)
        self.text = check_text(text)
        self.summary = None if text is None else nn.Linear(text.width, width)
        context_width = None if text is None else text.width
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ratio, context_width) for _ in range(layers))
        self.modulation = zero(nn.Linear(width, 2 * width))
        self.head = zero(nn.Linear(width, (out_channels or c * out_per_channel) * patch ** len(sides)))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        states: Tensor | None = None,
        real: Tensor | None = None,
        projected: Sequence[ContextKeyValues] | None = None,
        speaker: Tensor | None = None,
    ) -> Tensor:
        """Denoise x (B, C, H, W) or (B, C, T) at time (B,) in [0, 1000) -> (B, out_channels, H, W) or (B, out_channels, T).

        label and speaker are int64 (B,), states and real are the `Context` of a caption, projected what `project` made of it,
        if it was called.
        """
        emb = self.time(downcast(time_embedding(time, self.width), self.stem.weight))
        emb, context = add_conditions(emb, self.label, label, self.speaker, speaker, self.summary, states, real)
        patches = unshuffle(downcast(x, self.stem.weight), self.patch)
        h = self.stem(patches.flatten(2).mT) + self.positions  # (B, T, width)
        for block, seen in zip(self.blocks, projected or [context] * len(self.blocks), strict=True):
            if self.gradient_checkpointing and self.training:
                h = checkpoint(block, h, emb, seen, use_reentrant=False)
            else:
                h = block(h, emb, seen)
        out = self.head(modulate(h, *self.modulation(emb)[:, None].chunk(2, -1)))  # type: ignore[arg-type]
        return shuffle(out.mT.unflatten(2, patches.shape[2:]), self.patch)

    def project(self, context: Context) -> list[ContextKeyValues]:
        """Return the keys and values of a caption for every block, to be reused by many calls."""
        return [block.cross.project(context) for block in self.blocks]  # type: ignore[union-attr,operator]


def unshuffle(x: Tensor, patch: int) -> Tensor:
    """Map x (B, C, H, W) to (B, C patch^2, H / patch, W / patch), or x (B, C, T) to (B, C patch, T / patch)."""
    if x.ndim == 4:
        return F.pixel_unshuffle(x, patch)
    return x.unflatten(2, (-1, patch)).movedim(3, 2).flatten(1, 2)


def shuffle(x: Tensor, patch: int) -> Tensor:
    """Invert `unshuffle`."""
    if x.ndim == 4:
        return F.pixel_shuffle(x, patch)
    return x.unflatten(1, (-1, patch)).movedim(2, 3).flatten(2)


def positions(tokens: Sequence[int], dim: int) -> Tensor:
    """Return sinusoidal position embeddings (height width, dim), half of each for the row, half for the column; or (T, dim)."""
    axes = torch.meshgrid(*map(torch.arange, tokens), indexing="ij")
    return torch.cat([time_embedding(axis.flatten().float(), dim // len(tokens)) for axis in axes], 1)
