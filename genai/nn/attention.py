"""Self-attention and its positions, and attention to another sequence.

Tenants to come beside the autoregressive family: masked language models, text conditions of diffusion.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core import stored
from genai.core.errors import UserError, at_least, number
from genai.nn.init import zero

Rotation = tuple[Tensor, Tensor]
"""cos and sin of each position's angles, (T, 1, D) or (B, T, 1, D), as `rotate` takes them."""


class CacheSlot(NamedTuple):
    """What T new positions see of something remembered, with room for themselves."""

    states: Tensor
    """(..., T', D)"""
    slot: Tensor
    """The room: (..., T, D), a part of `states`; or int64 (1,), which row of it is the room of one."""
    previous: Tensor | None = None
    """A copy of the position before the new ones (..., 1, D), for who asks; zeros before the first."""

    def write(self, x: Tensor) -> Tensor:
        """Fill the room with x (..., T, D); returns all that is seen."""
        if self.slot.is_floating_point():
            self.slot.copy_(x)
        else:
            self.states.index_copy_(-2, self.slot, x.to(self.states.dtype))
        return self.states


class Attention(nn.Module):
    """Scaled dot-product self-attention (Vaswani et al., 2017, eq. 1), queries in groups that share keys and values.

    Args:
        width: of the residual stream.
        heads: of queries; width / heads is the dimension D of each.
        kv_heads: of keys and values (Ainslie et al., 2023), a divisor of heads; None: as many.
        qk_norm: `qk_norm(D)` normalises each query and key (Henry et al., 2020).
        bias: of both projections.
        dropout: of attention weights.
        causal: position t sees none after it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        causal: bool = True,
    ):
        super().__init__()
        kv_heads = at_least(heads, 1, "heads") if kv_heads is None else at_least(kv_heads, 1, "kv_heads")
        number(dropout, "dropout of attention", 0, 1)
        if width % heads or heads % kv_heads:
            raise UserError(f"heads={heads} must divide width={width}, and kv_heads={kv_heads} must divide heads")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.dropout, self.causal = dropout, causal
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias)
        self.out = nn.Linear(width, width, bias)
        self.qk_norm = None if qk_norm is None else qk_norm(self.head_dim)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        keys: CacheSlot | None = None,
        values: CacheSlot | None = None,
    ) -> Tensor:
        """(B, T, width) -> (B, T, width). mask (B or 1, 1, T, T') says who sees whom, in the place of `causal`; keys and
        values hold those (B, kv_heads, T', D) of the positions before these T, and get theirs."""
        q, k, v = self.heads_of(x, rotation)
        if keys is not None and values is not None:
            k, v = keys.write(k), values.write(v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            self.dropout if self.training else 0.0,
            self.causal and mask is None and x.shape[1] > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    def heads_of(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, T, D), keys and values (B, kv_heads, T, D) of x (B, T, width)."""
        heads = self.qkv(x).view(*x.shape[:2], -1, self.head_dim)
        if self.qk_norm is None and rotation is None:
            q, k, v = heads.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], 2)
        else:
            qk, v = heads.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], 2)
            if self.qk_norm is not None:
                qk = self.qk_norm(qk)
            if rotation is not None:
                qk = rotate(qk, rotation)
            q, k = qk.split_with_sizes([self.heads, self.kv_heads], 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def weights(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Attention weights (B, heads, T, T) for whoever wants to see them; each row sums to 1."""
        q, k, _ = self.heads_of(x, rotation)
        scores = q @ k.repeat_interleave(self.heads // self.kv_heads, 1).transpose(-1, -2) * self.head_dim**-0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(-1)


class Context(NamedTuple):
    """The context of cross-attention: encoder states and their attention mask."""

    states: Tensor
    """(B, T', width)"""
    real: Tensor
    """Which are not padding, bool (B, T'); at least one of each."""


class ContextKeyValues(NamedTuple):
    """A Context as one CrossAttention sees it, for whoever asks more than once."""

    keys: Tensor
    """(B, heads, T', D)"""
    values: Tensor
    """(B, heads, T', D)"""
    mask: Tensor
    """bool (B, 1, 1, T')"""


class CrossAttention(nn.Module):
    """Attention of one sequence to another (Vaswani et al., 2017, section 3.2.3); its answer is zero at first.

    Args:
        width: of the sequence that asks, and of the answer.
        context_width: of the one that is asked.
        heads: a divisor of width.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        if width % at_least(heads, 1, "heads"):
            raise UserError(f"heads={heads} must divide width={width}")
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, False), nn.Linear(context_width, 2 * width, False)
        self.out = zero(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Context | ContextKeyValues) -> Tensor:
        """x (B, T, width), a context of states (B, T', context_width), projected already or not -> as x."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        seen = context if isinstance(context, ContextKeyValues) else self.project(context)
        y = F.scaled_dot_product_attention(q, *seen)
        return self.out(y.transpose(1, 2).flatten(2))

    def project(self, context: Context) -> ContextKeyValues:
        """Its keys and values, which are the same for every x."""
        parts = self.kv(context.states).chunk(2, -1)
        keys, values = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return ContextKeyValues(keys, values, context.real[:, None, None])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (i, i + D/2) of the last dimension by its position's angle (Su et al., 2021, eq. 34), in the precision of
    the angles -> as x."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class RotaryPositions(nn.Module):
    """Rotary positions: only the distance of two positions matters to their attention (Su et al., 2021, eq. 15)."""

    length = None  # any position

    def __init__(self, width: int, base: float = 10000.0):
        super().__init__()
        self.base = base

    def forward(self, positions: Tensor, head_dim: int) -> tuple[Tensor | None, Rotation | None]:
        """What to add to the embeddings, and how to rotate queries and keys, at positions (T,) or (B, T)."""
        if head_dim % 2:
            raise UserError(f"rotary positions turn pairs, but width / heads is {head_dim}: make it even")
        half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
        angles = positions.to(torch.float64)[..., None] * self.base ** (-half / head_dim)
        cos, sin = angles.cos(), angles.sin()
        pair = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        cos, sin = (t.to(torch.promote_types(torch.get_default_dtype(), torch.float32))[..., None, :] for t in pair)
        return None, (cos, sin)


class LearnedPositions(nn.Module):
    """A learned vector for each of `length` positions, added to the embeddings."""

    def __init__(self, width: int, length: int):
        super().__init__()
        self.length, self.table = length, nn.Embedding(length, width)

    def forward(self, positions: Tensor, head_dim: int) -> tuple[Tensor | None, Rotation | None]:
        return self.table(positions), None


def resolve_attention_depths(
    heights: Mapping[int, int], depths: Sequence[int] | None, attention: Sequence[int] | None, key: str
) -> set[int]:
    """The depths at which a network of maps of several sizes attends; a depth counts halvings of its images.

    Args:
        heights: of the maps at each depth where it could, from the images' side on.
        depths: those asked for; negative ones count from the deepest, as in a list.
        attention: instead, heights, as configs of before have them: a stored one may name some that there are not.
        key: of the network in a config.

    Raises UserError for a depth that there is not, and for heights of which none is there.
    """
    if depths is not None and attention is not None:
        raise UserError(
            f"{key}.attention={list(attention)} says in heights what attention_depths says: give attention_depths alone"
        )
    first, n = min(heights, default=0), len(heights)
    if depths is not None:
        if any(not first <= d < first + n and not -n <= d < 0 for d in depths):
            raise UserError(
                f"{key}.attention_depths={list(depths)} must each be a depth of this network, {first} to {first + n - 1}, or "
                f"{-n} to -1 counted from the deepest"
            )
        return {d if d >= 0 else first + n + d for d in depths}
    found = {depth for depth, height in heights.items() if height in (attention or ())}
    if attention and not found and not stored.is_building():
        raise UserError(
            f"{key}.attention={list(attention)} is none of this network's heights {list(heights.values())}, so that it would not "
            f"attend at all: give {key}.attention_depths, such as [-1] for the deepest"
        )
    return found
