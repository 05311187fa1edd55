"""Group normalisation, scale and shift, and SiLU in Triton, forward and backward, in the layout of the input.

The forward pass reads x twice and writes y once: each program takes mean and squared deviations of every channel in its
tile, a second kernel merges those of a group (Chan et al. 1979), a third normalises. The backward pass likewise: sums of
dv and dv xhat by channel, the group's means of both, then dx. Arithmetic is float32 whatever the tensors are, no sum is atomic,
so that the same bits come each time. Imported by `norm` where it is needed.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from genai.kernels.triton_affine_step import align, vector

TILE = 4096  # elements a program
WARPS = 4

# Integers for which Triton would compile another kernel where 16 divides them; VECTOR says how many elements to move at once.
_SIZES = ["outer", "inner_vectors", "o_blocks", "i_blocks", "per_group", "groups", "pixels", "chunks"]


@triton.jit
def place(outer, inner, o_blocks, i_blocks, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Return a program's tile of a sample with elements (outer, inner): sample, blocks, indices, offsets, and a
    mask."""
    pid = tl.program_id(0)
    i_block, o_block, sample = pid % i_blocks, pid // i_blocks % o_blocks, pid // (i_blocks * o_blocks)
    o, i = o_block * OUTER + tl.arange(0, OUTER), i_block * INNER + tl.arange(0, INNER)
    at = sample.to(tl.int64) * outer * inner + (o[:, None] * inner + i[None, :])
    return sample, o_block, i_block, o, i, at, (o[:, None] < outer) & (i[None, :] < inner)


@triton.jit
def over_tile(v, LAST: tl.constexpr):
    """Broadcast a vector over channels to a tile."""
    return v[None, :] if LAST else v[:, None]


@triton.jit
def store_partial(PARTIAL, a, b, sample, chunk, chunks, c, channels):
    """Store two numbers per channel in a chunk of the pixels to PARTIAL (B, chunks, 2, channels)."""
    at = PARTIAL + (sample.to(tl.int64) * chunks + chunk) * 2 * channels + c
    tl.store(at, a, c < channels)
    tl.store(at + channels, b, c < channels)


@triton.jit
def factors(WEIGHT, BIAS, SCALE_SHIFT, sample, c, channels, inside, SCALED: tl.constexpr):
    """Load weight, bias, 1 + scale and shift of each channel."""
    weight, bias = tl.load(WEIGHT + c, inside, 0).to(tl.float32), tl.load(BIAS + c, inside, 0).to(tl.float32)
    factor, shift = 1.0 + weight * 0, weight * 0
    if SCALED:
        at = SCALE_SHIFT + sample.to(tl.int64) * 2 * channels + c
        factor += tl.load(at, inside, 0).to(tl.float32)
        shift += tl.load(at + channels, inside, 0).to(tl.float32)
    return weight, bias, factor, shift


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    X,
    PARTIAL,
    outer,
    inner_vectors,
    o_blocks,
    i_blocks,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    LAST: tl.constexpr,
):
    """Compute mean and sum of squared deviations of each channel in a tile."""
    inner = inner_vectors * VECTOR
    sample, o_block, i_block, o, i, at, valid = place(outer, inner, o_blocks, i_blocks, OUTER, INNER)
    x = tl.load(X + at, valid, 0).to(tl.float32)
    if LAST:
        c, channels, chunk, chunks, count = i, inner, o_block, o_blocks, tl.minimum(outer - o_block * OUTER, OUTER)
    else:
        c, channels, chunk, chunks, count = o, outer, i_block, i_blocks, tl.minimum(inner - i_block * INNER, INNER)
    mean = tl.sum(x, 0 if LAST else 1) / count
    deviation = tl.where(valid, x - over_tile(mean, LAST), 0)
    store_partial(PARTIAL, mean, tl.sum(deviation * deviation, 0 if LAST else 1), sample, chunk, chunks, c, channels)


