"""The key-value cache of a causal Transformer. Positions are counted on the host, or on the device for CUDA graphs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genai.nn.attention import CacheSlot, Rotation

if TYPE_CHECKING:
    from genai.nn.transformer import Transformer


class Positions(NamedTuple):
    """The positions of T new tokens: embeddings, rotation, attention mask and padding."""

    embedding: Tensor | None = None
    """Position embeddings to add, (T, width) or (B, T, width); None for rotary positions."""
    rotation: Rotation | None = None
    """Rotary embedding of their queries and keys; None where positions are not rotary."""
    mask: Tensor | None = None
    """Attention mask over the cached positions, (B or 1, 1, T, T'); None is causal."""
    real: Tensor | None = None
    """False on padding, bool (B, T, 1); None if nothing is padding."""
    first: Tensor | None = None
    """True where a document begins, bool (B, T, 1); None if all tokens are of one."""

    def zero_padding(self, x: Tensor) -> Tensor:
        """Return x (B, T, width) with zeros at padding, so that nothing of it leaks into the first token."""
        return x if self.real is None else x * self.real


class LayerCache(NamedTuple):
    """The cached keys, values and shifted inputs of one block."""

    keys: CacheSlot | None = None
    values: CacheSlot | None = None
    shift1: CacheSlot | None = None
    shift2: CacheSlot | None = None


class HostPositions:
    """Positions counted on the host: a step works on exactly the positions read so far."""

    fixed = False

    def __init__(self, index: Tensor):
        self.index, self.length, self.row, self.t = index, 0, 0, 0

    def take(self, t: int, capacity: int) -> tuple[Tensor, int]:
        """Return the next t positions (t,), and how many rows of a cache of `capacity` are then in use."""
        self.row, self.t = self.length % capacity, t
        self.length += t
        return self.index[self.length - t : self.length], min(self.length, capacity)

    def slots(self, data: Tensor) -> Sequence[Tensor]:
        """Return the slot of the last positions taken in each layer of data (layers, ..., capacity, D), see
        `CacheSlot`."""
        return data.narrow(-2, self.row, self.t).unbind(0)


class DevicePositions:
    """Positions counted on the device, one at a time: every step is the same work over the whole capacity."""

    fixed = True

    def __init__(self, positions: HostPositions):
        self.next = torch.full((1,), positions.length, device=positions.index.device)
        self.row = self.next

    def take(self, t: int, capacity: int) -> tuple[Tensor, int]:
        """Return the next position (1,) and the capacity; t must be 1."""
        at = self.next.clone()
        self.row = at % capacity
        self.next.add_(1)
        return at, capacity

    def slots(self, data: Tensor) -> Sequence[Tensor]:
        """Return the row of the last position taken, the same for each layer of data."""
        return [self.row] * len(data)


class Cache:
    """The keys, values and shifted inputs of every block at the last `capacity` positions of B sequences.

    Positions beyond `capacity` overwrite the oldest (a ring buffer).

    Args:
        net: the Transformer that fills the cache.
        batch: number of sequences, B.
        capacity: positions that are kept.
        total: positions there will be at most; beyond `capacity` they come one at a time.
        pad: int64 (B,), padding on the left of each sequence, less than capacity; None for none.
        window: positions that a new one attends to, itself included; None for all that are kept.
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
        """Change the capacity of an empty cache."""
        self.capacity = capacity
        self.kv, self.shifted = (
            [data.new_zeros(*data.shape[:-2], capacity, data.shape[-1]) for data in part]
            for part in (self.kv, self.shifted)
        )
        if self.pad is not None:
            self.real = self.index[:capacity] >= self.pad[:, None]  # (B, capacity)

    def rewind(self, n: int) -> None:
        """Forget the n positions read last, not all; only before any was overwritten and before `fix`."""
        self.positions.length -= n  # type: ignore[union-attr]

    def reorder(self, index: Tensor) -> None:
        """Let row i continue row index[i], int64 (B,), which has as much padding."""
        for data in (*self.kv, *self.shifted):
            data.copy_(data.index_select(1, index))

    def slide(self) -> None:
        """Keep only the `window` positions read last, and let new ones overwrite the oldest; before `fix`."""
        n = self.window
        first = self.positions.length - n  # type: ignore[union-attr]
        order = first + (torch.arange(n, device=self.index.device) - first) % n  # position p in row p % n
        self.kv, self.shifted = ([data.index_select(-2, order) for data in part] for part in (self.kv, self.shifted))
        if self.pad is not None:
            self.real = self.real.index_select(1, order)
        self.capacity = n

    def fix(self) -> None:
        """Make every later take(1) the same work whatever the position, as a CUDA graph needs.

        A tensor counts the position, and attention runs over the whole capacity under a mask.
        """
        if isinstance(self.positions, HostPositions):
            self.positions = DevicePositions(self.positions)

    def take(self, t: int) -> tuple[Positions, list[LayerCache]]:
        """Return the positions of the next t tokens and each block's cache; the tokens count as read from now on."""
        at, seen = self.positions.take(t, self.capacity)
        index, mask, real = self.index[:seen], None, None
        narrow = self.window < seen
        if narrow or self.positions.fixed or (t > 1 and (seen > t or self.pad is not None)):
            mask = (index <= at[:, None])[None, None]
            mask = mask & (index > at[:, None] - self.window) if narrow else mask
        if self.pad is not None:
            if t == 1:
                # The token overwrites its slot, which may have held padding.
                self.real.index_fill_(1, at % self.capacity, True)
            else:
                real = self.real[:, seen - t : seen, None]
            sees = self.real[:, None, None, :seen]
            # Padding attends to itself: a softmax over nothing would be nan.
            mask = sees if mask is None else mask & (sees | (index == at[:, None]))
        embedding = None if self.embedding is None else self.embedding.index_select(-2, at)
        rotation = self.rotation and (self.rotation[0].index_select(-3, at), self.rotation[1].index_select(-3, at))
        return Positions(embedding, rotation, mask, real), self._layers(at, seen)

    def _layers(self, at: Tensor, seen: int) -> list[LayerCache]:
        """Return each block's view of the `seen` positions, with slots for the new ones `at`."""
        slots = self.positions.slots
        rows = [map(CacheSlot, data.narrow(-2, 0, seen).unbind(0), slots(data)) for data in self.kv]
        if self.shifted:
            last = (at[:1] - 1) % self.capacity
            rows += [
                map(CacheSlot, data.unbind(0), slots(data), data.index_select(-2, last).unbind(0))
                for data in self.shifted
            ]
        return [LayerCache(*layer) for layer in zip(*rows, strict=True)]
