"""A stack of pre-norm Transformer blocks whose attention, MLP, norm and positions are objects.

Tenants to come beside the autoregressive family: masked language models, text conditions of diffusion.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genai.core.errors import at_least
from genai.nn.attention import KV, Attention, Rotation


class Cache:
    """What a causal Transformer has seen: keys and values of every layer for the last `capacity` positions of B texts.

    Args:
        net: whose it is.
        batch: B.
        capacity: positions that a new one can see, itself included.
        total: positions there will be at most; beyond `capacity` they come one at a time.
        pad: (B,) how many positions on the left of each text are padding, fewer than capacity; None for none.
    """

    def __init__(self, net: "Transformer", batch: int, capacity: int, total: int, pad: Tensor | None = None):
        weight = next(net.parameters())
        shape = batch, net.kv_heads, capacity, net.head_dim
        self.layers = [KV(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in net.blocks]
        self.capacity, self.pad = capacity, pad
        at = torch.arange(total, device=weight.device)
        if pad is not None:
            self.real = at[:capacity] >= pad[:, None]  # (B, capacity)
            at = (at - pad[:, None]).clamp_min(0)
        self.added, self.rotation = net.position(at, net.head_dim)

    @property
    def length(self) -> int:
        """Positions seen so far, padding included."""
        return self.layers[0].length

    def cut(self, length: int) -> None:
        """Forget all but the first `length` positions; only while none has been overwritten."""
        for kv in self.layers:
            kv.length = length

    def places(self, t: int) -> tuple[Tensor | None, Rotation | None, Tensor | None]:
        """What to add, how to rotate, and the mask, for the t positions after those seen."""
        start, end = self.length, self.length + t
        added = None if self.added is None else self.added[..., start:end, :]
        rotation = (
            None
            if self.rotation is None
            else (self.rotation[0][..., start:end, :], self.rotation[1][..., start:end, :])
        )
        mask, device = None, self.layers[0].k.device
        if t > 1 and (start > 0 or self.pad is not None):
            mask = torch.ones(t, end, dtype=torch.bool, device=device).tril(start)[None, None]
        if self.pad is not None:
            if start >= self.capacity:
                self.real[:, start % self.capacity] = True
            real = self.real[:, None, None, :end]
            # padding sees itself: attention over nothing would be nan
            mask = real if mask is None else mask & (real | torch.eye(end, dtype=torch.bool, device=device)[start:])
        return added, rotation, mask


class MLP(nn.Module):
    """Two linear maps with an activation between; the inner width is `ratio` times the outer."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor], ratio: float = 4.0, bias: bool = False):
        super().__init__()
        self.activation = activation
        self.up, self.out = nn.Linear(width, int(width * ratio), bias), nn.Linear(int(width * ratio), width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """(silu(x W) * x V) U, as many parameters as an MLP of ratio 4 at ratio 8/3 (Shazeer, 2020, eq. 6)."""

    def __init__(self, width: int, ratio: float = 8 / 3, bias: bool = False):
        super().__init__()
        inner = int(width * ratio)
        self.up, self.out = nn.Linear(width, 2 * inner, bias), nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Hendrycks and Gimpel, 2016; approximate="tanh" is GPT-2's."""
    return F.gelu(x, approximate=approximate)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al., "Primer", 2021)."""
    return F.relu(x).square()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Attention, mlp: nn.Module, norms: tuple[nn.Module, nn.Module], dropout: float):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp, self.dropout = norms[0], attention, norms[1], mlp, dropout

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, kv: KV | None = None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), rotation, mask, kv))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer(nn.Module):
    """Embeddings (B, T, width) -> states (B, T, width).

    Args:
        width: of the residual stream.
        layers: blocks.
        attention, mlp, norm, position: called with `width` each time one is needed.
        dropout: of what each block adds, and of the embeddings.
        gradient_checkpointing: compute activations twice instead of keeping them.
    """

    def __init__(
        self, width: int, layers: int, attention: Callable[[int], Attention], mlp: Callable[[int], nn.Module],
        norm: Callable[[int], nn.Module], position: Callable[[int], nn.Module], dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ):  # fmt: skip
        super().__init__()
        at_least(layers, 1, "layers")
        self.width, self.dropout, self.gradient_checkpointing = width, dropout, gradient_checkpointing
        self.position = position(width)
        self.positions: int | None = self.position.length  # type: ignore[assignment]  # None: any
        blocks = [Block(attention(width), mlp(width), (norm(width), norm(width)), dropout) for _ in range(layers)]
        self.kv_heads, self.head_dim = blocks[0].attention.kv_heads, blocks[0].attention.head_dim
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(width)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """With a cache, x are the positions after those it has seen, and it sees them."""
        if cache is None:
            at = torch.arange(x.shape[1], device=x.device)
            (added, rotation), mask = self.position(at, self.head_dim), None
        else:
            added, rotation, mask = cache.places(x.shape[1])
        x = x if added is None else x + added
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotation, mask, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, rotation, mask, None if cache is None else cache.layers[i])
        return self.norm(x)


def scaled_init(net: nn.Module, std: float = 0.02) -> None:
    """GPT-2: every matrix N(0, std^2), biases 0, what writes to the residual stream 1/sqrt(2 layers) of that."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    outs = _outs(net)
    for out in outs:
        nn.init.normal_(out.weight, std=std / len(outs) ** 0.5)


def zero_init(net: nn.Module) -> None:
    """Every matrix uniform with variance 1/(3 inputs), what writes to the residual stream 0: blocks begin as identities."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for out in _outs(net):
        nn.init.zeros_(out.weight)


def _outs(net: nn.Module) -> list[nn.Linear]:
    """The last linear maps of attention and MLP of every block below net."""
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    return [part.out for block in blocks for part in (block.attention, block.mlp)]  # type: ignore[misc]