@triton.jit(do_not_specialize=_SIZES)
def statistics_kernel(
    PARTIAL,
    MEAN,
    RSTD,
    pixels,
    chunks,
    groups,
    per_group,
    eps,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merge the moments of channels and chunks to mean and 1 / standard deviation of one group of one sample."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    channels, d = groups * per_group, tl.arange(0, CHANNELS)
    FIRST = PARTIAL + sample.to(tl.int64) * chunks * 2 * channels + group * per_group
    total = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    for start in range(0, chunks, CHUNKS):
        k = start + tl.arange(0, CHUNKS)
        count = tl.minimum(pixels - k * CHUNK, CHUNK)
        inside = (k[:, None] < chunks) & (d[None, :] < per_group)
        total += tl.load(FIRST + k[:, None] * 2 * channels + d[None, :], inside, 0) * count[:, None]
    n = pixels.to(tl.float32) * per_group
    mean = tl.sum(tl.sum(total, 1), 0) / n
    spread = tl.zeros([CHUNKS, CHANNELS], tl.float32)
    for start in range(0, chunks, CHUNKS):
        k = start + tl.arange(0, CHUNKS)
        count = tl.minimum(pixels - k * CHUNK, CHUNK)
        inside = (k[:, None] < chunks) & (d[None, :] < per_group)
        at = FIRST + k[:, None] * 2 * channels + d[None, :]
        difference = tl.load(at, inside, 0) - mean
        within = tl.load(at + channels, inside, 0)
        spread += tl.where(inside, within + count[:, None] * difference * difference, 0)
    tl.store(MEAN + tl.program_id(0), mean)
    tl.store(RSTD + tl.program_id(0), 1 / tl.sqrt(tl.sum(tl.sum(spread, 1), 0) / n + eps))


@triton.jit(do_not_specialize=_SIZES)
def normalize_kernel(
    X,
    Y,
    WEIGHT,
    BIAS,
    SCALE_SHIFT,
    MEAN,
    RSTD,
    outer,
    inner_vectors,
    o_blocks,
    i_blocks,
    groups,
    per_group,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    LAST: tl.constexpr,
    SCALED: tl.constexpr,
    SILU: tl.constexpr,
):
    """Compute y = v or v sigmoid(v), v = (xhat weight + bias) (1 + scale) + shift, of a tile."""
    inner = inner_vectors * VECTOR
    sample, _, _, o, i, at, valid = place(outer, inner, o_blocks, i_blocks, OUTER, INNER)
    c, channels = (i, inner) if LAST else (o, outer)
    inside = c < channels
    weight, bias, factor, shift = factors(WEIGHT, BIAS, SCALE_SHIFT, sample, c, channels, inside, SCALED)
    mean = tl.load(MEAN + sample * groups + c // per_group, inside, 0)
    slope = tl.load(RSTD + sample * groups + c // per_group, inside, 0) * weight * factor
    x = tl.load(X + at, valid, 0).to(tl.float32)
    y = (x - over_tile(mean, LAST)) * over_tile(slope, LAST) + over_tile(bias * factor + shift, LAST)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(Y + at, y.to(Y.dtype.element_ty), valid)


@triton.jit
def inner_gradient(x, dy, mean, rstd, weight, bias, factor, shift, LAST: tl.constexpr, SILU: tl.constexpr):
    """Return xhat, and the gradient dv of SiLU's input."""
    xhat = (x - over_tile(mean, LAST)) * over_tile(rstd, LAST)
    if SILU:
        v = xhat * over_tile(weight * factor, LAST) + over_tile(bias * factor + shift, LAST)
        sigmoid = tl.sigmoid(v)
        dy = dy * sigmoid * (1 + v * (1 - sigmoid))
    return xhat, dy


@triton.jit(do_not_specialize=_SIZES)
def gradient_sums_kernel(
    X,
    DY,
    WEIGHT,
    BIAS,
    SCALE_SHIFT,
    MEAN,
    RSTD,
    PARTIAL,
    outer,
    inner_vectors,
    o_blocks,
    i_blocks,
    groups,
    per_group,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    LAST: tl.constexpr,
    SCALED: tl.constexpr,
    SILU: tl.constexpr,
):
    """Compute the sums of dv and dv xhat of each channel in a tile."""
    inner = inner_vectors * VECTOR
    sample, o_block, i_block, o, i, at, valid = place(outer, inner, o_blocks, i_blocks, OUTER, INNER)
    if LAST:
        c, channels, chunk, chunks = i, inner, o_block, o_blocks
    else:
        c, channels, chunk, chunks = o, outer, i_block, i_blocks
    inside = c < channels
    weight, bias, factor, shift = factors(WEIGHT, BIAS, SCALE_SHIFT, sample, c, channels, inside, SCALED)
    mean = tl.load(MEAN + sample * groups + c // per_group, inside, 0)
    rstd = tl.load(RSTD + sample * groups + c // per_group, inside, 0)
    x, dy = tl.load(X + at, valid, 0).to(tl.float32), tl.load(DY + at, valid, 0).to(tl.float32)
    xhat, dv = inner_gradient(x, dy, mean, rstd, weight, bias, factor, shift, LAST, SILU)
    plain, times_xhat = tl.sum(dv, 0 if LAST else 1), tl.sum(dv * xhat, 0 if LAST else 1)
    store_partial(PARTIAL, plain, times_xhat, sample, chunk, chunks, c, channels)


@triton.jit(do_not_specialize=_SIZES)
def gradient_statistics_kernel(
    PARTIAL,
    WEIGHT,
    BIAS,
    SCALE_SHIFT,
    DPARAMETERS,
    DSCALE_SHIFT,
    MEANS,
    pixels,
    chunks,
    groups,
    per_group,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Compute a group's gradients of weight, bias, scale and shift, and the means of dxhat and dxhat xhat."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    channels, d = groups * per_group, tl.arange(0, CHANNELS)
    FIRST = PARTIAL + sample.to(tl.int64) * chunks * 2 * channels + group * per_group
    plain, times_xhat = tl.zeros([CHUNKS, CHANNELS], tl.float32), tl.zeros([CHUNKS, CHANNELS], tl.float32)
    for start in range(0, chunks, CHUNKS):
        k = start + tl.arange(0, CHUNKS)
        inside = (k[:, None] < chunks) & (d[None, :] < per_group)
        at = FIRST + k[:, None] * 2 * channels + d[None, :]
        plain += tl.load(at, inside, 0)
        times_xhat += tl.load(at + channels, inside, 0)
    plain, times_xhat = tl.sum(plain, 0), tl.sum(times_xhat, 0)
    c, inside = group * per_group + d, d < per_group
    weight, bias, factor, _ = factors(WEIGHT, BIAS, SCALE_SHIFT, sample, c, channels, inside, SCALED)
    at = sample.to(tl.int64) * 2 * channels + c
    tl.store(DPARAMETERS + at, factor * times_xhat, inside)
    tl.store(DPARAMETERS + at + channels, factor * plain, inside)
    if SCALED:
        dscale = weight * times_xhat + bias * plain
        tl.store(DSCALE_SHIFT + at, dscale.to(DSCALE_SHIFT.dtype.element_ty), inside)
        tl.store(DSCALE_SHIFT + at + channels, plain.to(DSCALE_SHIFT.dtype.element_ty), inside)
    n = pixels.to(tl.float32) * per_group
    tl.store(MEANS + 2 * tl.program_id(0), tl.sum(weight * factor * plain, 0) / n)
    tl.store(MEANS + 2 * tl.program_id(0) + 1, tl.sum(weight * factor * times_xhat, 0) / n)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    X,
    DY,
    DX,
    WEIGHT,
    BIAS,
    SCALE_SHIFT,
    MEAN,
    RSTD,
    MEANS,
    outer,
    inner_vectors,
    o_blocks,
    i_blocks,
    groups,
    per_group,
    VECTOR: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    LAST: tl.constexpr,
    SCALED: tl.constexpr,
    SILU: tl.constexpr,
):
    """Compute dx = (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) / std of a tile, dxhat = dv weight (1 + scale)."""
    inner = inner_vectors * VECTOR
    sample, _, _, o, i, at, valid = place(outer, inner, o_blocks, i_blocks, OUTER, INNER)
    c, channels = (i, inner) if LAST else (o, outer)
    inside = c < channels
    weight, bias, factor, shift = factors(WEIGHT, BIAS, SCALE_SHIFT, sample, c, channels, inside, SCALED)
    group = sample * groups + c // per_group
    mean, rstd = tl.load(MEAN + group, inside, 0), tl.load(RSTD + group, inside, 0)
    first, second = tl.load(MEANS + 2 * group, inside, 0), tl.load(MEANS + 2 * group + 1, inside, 0)
    x, dy = tl.load(X + at, valid, 0).to(tl.float32), tl.load(DY + at, valid, 0).to(tl.float32)
    xhat, dv = inner_gradient(x, dy, mean, rstd, weight, bias, factor, shift, LAST, SILU)
    dx = dv * over_tile(rstd * weight * factor, LAST) - over_tile(rstd * first, LAST)
    dx -= xhat * over_tile(rstd * second, LAST)
    tl.store(DX + at, dx.to(DX.dtype.element_ty), valid)


class Plan(NamedTuple):
    """The tiling of a tensor (B, channels, pixels); `last` is True if its channels are contiguous."""

    last: bool
    outer: int
    inner: int
    OUTER: int
    INNER: int

    @property
    def blocks(self) -> tuple[int, int]:
        return triton.cdiv(self.outer, self.OUTER), triton.cdiv(self.inner, self.INNER)

    @property
    def chunk(self) -> int:
        """The number of pixels of a tile."""
        return self.OUTER if self.last else self.INNER

    @property
    def chunks(self) -> int:
        return self.blocks[0 if self.last else 1]


def plan(channels: int, pixels: int, last: bool) -> Plan:
    outer, inner = (pixels, channels) if last else (channels, pixels)
    INNER = min(triton.next_power_of_2(inner), 32 if last else 1024)  # 32 channels in half are two sectors of memory
    return Plan(last, outer, inner, min(triton.next_power_of_2(outer), TILE // INNER), INNER)


def merge_tile(chunks: int, per_group: int) -> dict[str, int]:
    """Return the tile of the kernels that merge partial results."""
    CHANNELS = triton.next_power_of_2(per_group)
    return {"CHUNKS": min(triton.next_power_of_2(chunks), max(1024 // CHANNELS, 1)), "CHANNELS": CHANNELS}


def in_layout(x: Tensor) -> tuple[Tensor, bool]:
    """Return x, or a contiguous copy unless it is contiguous or channels-last; and True if it is channels-last."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    (x,) = align(x if last else x.contiguous())
    return x, last


class FusedNorm(torch.autograd.Function):
    """The function `norm.reference` for tensors on a GPU: x (B, C, ...), weight and bias (C,), scale_shift (B, 2C)
    or None."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:
        x, last = in_layout(x)
        y = torch.empty_like(x)
        weight, bias = weight.contiguous(), bias.contiguous()
        scale_shift = None if scale_shift is None else scale_shift.contiguous()
        (B, C), pixels = x.shape[:2], x[0, 0].numel()
        p = plan(C, pixels, last)
        partial = x.new_empty(B, p.chunks, 2, C, dtype=torch.float32)
        mean, rstd = x.new_empty(2, B, groups, dtype=torch.float32)
        tile = _tile(p, x)
        programs = (B * p.blocks[0] * p.blocks[1],)
        sizes = p.outer, p.inner // tile["VECTOR"], *p.blocks
        with torch.cuda.device_of(x):
            moments_kernel[programs](x, partial, *sizes, **tile)
            statistics_kernel[(B * groups,)](
                partial,
                mean,
                rstd,
                pixels,
                p.chunks,
                groups,
                C // groups,
                eps,
                CHUNK=p.chunk,
                **merge_tile(p.chunks, C // groups),
            )
            normalize_kernel[programs](
                x,
                y,
                weight,
                bias,
                scale_shift,
                mean,
                rstd,
                *sizes,
                groups,
                C // groups,
                SCALED=scale_shift is not None,
                SILU=silu,
                **tile,
            )
        ctx.save_for_backward(x, weight, bias, scale_shift, mean, rstd)
        ctx.plan, ctx.groups, ctx.silu = p, groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale_shift, mean, rstd = ctx.saved_tensors
        p, groups = ctx.plan, ctx.groups
        (dy,) = align(dy.contiguous(memory_format=torch.channels_last if p.last else torch.contiguous_format))
        (B, C), pixels = x.shape[:2], x[0, 0].numel()
        dx = torch.empty_like(x)
        partial = x.new_empty(B, p.chunks, 2, C, dtype=torch.float32)
        dparameters = x.new_empty(B, 2, C, dtype=torch.float32)
        dscale_shift = None if scale_shift is None else torch.empty_like(scale_shift)
        means = x.new_empty(B, groups, 2, dtype=torch.float32)
        tile = {**_tile(p, x), "SCALED": scale_shift is not None, "SILU": ctx.silu}
        programs = (B * p.blocks[0] * p.blocks[1],)
        sizes = p.outer, p.inner // tile["VECTOR"], *p.blocks, groups, C // groups
        known = weight, bias, scale_shift
        with torch.cuda.device_of(x):
            gradient_sums_kernel[programs](x, dy, *known, mean, rstd, partial, *sizes, **tile)
            gradient_statistics_kernel[(B * groups,)](
                partial,
                *known,
                dparameters,
                dscale_shift,
                means,
                pixels,
                p.chunks,
                groups,
                C // groups,
                SCALED=scale_shift is not None,
                **merge_tile(p.chunks, C // groups),
            )
            gradient_kernel[programs](x, dy, dx, *known, mean, rstd, means, *sizes, **tile)
        dweight, dbias = dparameters.sum(0)
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale_shift, None, None, None


def _tile(p: Plan, x: Tensor) -> dict[str, int | bool]:
    size = vector(p.inner, x.element_size())
    return {"VECTOR": size, "OUTER": p.OUTER, "INNER": p.INNER, "LAST": p.last, "num_warps": WARPS}
