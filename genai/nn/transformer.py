"""A stack of pre-norm Transformer blocks whose attention, MLP, norm and positions are exchangeable objects."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genai.core.errors import UserError, at_least, number
from genai.nn.attention import Attention, CacheSlot, Context, ContextKeyValues, CrossAttention
from genai.nn.cache import Cache, LayerCache, Positions


class Shift(nn.Module):
    """Token shift: x_t + mix (x_{t-1} - x_t) with a learned mix per channel (Peng et al., "RWKV", 2023, section 3.1.1).

    At first the mix falls from `start` to 0 over the channels.
    """

    def __init__(self, width: int, start: float = 0.5):
        super().__init__()
        self.mix = nn.Parameter(torch.linspace(start, 0, width))

    def forward(self, x: Tensor, past: CacheSlot | None = None, first: Tensor | None = None) -> Tensor:
        """Shift x (B, T, width); `past` holds the inputs before these T, and these are written to it.

        Nothing is before a token where `first`, bool (B, T, 1), is true.
        """
        if past is None or past.previous is None:
            before = F.pad(x, (0, 0, 1, -1))
            before = before if first is None else before.masked_fill(first, 0)
        else:
            before = past.previous if x.shape[1] == 1 else torch.cat([past.previous, x[:, :-1]], 1)
            past.write(x)
        return torch.lerp(x, before.to(x.dtype), self.mix.to(x.dtype))


class TwoSidedShift(nn.Module):
    """Token shift from both sides, for bidirectional networks: x_t + left (x_{t-1} - x_t) + right (x_{t+1} - x_t), see `Shift`.

    The mixes are learned per channel; at first `left` falls from `start` to 0 over the first half of them, and `right` rises from
    0 to `start` over the second.
    """

    def __init__(self, width: int, start: float = 0.5):
        super().__init__()
        ramp = torch.linspace(-start, start, width)
        self.left, self.right = nn.Parameter((-ramp).clamp_min(0)), nn.Parameter(ramp.clamp_min(0))

    def forward(self, x: Tensor, past: CacheSlot | None = None, first: Tensor | None = None) -> Tensor:
        """Shift x (B, T, width), within documents that begin where `first`, bool (B, T, 1), is true. There is no cache of what
        comes later."""
        before, after = F.pad(x, (0, 0, 1, -1)), F.pad(x, (0, 0, -1, 1))
        if first is not None:
            before, after = before.masked_fill(first, 0), after.masked_fill(F.pad(first, (0, 0, -1, 1), value=True), 0)
        return x + self.left.to(x.dtype) * (before - x) + self.right.to(x.dtype) * (after - x)


class MLP(nn.Module):
    """Two linear maps with an activation between; the inner width is `ratio` times the outer."""

    def __init__(self, width: int, activation: nn.Module, ratio: float = 4.0, bias: bool = False):
        super().__init__()
        self.activation = activation
        self.up, self.out = nn.Linear(width, int(width * ratio), bias), nn.Linear(int(width * ratio), width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., width) to the same shape."""
        return self.out(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    """The gated MLP (silu(x W) * x V) U; ratio 8/3 has as many parameters as an MLP of ratio 4 (Shazeer, 2020, eq.
    6)."""

    def __init__(self, width: int, ratio: float = 8 / 3, bias: bool = False):
        super().__init__()
        inner = int(width * ratio)
        self.up, self.out = nn.Linear(width, 2 * inner, bias), nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., width) to the same shape."""
        gate, value = self.up(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class GELU(nn.Module):
    """The activation x Phi(x) (Hendrycks and Gimpel, 2016); approximate="tanh" is GPT-2's."""

    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to x of any shape."""
        return F.gelu(x, approximate=self.approximate)


class SquaredReLU(nn.Module):
    """The activation max(x, 0)^2 (So et al., "Primer", 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to x of any shape."""
        return F.relu(x).square()


class Block(nn.Module):
    """A pre-norm block: x + attention(shift(norm(x))), x + cross(norm(x), context), x + mlp(shift(norm(x))).

    Shift and cross-attention are optional. With `post_norm` each is norm(x + branch(x)), as in Vaswani et al. (2017).

    Raises UserError for a shift from both sides with causal attention.
    """

    def __init__(
        self,
        width: int,
        attention: Callable[[int], Attention],
        mlp: Callable[[int], nn.Module],
        norm: Callable[[int], nn.Module],
        shift: Callable[[int], Shift | TwoSidedShift] | None,
        dropout: float,
        cross: Callable[[int], CrossAttention] | None = None,
        post_norm: bool = False,
    ):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(width), attention(width), norm(width), mlp(width)
        self.shift1, self.shift2 = (None, None) if shift is None else (shift(width), shift(width))
        if isinstance(self.shift1, TwoSidedShift) and self.attention.causal:
            raise UserError(
                "a TwoSidedShift sees the token after each, which causal attention has to predict: choose Shift, or set "
                "attention.causal=false"
            )
        self.norm_cross, self.cross = (None, None) if cross is None else (norm(width), cross(width))
        self.dropout, self.post_norm = dropout, post_norm

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        cache: LayerCache = LayerCache(),  # noqa: B008
        context: Context | ContextKeyValues | None = None,
    ) -> Tensor:
        """Map x (B, T, width) to the same shape, with the positions, cache and context of this block."""

        def attend(y: Tensor) -> Tensor:
            if self.shift1 is not None:
                y = self.shift1(positions.zero_padding(y), cache.shift1, positions.first)
            return self.attention(y, positions.rotation, positions.mask, cache.keys, cache.values)

        def feed(y: Tensor) -> Tensor:
            if self.shift2 is not None:
                y = self.shift2(positions.zero_padding(y), cache.shift2, positions.first)
            return self.mlp(y)

        x = self.add(x, self.norm1, attend)
        if self.cross is not None and self.norm_cross is not None:
            assert context is not None
            cross = self.cross
            x = self.add(x, self.norm_cross, lambda y: cross(y, context))
        return self.add(x, self.norm2, feed)

    def add(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Add a branch to x (B, T, width), normalised before or, with `post_norm`, after."""
        return norm(x + self.drop(branch(x))) if self.post_norm else x + self.drop(branch(norm(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to a branch's output (B, T, width)."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer(nn.Module):
    """A stack of blocks from embeddings (B, T, width) to states (B, T, width).

    Args:
        width: width of the residual stream.
        layers: number of blocks.
        attention, mlp, norm, position: constructors, called with `width` for each instance.
        shift: constructor of the token shift before attention and MLP; None for none.
        dropout: dropout probability of the embeddings and of each block's branches.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        cross: constructor of cross-attention to a context, between attention and MLP; None for none.
        post_norm: normalise after each branch and the embeddings, as BERT does, and not before each and at the end.

    Raises UserError for layers or dropout out of range, and for positions that do not fit head_dim.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        attention: Callable[[int], Attention],
        mlp: Callable[[int], nn.Module],
        norm: Callable[[int], nn.Module],
        position: Callable[[int], nn.Module],
        shift: Callable[[int], Shift | TwoSidedShift] | None = None,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        cross: Callable[[int], CrossAttention] | None = None,
        post_norm: bool = False,
    ):
        super().__init__()
        at_least(layers, 1, "layers")
        number(dropout, "dropout", 0, 1)
        self.width, self.dropout, self.gradient_checkpointing = width, dropout, gradient_checkpointing
        self.position = position(width)
        self.positions: int | None = self.position.length  # type: ignore[assignment]  # None: no limit
        blocks = [Block(width, attention, mlp, norm, shift, dropout, cross, post_norm) for _ in range(layers)]
        self.shifts = shift is not None
        self.causal, self.crosses = blocks[0].attention.causal, cross is not None
        self.kv_heads, self.head_dim = blocks[0].attention.kv_heads, blocks[0].attention.head_dim
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.post_norm = norm(width), post_norm
        self.position(torch.arange(1), self.head_dim)  # fails early on an invalid head_dim

    def forward(
        self,
        x: Tensor,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        context: Context | Sequence[ContextKeyValues] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Map x (B, T, width) to the same shape.

        With a cache, x continues the positions read before and attends to them. Without, `mask`, bool (B or 1, 1, T,
        T), limits attention; None leaves it to the attention itself. `context` is a Context, or what `project` made of
        it. `documents`, int64 (B, T), ascending and only without a cache, names the document of each: every document
        is then mapped as if it were alone.
        """
        if cache is None:
            at, first = torch.arange(x.shape[1], device=x.device), None
            # A mask of padding, the same for all positions, also keeps it out of shifts.
            real = mask[:, 0, 0, :, None] if mask is not None and mask.shape[2] == 1 else None
            if documents is not None:
                at, mask, first = self.separate(documents, mask)
            positions = Positions(*self.position(at, self.head_dim), mask=mask, real=real, first=first)
            layers = [LayerCache()] * len(self.blocks)
        else:
            positions, layers = cache.take(x.shape[1])
        x = x if positions.embedding is None else x + positions.embedding
        x = self.norm(x) if self.post_norm else x
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        contexts = [context] * len(self.blocks) if context is None or isinstance(context, Context) else context
        for block, *parts in zip(self.blocks, layers, contexts, strict=True):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, positions, *parts, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, positions, *parts)
        return x if self.post_norm else self.norm(x)

    def separate(self, documents: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions (B, T) of tokens within their `documents` (B, T), a mask that keeps attention within them,
        (B, 1, T, T), and where they begin, (B, T, 1)."""
        same = (documents[:, :, None] == documents[:, None])[:, None]
        mask = same if mask is None else mask & same
        if self.blocks[0].attention.causal:  # type: ignore[union-attr]
            mask = mask.tril()
        index = torch.arange(documents.shape[1], device=documents.device)
        first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        return index - (index * first).cummax(1).values, mask, first[..., None]

    def project(self, context: Context) -> list[ContextKeyValues]:
        """Return every block's keys and values of a context, to be reused by many calls."""
        return [block.cross.project(context) for block in self.blocks]  # type: ignore[union-attr,operator]


def scaled_init(net: nn.Module, std: float = 0.02) -> None:
    """GPT-2: every matrix N(0, std^2), biases 0, the n = 2 layers that write to one residual stream 1/sqrt(n) of that."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for stack in [module for module in net.modules() if isinstance(module, Transformer)]:
        outs = _output_layers(stack)
        for out in outs:
            nn.init.normal_(out.weight, std=std / len(outs) ** 0.5)


def zero_init(net: nn.Module) -> None:
    """Every linear map uniform with variance 1/(3 inputs), what writes to the residual stream 0: blocks begin as identities.
    Embeddings stay N(0, 1), but those that also give the logits, `net.tied`, begin with a standard deviation of 1/width."""
    for module in net.modules():
        if isinstance(module, nn.Embedding) and getattr(net, "tied", False):
            nn.init.normal_(module.weight, std=1 / module.embedding_dim)
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for out in _output_layers(net):
        nn.init.zeros_(out.weight)


def _output_layers(net: nn.Module) -> list[nn.Linear]:
    """The last linear maps of attentions and MLP of every block below net."""
    blocks = [block for block in net.modules() if isinstance(block, Block)]
    parts = [part for b in blocks for part in (b.attention, b.cross, b.mlp) if part is not None]
    for part in parts:
        if not hasattr(part, "out"):
            raise UserError(
                f"{type(part).__name__} has no last linear map `out`, which init= sets: choose another mlp="
            )
    return [part.out for part in parts]  # type: ignore[misc]
