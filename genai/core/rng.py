"""Counter-based noise: Philox 4x32-10 and Box-Muller in plain torch, so that sample i depends on seed i alone.

The layout is fixed for ever; every checkpoint and sample file stores `RNG_VERSION`:

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

INITIAL, STEP, MASK, TOKENS, MODEL = range(5)  # streams

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_LOW = 0xFFFFFFFF


def _product(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of m * x, m and x < 2^32; the wrapped int64 product holds the right 64 bits."""
    p = m * x
    return (p >> 32) & _LOW, p & _LOW


def philox(key: tuple[Tensor, Tensor], counter: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox 4x32. Words are int64 tensors (or ints) in [0, 2^32) that broadcast against each other."""
    k0, k1 = key
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64, device=k0.device) for c in counter)
    for _ in range(10):
        hi0, lo0 = _product(_M0, c0)
        hi1, lo1 = _product(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(seeds: Tensor, blocks: Tensor, row: int, stream: int) -> Tensor:
    """The four uint32 words of each block, as int64 (B, len(blocks), 4); seeds int64 (B,), all 64 bits used."""
    key = (seeds & _LOW)[:, None], ((seeds >> 32) & _LOW)[:, None]
    return torch.stack(torch.broadcast_tensors(*philox(key, (blocks & _LOW, blocks >> 32, row, stream))), -1)


def _unit(word: Tensor) -> Tensor:
    """uint32 word -> float32 in [0, 1], the formula of Triton's `uint_to_uniform_float`."""
    signed = torch.where(word > 0x7FFFFFFF, word - 2**32, word)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10


def uniform(seeds: Tensor, shape: Sequence[int], row: int = 0, stream: int = MODEL) -> Tensor:
    """float32 uniforms in [0, 1] of shape (B, *shape), one independent field per seed (int64, (B,))."""
    n = math.prod(shape)
    blocks = torch.arange((n + 3) // 4, device=seeds.device)
    return _unit(words(seeds, blocks, row, stream)).flatten(1)[:, :n].reshape(len(seeds), *shape)


def normal(seeds: Tensor, shape: Sequence[int], row: int = 0, stream: int = STEP) -> Tensor:
    """float32 standard normals of shape (B, *shape), one independent field per seed (int64, (B,)).

    Box-Muller on consecutive pairs: sqrt(-2 ln u) cos(2 pi v), then the same with sin.
    """
    n = math.prod(shape)
    blocks = torch.arange((n + 3) // 4, device=seeds.device)
    u, v = _unit(words(seeds, blocks, row, stream).view(len(seeds), -1, 2, 2)).unbind(-1)  # (B, blocks, pair)
    radius = torch.sqrt(-2 * torch.log(u.clamp_min(1e-7)))
    angle = 2 * math.pi * v
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return pairs.flatten(1)[:, :n].reshape(len(seeds), *shape)


def mix(*keys: int) -> int:
    """Hash integers to one 63-bit seed (a chain of splitmix64 finalisers): nearby keys give unrelated streams."""
    h = 0
    for key in keys:
        h = (h + key + 0x9E3779B97F4A7C15) % 2**64
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
        h ^= h >> 31
    return h >> 1


def seed_range(seed: int, n: int) -> Tensor:
    """Seeds of the n samples of one call: seed, seed + 1, ..., as int64 (n,)."""
    return torch.arange(n, dtype=torch.int64) + seed
