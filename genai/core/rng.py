"""Counter-based noise: Philox 4x32-10 and Box-Muller in plain torch, so that sample i depends on seed i alone.

The layout never changes; every checkpoint and sample file stores `RNG_VERSION`:

    key      the sample's 64-bit seed (low word, high word)
    counter  (block low, block high, row, stream); block = C-order element index within the sample // 4
    words    four uint32 per block make two Box-Muller pairs: (n0, n1) from (w0, w1), (n2, n3) from (w2, w3)

Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RNG_VERSION = 1

# Streams: the starting noise, a step's noise, inpainting's, the uniforms of tokens, and draws inside a model.
INITIAL, STEP, MASK, TOKENS, MODEL = range(5)

_M = 0xD2511F53, 0xCD9E8D57  # multipliers
_W = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_LOW = 0xFFFFFFFF


def philox(key: Sequence[Tensor], counter: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ten rounds of Philox 4x32 for a key (k0, k1) and a counter (c0, c1, c2, c3); returns the words w0 to w3.

    All are int64 with values below 2^32 and broadcast; tensors are on the key's device. A product wraps around in int64
    and so holds all 64 bits: its high word is shifted out, its low word masked only where the upper bits would show.
    Counters that are Python ints stay ints for as long as possible: as tensors, a GPU would wait for each to be copied,
    and a CPU would compute the same word for every element.
    """
    c0, c1, c2, c3 = _rounds(key, counter)
    return c0, c1 & _LOW, c2, c3 & _LOW


def _rounds(key: Sequence[Tensor], counter: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `philox`, but leave bits above the low 32 of w1 and w3."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    shape = torch.broadcast_shapes(*(c.shape for c in (*key, *counter) if isinstance(c, Tensor)))
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _M[0]), _product(c2, _M[1])
        c0, c2 = _mix_words(high1, c1, k0, shape), _mix_words(high0, c3, k1, shape)
        c1, c3 = low1, low0
        k0, k1 = (k0 + _W[0]) & _LOW, (k1 + _W[1]) & _LOW
    return c0, c1, c2, c3  # pyright: ignore[reportReturnType]


def _mix_words(high: Tensor | int, word: Tensor | int, key: Tensor, shape: torch.Size) -> Tensor:
    """Return (high ^ word ^ key) mod 2^32, in the memory of `high` if that has all elements: nothing else holds it."""
    if isinstance(high, Tensor) and high.shape == shape:
        return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_LOW)
    return (key ^ (high ^ word)) & _LOW


def _product(c: Tensor | int, m: int) -> tuple[Tensor | int, Tensor | int]:
    """Return high and low word of c m; the low word of a tensor keeps its upper bits."""
    p = c * m
    return p >> 32, p if isinstance(p, Tensor) else p & _LOW


def _blocks(
    seeds: Tensor, low: Tensor, high: Tensor | int, row: Tensor | int, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of each block in the layout above, int64 (B, blocks) each, in their low 32 bits."""
    key = (seeds & _LOW)[:, None], ((seeds >> 32) & _LOW)[:, None]
    return _rounds(key, (low, high, row, stream))


def _element_blocks(seeds: Tensor, n: int, row: Tensor | int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the words of each sample's first n elements."""
    blocks = torch.arange((n + 3) // 4, device=seeds.device)
    # & _LOW changes no index below 2^32, but Inductor multiplies a bare arange in 32 bits, which Philox's factors overflow
    return _blocks(seeds, blocks & _LOW, blocks >> 32 if n > 4 * _LOW else 0, row, stream)


def words(seeds: Tensor, blocks: Tensor, row: int, stream: int) -> Tensor:
    """Return the four uint32 words of each block, int64 (B, len(blocks), 4); seeds int64 (B,), all 64 bits used."""
    return torch.stack(_blocks(seeds, blocks & _LOW, blocks >> 32, row, stream), -1) & _LOW


def _unit(word: Tensor) -> Tensor:
    """Map a uint32 word (upper bits ignored) to float32 in [0, 1], as Triton's `uint_to_uniform_float` does."""
    signed = word.to(torch.int32)
    # x ^ (x >> 31) is -x - 1 for negative x: the two halves of the range fold onto 0, ..., 2^31 - 1, scaled by 2^-31.
    return signed.bitwise_xor_(signed >> 31).float().mul_(4.6566127342e-10)


def uniform(seeds: Tensor, shape: Sequence[int], row: int = 0, stream: int = MODEL) -> Tensor:
    """Draw float32 uniforms in [0, 1], (B, *shape): one independent field per seed, int64 (B,)."""
    n = math.prod(shape)
    return _unit(torch.stack(_element_blocks(seeds, n, row, stream), -1)).flatten(1)[:, :n].reshape(len(seeds), *shape)


def normal(seeds: Tensor, shape: Sequence[int], row: Tensor | int = 0, stream: int = STEP) -> Tensor:
    """Draw float32 standard normals (B, *shape): one independent field per seed, int64 (B,).

    Box-Muller on consecutive pairs (u, v): sqrt(-2 ln u) cos(2 pi v), then the same with sin.
    """
    n = math.prod(shape)
    u0, v0, u1, v1 = map(_unit, _element_blocks(seeds, n, row, stream))
    # 1e-7 bounds ln u at u = 0, as Triton's kernel does: normals end at 5.7.
    r0, r1 = (u.clamp_min_(1e-7).log_().mul_(-2).sqrt_() for u in (u0, u1))
    a0, a1 = v0.mul_(2 * math.pi), v1.mul_(2 * math.pi)
    pairs = [a0.cos().mul_(r0), a0.sin_().mul_(r0), a1.cos().mul_(r1), a1.sin_().mul_(r1)]
    out = torch.stack(pairs, -1)  # (B, blocks, 4)
    return out.flatten(1)[:, :n].reshape(len(seeds), *shape)


def mix(*keys: int) -> int:
    """Hash integers to one 63-bit seed by a chain of splitmix64 finalisers, so that nearby keys give unrelated
    streams."""
    h = 0
    for key in keys:
        # The increment and the multipliers are those of splitmix64 (Steele et al., 2014).
        h = (h + key + 0x9E3779B97F4A7C15) % 2**64
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
        h ^= h >> 31
    # 63 bits, since torch's int64 seeds have a sign.
    return h >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of one device.

    `torch.manual_seed` would also seed unused back ends, and for each of them format and store a stack trace on every
    call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def seed_range(seed: int, n: int) -> Tensor:
    """Return the seeds of the n samples of one call: seed, seed + 1, ..., int64 (n,)."""
    return torch.arange(n, dtype=torch.int64) + seed
