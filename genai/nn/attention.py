"""Self-attention with its positions, and cross-attention."""

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
    """A view of one cached tensor for T new positions: everything they attend to, and the slot to write them to."""

    states: Tensor
    """(..., T', D): all positions to attend to, the new ones included"""
    slot: Tensor
    """Where to write the new positions: a view (..., T, D) of `states`, or the index int64 (1,) of one row of it."""
    previous: Tensor | None = None
    """A copy of the position before the new ones (..., 1, D), zeros before the first; None if no layer reads it."""

    def write(self, x: Tensor) -> Tensor:
        """Write x (..., T, D) to the slot and return the cached states (..., T', D), x included."""
        if self.slot.is_floating_point():
            self.slot.copy_(x)
        else:
            self.states.index_copy_(-2, self.slot, x.to(self.states.dtype))
        return self.states


class Attention(nn.Module):
    """Scaled dot-product self-attention (Vaswani et al., 2017, eq. 1); groups of queries may share keys and values.

    Args:
        width: width of the residual stream.
        heads: number of query heads; width / heads is the dimension D of each.
        kv_heads: number of key and value heads (Ainslie et al., 2023), a divisor of heads; None for as many as heads.
        qk_norm: `qk_norm(D)` normalises each query and key (Henry et al., 2020).
        bias: give both projections a bias.
        dropout: dropout probability of attention weights.
        causal: position t attends to positions 0, ..., t only.

    Raises UserError if the heads do not divide the width, or for a dropout out of range.
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
        """Attend from x (B, T, width) to itself, or to the cache and itself -> (B, T, width).

        Args:
            rotation: rotary embedding of queries and keys, see `rotate`.
            mask: attention mask (B or 1, 1, T, T'), True where a position may attend; replaces `causal`.
            keys, values: cached keys and values (B, kv_heads, T', D), to which those of x are written.
        """
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
        """Return queries (B, heads, T, D), keys and values (B, kv_heads, T, D) of x (B, T, width)."""
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
        """Return the attention weights (B, heads, T, T) of x (B, T, width), for inspection; each row sums to 1."""
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
    """Attention mask, bool (B, T'): False on padding; at least one True in each row."""


class ContextKeyValues(NamedTuple):
    """The keys and values that one CrossAttention computes from a Context, for reuse by many calls."""

    keys: Tensor
    """(B, heads, T', D)"""
    values: Tensor
    """(B, heads, T', D)"""
    mask: Tensor
    """bool (B, 1, 1, T')"""


class CrossAttention(nn.Module):
    """Attention of one sequence to another (Vaswani et al., 2017, section 3.2.3), initialised to return zero.

    Args:
        width: width of the sequence of queries, and of the output.
        context_width: width of the sequence of keys and values.
        heads: number of heads, a divisor of width.

    Raises UserError if heads does not divide width.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        if width % at_least(heads, 1, "heads"):
            raise UserError(f"heads={heads} must divide width={width}")
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, False), nn.Linear(context_width, 2 * width, False)
        self.out = zero(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Context | ContextKeyValues) -> Tensor:
        """Attend from x (B, T, width) to a context of states (B, T', context_width), or its keys and values -> as x."""
        projected = context if isinstance(context, ContextKeyValues) else self.project(context)
        y = F.scaled_dot_product_attention(self.queries(x), *projected)
        return self.out(y.transpose(1, 2).flatten(2))

    def queries(self, x: Tensor) -> Tensor:
        """Return the queries (B, heads, T, D) of x (B, T, width)."""
        return self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """Return the attention weights (B, heads, T, T') of x (B, T, width) to a context, for inspection; each row sums to 1."""
        keys, _, mask = self.project(context)
        scores = self.queries(x) @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1)

    def project(self, context: Context) -> ContextKeyValues:
        """Return the keys and values of a context; they are the same for every x."""
        parts = self.kv(context.states).chunk(2, -1)
        keys, values = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return ContextKeyValues(keys, values, context.real[:, None, None])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (i, i + D/2) of the last dimension by its position's angle (Su et al., 2021, eq. 34) -> as x.

    The product is computed in the precision of the angles.
    """
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class RotaryPositions(nn.Module):
    """Rotary position embeddings: attention depends only on the distance of two positions (Su et al., 2021, eq. 15)."""

    length = None  # no limit

    def __init__(self, width: int, base: float = 10000.0):
        super().__init__()
        self.base = base

    def forward(self, positions: Tensor, head_dim: int) -> tuple[Tensor | None, Rotation | None]:
        """Return None and the rotation of queries and keys at positions (T,) or (B, T), see `Rotation`.

        Raises UserError for an odd head_dim.
        """
        if head_dim % 2:
            raise UserError(f"rotary positions turn pairs, but width / heads is {head_dim}: make it even")
        # In float64: float32 angles of positions in the thousands would be off by 1e-4.
        half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
        angles = positions.to(torch.float64)[..., None] * self.base ** (-half / head_dim)
        cos, sin = angles.cos(), angles.sin()
        pair = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        cos, sin = (t.to(torch.promote_types(torch.get_default_dtype(), torch.float32))[..., None, :] for t in pair)
        return None, (cos, sin)


class PeriodicPositions(RotaryPositions):
    """Rotary position embeddings, and a learned vector for each place in periods of positions, such as the voices in a bar.

    Args:
        period: positions of a period.
        base: of the rotary embeddings.
    """

    def __init__(self, width: int, period: int, base: float = 10000.0):
        super().__init__(width, base)
        self.table = nn.Embedding(at_least(period, 1, "period"), width)

    def forward(self, positions: Tensor, head_dim: int) -> tuple[Tensor | None, Rotation | None]:
        """Return the embeddings (T, width) or (B, T, width) of the places of positions (T,) or (B, T), and their rotation."""
        return self.table(positions % self.table.num_embeddings), super().forward(positions, head_dim)[1]


class LearnedPositions(nn.Module):
    """Learned position embeddings: one vector for each of `length` positions."""

    def __init__(self, width: int, length: int):
        super().__init__()
        self.length, self.table = length, nn.Embedding(length, width)

    def forward(self, positions: Tensor, head_dim: int) -> tuple[Tensor | None, Rotation | None]:
        """Return the embeddings (T, width) or (B, T, width) of positions (T,) or (B, T), and None."""
        return self.table(positions), None


def resolve_attention_depths(
    heights: Mapping[int, int], depths: Sequence[int] | None, attention: Sequence[int] | None, key: str
) -> set[int]:
    """Return the depths at which a network of feature maps attends; a depth is a number of halvings of the images.

    Args:
        heights: height of the maps at each depth where attention is possible, from the images' side on.
        depths: requested depths; negative ones count from the deepest, as in a list.
        attention: heights instead of depths, superseded; a stored config may name some that do not exist.
        key: config key of the network, for errors.

    Raises UserError for a depth that does not exist, and for heights of which none exists.
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
            f"{key}.attention={list(attention)} names none of this network's heights {list(heights.values())} and "
            f"so switches attention off: give {key}.attention_depths, such as [-1] for the deepest"
        )
    return found
