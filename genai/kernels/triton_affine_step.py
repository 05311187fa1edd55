"""The affine step as one Triton kernel: every input is read once, every output written once, the noise is made inside.

Arithmetic is float32 whatever the tensors are; offsets are int64. Imported by `affine_step` where it is needed.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program

# pi / 2 in three parts, of which small multiples of the first two are exact in float32
_HALF_PI_1 = tl.constexpr(1.5703125)
_HALF_PI_2 = tl.constexpr(4.837512969970703e-4)
_HALF_PI_3 = tl.constexpr(7.549789954891882e-8)
_TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def cos_sin(angle):
    """Return (cos, sin) of angles in [0, 2 pi], to 2e-7.

    Triton's own functions keep a table in local memory for angles of any size.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - quarter * _HALF_PI_1 - quarter * _HALF_PI_2 - quarter * _HALF_PI_3
    t = r * r
    sin = r + r * t * (-1.6666654611e-1 + t * (8.3321608736e-3 - t * 1.9515295891e-4))
    cos = 1 - 0.5 * t + t * t * (4.166664568298827e-2 + t * (-1.388731625493765e-3 + t * 2.443315711809948e-5))
    k = quarter.to(tl.int32) & 3
    swap = (k & 1) == 1
    c, s = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return tl.where((k == 1) | (k == 2), -c, c), tl.where(k >= 2, -s, s)


@triton.jit
def uniforms(seed, block, row, stream):
    """Return the four uniforms of each block of four elements, in the layout of `genai.core.rng`."""
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + row.to(tl.uint32), zero + stream)
    u0, u1 = tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1)
    return u0, u1, tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3)


@triton.jit
def normals(seed, block, row, stream: tl.constexpr):
    """Return standard normals of the elements of consecutive blocks of four, (4 * len(block),)."""
    u0, v0, u1, v1 = uniforms(seed, block, row, stream)
    # 1e-7 bounds ln u at u = 0, as `core.rng.normal` does.
    r0, r1 = tl.sqrt(-2 * tl.log(tl.maximum(u0, 1e-7))), tl.sqrt(-2 * tl.log(tl.maximum(u1, 1e-7)))
    c0, s0 = cos_sin(v0 * _TWO_PI)
    c1, s1 = cos_sin(v1 * _TWO_PI)
    pairs = tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1))  # (blocks, pair, cos or sin)
    return tl.reshape(pairs, [4 * block.shape[0]])


@triton.jit
def first_element(sample, n):
    """Return the offset of a sample's first element; int64, since a batch may hold more than 2^31 elements."""
    return sample.to(tl.int64) * n


@triton.jit(do_not_specialize=["row"], do_not_specialize_on_alignment=["SEEDS"])
def affine_step_kernel(
    X,
    OUT,
    OUT_UNCOND,
    X0_PREV,
    X_BASE,
    KNOWN,
    MASK,
    SEEDS,
    Y,
    X0,
    n_vectors,
    chunks,
    w,
    p,
    q,
    clip,
    a,
    b,
    c,
    d,
    s,
    alpha,
    sigma,
    row,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    GUIDED: tl.constexpr,
    CLIPPED: tl.constexpr,
    PREV: tl.constexpr,
    BASE: tl.constexpr,
    NOISY: tl.constexpr,
    INPAINT: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Compute BLOCK elements of one sample per program; a sample takes `chunks` programs.

    A sample has n_vectors * VECTOR elements, so that Triton knows what divides their number and moves VECTOR of them at
    once.
    """
    n = n_vectors * VECTOR
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    inside = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = first_element(sample, n) + inside
    valid = inside < n
    x = tl.load(X + at, valid).to(tl.float32)
    out = tl.load(OUT + at, valid).to(tl.float32)
    if GUIDED:
        uncond = tl.load(OUT_UNCOND + at, valid).to(tl.float32)
        out = uncond + w * (out - uncond)
    x0 = p * x + q * out
    if CLIPPED:
        x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    y = a * x + b * x0
    if PREV:
        y += c * tl.load(X0_PREV + at, valid).to(tl.float32)
    if BASE:
        y += d * tl.load(X_BASE + at, valid).to(tl.float32)
    block = chunk.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    if NOISY:  # noqa: SIM102 (this is decided when compiled, s while running)
        if s != 0.0:
            y += s * normals(tl.load(SEEDS + sample), block, row, 1)
    if INPAINT:
        known = alpha * tl.load(KNOWN + at, valid).to(tl.float32)
        if sigma != 0.0:
            known += sigma * normals(tl.load(SEEDS + sample), block, row, 2)
        mask = tl.load(MASK + at, valid).to(tl.float32)
        y = mask * known + (1 - mask) * y
    tl.store(Y + at, y.to(Y.dtype.element_ty), valid)
    if KEEP:
        tl.store(X0 + at, x0.to(X0.dtype.element_ty), valid)


def vector(n: int, itemsize: int) -> int:
    """Return how many elements of a sample of n are moved at once: 16 bytes of them if that divides n, else one."""
    return 16 // itemsize if n * itemsize % 16 == 0 else 1


def align(*tensors: Tensor | None) -> list:
    """The tensors, copied where their first element is not at a multiple of 16 bytes.

    Triton compiles anew for such an address, also while a graph is captured, which must not happen then.
    """
    return [t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in tensors]


def launch(
    x: Tensor,
    out: Tensor,
    out_uncond: Tensor | None,
    x0_prev: Tensor | None,
    x_base: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    seeds: Tensor,
    row: int,
    k: Sequence[float],
    clip: float | None,
    noisy: bool,
    keep_x0: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `affine_step.reference`; tensors are float32, float16 or bfloat16, and contiguous."""
    y, x0 = torch.empty_like(x), torch.empty_like(x) if keep_x0 else x.new_empty(0)
    if x.numel() == 0:
        return y, x0
    n = x[0].numel()
    chunks, size = triton.cdiv(n, BLOCK), vector(n, x.element_size())
    w, p, q, a, b, c, d, s, alpha, sigma = map(float, k)  # for a whole number would be compiled in
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of x
        affine_step_kernel[(len(x) * chunks,)](
            *align(x, out, out_uncond, x0_prev, x_base, known, mask),
            seeds,
            y,
            x0,
            n // size,
            chunks,
            w,
            p,
            q,
            clip or 0.0,
            a,
            b,
            c,
            d,
            s,
            alpha,
            sigma,
            row,
            VECTOR=size,
            BLOCK=BLOCK,
            GUIDED=out_uncond is not None,
            CLIPPED=clip is not None,
            PREV=x0_prev is not None,
            BASE=x_base is not None,
            NOISY=noisy,
            INPAINT=mask is not None,
            KEEP=keep_x0,
        )
    return y, x0
