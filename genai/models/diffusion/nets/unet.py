"""A U-Net for images and sequences of any size (Ho et al. 2020, appendix B; Nichol & Dhariwal 2021, section 3)."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genai.core import stored
from genai.core.errors import UserError
from genai.core.precision import downcast
from genai.kernels.norm import normalize
from genai.models.diffusion.nets.conditioning import add_conditions, embedding
from genai.nn.attention import Context, ContextKeyValues, CrossAttention, resolve_attention_depths
from genai.nn.embed import time_embedding
from genai.nn.init import zero
from genai.nn.text_encoder import TextEncoder, check_text


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with at most 32 groups of at least 4 channels where the channel count allows."""
    return nn.GroupNorm(math.gcd(channels, min(32, max(channels // 4, 1))), channels)


Sides = tuple[int, int]
"""(1, 1) for images; (0, 1) for sequences, which are images of height 1 whose convolutions are of height 1 too."""


def kernel(sides: Sides) -> dict[str, Any]:
    """Return the size and padding of a convolution over 3 positions on each side."""
    return {"kernel_size": (1 + 2 * sides[0], 1 + 2 * sides[1]), "padding": sides}


class ResBlock(nn.Module):
    """A residual block: norm, SiLU, conv, norm * (1 + scale) + shift, SiLU, dropout, conv; scale and shift from emb."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float, sides: Sides = (1, 1)):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, **kernel(sides))
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = group_norm(c_out), zero(nn.Conv2d(c_out, c_out, **kernel(sides)))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Context | ContextKeyValues | None = None) -> Tensor:
        """Map x (B, c_in, H, W) to (B, c_out, H, W); emb (B, c_emb) is already activated."""
        h = self.conv1(normalize(self.norm1, x, silu=True))
        h = normalize(self.norm2, h, self.emb(emb), silu=True)
        return self.skip(x) + self.conv2(self.dropout(h))


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels, plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor, context: Context | ContextKeyValues | None = None) -> Tensor:
        """Map x (B, C, H, W) to the same shape; emb and context are not used."""
        qkv = self.qkv(normalize(self.norm, x)).flatten(2).mT  # (B, HW, 3C)
        h = F.scaled_dot_product_attention(*qkv[:, None].chunk(3, -1))[:, 0]  # (B, HW, C)
        return x + self.out(h.mT.unflatten(2, x.shape[2:]))


class CrossAttentionBlock(nn.Module):
    """Attention of the pixels to a caption, plus the input; heads of about 32 channels."""

    def __init__(self, channels: int, context_width: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = CrossAttention(channels, context_width, math.gcd(channels, max(channels // 32, 1)))

    def forward(self, x: Tensor, emb: Tensor, context: Context | ContextKeyValues | None = None) -> Tensor:
        """Map x (B, C, H, W) to the same shape under a caption; emb is not used."""
        assert context is not None
        h = self.attention(normalize(self.norm, x).flatten(2).mT, context)
        return x + h.mT.unflatten(2, x.shape[2:])


class Stage(nn.ModuleList):
    """Blocks called one after the other with the same embedding and caption."""

    def forward(self, x: Tensor, emb: Tensor, context: Context | ContextKeyValues | None = None) -> Tensor:
        """Map x (B, c_in, H, W) to (B, c_out, H', W')."""
        for block in self:
            x = block(x, emb, context)
        return x

    def project(self, context: Context) -> ContextKeyValues | None:
        """Return the keys and values of a caption for the one block that reads it, None if there is none."""
        return next((b.attention.project(context) for b in self if isinstance(b, CrossAttentionBlock)), None)


class Downsample(nn.Conv2d):
    """Halve height and width, or the length of a sequence, by a strided convolution."""

    def __init__(self, channels: int, sides: Sides = (1, 1)):
        super().__init__(channels, channels, stride=(1 + sides[0], 1 + sides[1]), **kernel(sides))

    def forward(self, x: Tensor, emb: Tensor, context: Context | ContextKeyValues | None = None) -> Tensor:
        """Map x (B, C, H, W) to (B, C, H / 2, W / 2), or (B, C, 1, T) to (B, C, 1, T / 2)."""
        return super().forward(x)


class Upsample(nn.Conv2d):
    """Double height and width, or the length of a sequence, by nearest neighbour, then convolve."""

    def __init__(self, channels: int, sides: Sides = (1, 1)):
        super().__init__(channels, channels, **kernel(sides))
        self.scale = (1.0 + sides[0], 1.0 + sides[1])

    def forward(self, x: Tensor, emb: Tensor, context: Context | ContextKeyValues | None = None) -> Tensor:
        """Map x (B, C, H, W) to (B, C, 2 H, 2 W), or (B, C, 1, T) to (B, C, 1, 2 T)."""
        return super().forward(F.interpolate(x, scale_factor=self.scale, mode="nearest"))


class UNet(nn.Module):
    """A U-Net whose time, label and speaker enter every residual block by scale and shift.

    A caption enters there by its summary, and by cross-attention wherever there is self-attention.

    Args:
        shape: (C, H, W) of images, or (C, T) of sequences; H and W, or T, must be multiples of 2^(len(multipliers) - 1).
        channels: width of the first resolution.
        multipliers: width of each resolution as a multiple of `channels`.
        blocks: residual blocks per resolution on the way down (one more on the way up).
        attention: heights at which each block attends; superseded by attention_depths, kept for stored configs.
        classes: number of labels, None for none; the embedding has one more row, the null label.
        dropout: probability inside residual blocks.
        gradient_checkpointing: recompute stages in the backward pass instead of keeping their activations.
        out_channels: channels of the output, None for those of the images times `out_per_channel`.
        text: caption encoder, None for none.
        attention_depths: halvings after which each block is followed by self-attention: 0 at the size of the images, -1
            at the smallest size, the default; a stored config with neither key means the height 16.
        out_per_channel: outputs for each channel of the images, such as a logit for each grey level.
        speakers: number of speakers, as `classes`.

    Raises UserError if the network cannot take the size, or has no such depth.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] | None = None,
        classes: int | None = None,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        out_channels: int | None = None,
        text: TextEncoder | None = None,
        attention_depths: Sequence[int] | None = None,
        out_per_channel: int = 1,
        speakers: int | None = None,
    ):
        super().__init__()
        c_image, height, *width = _check_shape(shape, len(multipliers))
        self.is_sequence = not width
        sides = (0, 1) if self.is_sequence else (1, 1)
        if attention_depths is None and attention is None:
            attention, attention_depths = ((16,), None) if stored.is_building() else (None, (-1,))
        heights = {depth: height >> depth for depth in range(len(multipliers))}
        depths = resolve_attention_depths(heights, attention_depths, attention, "model.net")
        if text is not None and not depths and not stored.is_building():
            raise UserError(
                "model.net.attention_depths=[] leaves no place that reads a caption: give one, such as [-1]"
            )
        self.channels, self.gradient_checkpointing = channels, gradient_checkpointing
        c_emb = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label, self.speaker = embedding(classes, c_emb), embedding(speakers, c_emb)
        self.text = check_text(text)
        self.summary = None if text is None else nn.Linear(text.width, c_emb)

        def attend(c: int, depth: int) -> list[nn.Module]:
            cross = [] if text is None else [CrossAttentionBlock(c, text.width)]
            return [AttentionBlock(c), *cross] if depth in depths else []

        def stage(c_in: int, c_out: int, depth: int) -> Stage:
            return Stage([ResBlock(c_in, c_out, c_emb, dropout, sides), *attend(c_out, depth)])

        c = channels
        self.stem = nn.Conv2d(c_image, c, **kernel(sides))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [c]
        deepest = len(multipliers) - 1
        for depth, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(c, channels * multiplier, depth))
                c = channels * multiplier
                skips.append(c)
            if depth < deepest:
                self.down.append(Stage([Downsample(c, sides)]))
                skips.append(c)
        self.middle = Stage(
            [
                ResBlock(c, c, c_emb, dropout, sides),
                *attend(c, deepest),
                ResBlock(c, c, c_emb, dropout, sides),
            ]
        )
        for depth, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(blocks + 1):
                up = stage(c + skips.pop(), channels * multiplier, depth)
                c = channels * multiplier
                if depth > 0 and i == blocks:
                    up.append(Upsample(c, sides))
                self.up.append(up)
        outputs = out_channels or c_image * out_per_channel
        self.head = nn.Sequential(group_norm(c), nn.SiLU(), zero(nn.Conv2d(c, outputs, **kernel(sides))))
        self.to(memory_format=torch.channels_last)  # cuDNN's fastest layout for convolutions in half precision

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        states: Tensor | None = None,
        real: Tensor | None = None,
        projected: Sequence[ContextKeyValues | None] | None = None,
        speaker: Tensor | None = None,
    ) -> Tensor:
        """Denoise x (B, C, H, W) or (B, C, T) at time (B,) in [0, 1000) -> (B, out_channels, H, W) or (B, out_channels, T).

        label and speaker are int64 (B,), states and real are the `Context` of a caption, projected what `project` made of it,
        if it was called.
        """
        emb = self.time(downcast(time_embedding(time, self.channels), self.stem.weight))
        emb, context = add_conditions(emb, self.label, label, self.speaker, speaker, self.summary, states, real)
        contexts = itertools.repeat(context) if projected is None else iter(projected)  # one per stage
        x = x[:, :, None] if self.is_sequence else x
        h = self.stem(downcast(x, self.stem.weight).contiguous(memory_format=torch.channels_last))
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, emb, next(contexts))
            skips.append(h)
        h = self._run(self.middle, h, emb, next(contexts))
        for stage in self.up:
            h = self._run(stage, torch.cat([h, skips.pop()], 1), emb, next(contexts))
        norm, _, conv = self.head
        out = conv(normalize(norm, h, silu=True)).contiguous()  # type: ignore[arg-type]
        return out[:, :, 0] if self.is_sequence else out

    def project(self, context: Context) -> list[ContextKeyValues | None]:
        """Return the keys and values of a caption for every stage, None where a stage does not read it."""
        return [stage.project(context) for stage in (*self.down, self.middle, *self.up)]  # type: ignore[operator]

    def _run(self, stage: nn.Module, h: Tensor, emb: Tensor, context: Context | ContextKeyValues | None) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(stage, h, emb, context, use_reentrant=False)
        return stage(h, emb, context)


def _check_shape(shape: Sequence[int], levels: int) -> Sequence[int]:
    """Return shape. Raises UserError unless it is (C, H, W) or (C, T) with sides that can be halved so often."""
    if len(shape) not in (2, 3):
        raise UserError(
            f"a U-Net takes images of shape [C, H, W] or sequences [C, T], got {list(shape)} (data=, or model=ddpm_mlp)"
        )
    multiple = 2 ** (levels - 1)
    if any(side % multiple for side in shape[1:]):
        sides, found = ("height and width", f"{shape[1]}x{shape[2]}") if len(shape) == 3 else ("length", f"{shape[1]}")
        raise UserError(
            f"this U-Net halves its input {levels - 1} times, so {sides} must be multiples of {multiple}, got "
            f"{found} (data.size, or fewer model.net.multipliers)"
        )
    return shape
