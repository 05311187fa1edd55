"""The key-value cache of a causal Transformer, with counters of positions on the host and on the device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genai.nn.attention import CacheSlot, Rotation

if TYPE_CHECKING:
    from genai.nn.transformer import Transformer


class Positions(NamedTuple):
    """Positions and attention mask of T new tokens."""

    embedding: Tensor | None = None
    """Added to their embeddings, (T, width) or (B, T, width)."""
    rotation: Rotation | None = None
    """Rotary embedding of their queries and keys; None where positions are not rotary."""
    mask: Tensor | None = None
    """Attention mask over the cached positions, (B or 1, 1, T, T'); None is causal."""
    real: Tensor | None = None
    """Which are not padding, (B, T, 1); None: all."""

    def zero_padding(self, x: Tensor) -> Tensor:
        """Zeros where padding is: before a text there is nothing."""
        return x if self.real is None else x * self.real


class LayerCache(NamedTuple):
    """Cached keys, values and shifted inputs of one block."""

    keys: CacheSlot | None = None
    values: CacheSlot | None = None
    shift1: CacheSlot | None = None
    shift2: CacheSlot | None = None


class HostPositions:
    """Positions counted on the host: a step works on as many as there are."""

    fixed = False

    def __init__(self, index: Tensor):
        self.index, self.length, self.row, self.t = index, 0, 0, 0

    def take(self, t: int, capacity: int) -> tuple[Tensor, int]:
        """The t positions after those taken (t,), and how many of a cache's `capacity` hold one then."""
        self.row, self.t = self.length % capacity, t
        self.length += t
        return self.index[self.length - t : self.length], min(self.length, capacity)

    def slots(self, data: Tensor) -> Sequence[Tensor]:
        """Where each layer of data (layers, ..., capacity, D) keeps what was taken last, as `CacheSlot` has it."""
        return data.narrow(-2, self.row, self.t).unbind(0)


class DevicePositions:
    """Positions counted on the device, one at a time: every step is the same work over the whole capacity."""

    fixed = True

    def __init__(self, positions: HostPositions):
        self.next = torch.full((1,), positions.length, device=positions.index.device)
        self.row = self.next

    def take(self, t: int, capacity: int) -> tuple[Tensor, int]:
        """As of HostPositions, with t = 1."""
        at = self.next.clone()
        self.row = at % capacity
        self.next.add_(1)
        return at, capacity

    def slots(self, data: Tensor) -> Sequence[Tensor]:
        return [self.row] * len(data)


class Cache:
    """Keys, values and shifted inputs of every block at the last `capacity` positions of B sequences.

    Each position beyond `capacity` is written over the oldest.

    Args:
        net: the Transformer that fills it.
        batch: B.
        capacity: positions that are kept.
        total: positions there will be at most; beyond `capacity` they come one at a time.
        pad: (B,) how many positions on the left of each sequence are padding, fewer than capacity; None for none.
        window: positions that a new one can see, itself included; None: all that are kept.
    """

    def __init__(
        self,
        net: "Transformer",
        batch: int,
        capacity: int,
        total: int,
        pad: Tensor | None = None,
        window: int | None = None,
    ):
        block, n = net.blocks[0], len(net.blocks)
        weight: Tensor = block.attention.qkv.weight  # type: ignore[union-attr,assignment]
        shift: Tensor = block.shift1.mix if net.shifts else weight  # type: ignore[union-attr,assignment]
        self.kv = [weight.new_empty(n, batch, net.kv_heads, 0, net.head_dim) for _ in range(2)]
        self.shifted = [shift.new_empty(n, batch, 0, net.width) for _ in range(2 if net.shifts else 0)]
        self.index = at = torch.arange(total, device=weight.device)
        self.positions: HostPositions | DevicePositions = HostPositions(at)
        self.pad, self.window = pad, capacity if window is None else window
        if pad is not None:
            at = (at - pad[:, None]).clamp_min(0)
        self.embedding, self.rotation = net.position(at, net.head_dim)
        self.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        """Keep another number of positions; only while there are none."""
        self.capacity = capacity
        self.kv, self.shifted = (
            [data.new_zeros(*data.shape[:-2], capacity, data.shape[-1]) for data in part]
            for part in (self.kv, self.shifted)
        )
        if self.pad is not None:
            self.real = self.index[:capacity] >= self.pad[:, None]  # (B, capacity)

    def rewind(self, n: int) -> None:
        """Forget the n positions seen last, not all; only while none has been overwritten, and before `fix`."""
        self.positions.length -= n  # type: ignore[union-attr]

    def slide(self) -> None:
        """Keep only the `window` positions seen last, and from here on the new ones over the oldest; before `fix`."""
        n = self.window
        first = self.positions.length - n  # type: ignore[union-attr]
        order = first + (torch.arange(n, device=self.index.device) - first) % n  # position p in row p % n
        self.kv, self.shifted = ([data.index_select(-2, order) for data in part] for part in (self.kv, self.shifted))
        if self.pad is not None:
            self.real = self.real.index_select(1, order)
        self.capacity = n

    def fix(self) -> None:
        """From here on each take(1) is the same work whatever the position, as a CUDA graph needs: a tensor says which it
        is, and attention goes over the whole capacity under a mask."""
        if isinstance(self.positions, HostPositions):
            self.positions = DevicePositions(self.positions)

    def take(self, t: int) -> tuple[Positions, list[LayerCache]]:
        """Positions and layer caches of the next t tokens, which count as read from now on."""
        at, seen = self.positions.take(t, self.capacity)
        index, mask, real = self.index[:seen], None, None
        narrow = self.window < seen
        if narrow or self.positions.fixed or (t > 1 and (seen > t or self.pad is not None)):
            mask = (index <= at[:, None])[None, None]
            mask = mask & (index > at[:, None] - self.window) if narrow else mask
        if self.pad is not None:
            if t == 1:
                self.real.index_fill_(1, at % self.capacity, True)  # where padding may have been
            else:
                real = self.real[:, seen - t : seen, None]
            sees = self.real[:, None, None, :seen]
            # padding sees itself: attention over nothing would be nan
            mask = sees if mask is None else mask & (sees | (index == at[:, None]))
        embedding = None if self.embedding is None else self.embedding.index_select(-2, at)
        rotation = self.rotation and (self.rotation[0].index_select(-3, at), self.rotation[1].index_select(-3, at))
        return Positions(embedding, rotation, mask, real), self._layers(at, seen)

    def _layers(self, at: Tensor, seen: int) -> list[LayerCache]:
        """Each block's view of the `seen` positions, with room for the new ones `at`."""
        slots = self.positions.slots
        rows = [map(CacheSlot, data.narrow(-2, 0, seen).unbind(0), slots(data)) for data in self.kv]
        if self.shifted:
            last = (at[:1] - 1) % self.capacity
            rows += [
                map(CacheSlot, data.unbind(0), slots(data), data.index_select(-2, last).unbind(0))
                for data in self.shifted
            ]
        return [LayerCache(*layer) for layer in zip(*rows, strict=True)]
