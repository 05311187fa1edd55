"""The noise layout, fixed for ever: published vectors, Triton's integers, independence of all but the seed."""

import os
import subprocess
import sys

import pytest
import torch

from genai.core import rng
from tests.conftest import ROOT, fake_device

ONES = 0xFFFFFFFF


def words(key, counter):
    k = tuple(torch.tensor(x) for x in key)
    return [int(w) for w in rng.philox(k, counter)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert words(key, counter) == list(expected)


def test_layout_of_key_and_counter():
    seed = 0x0123456789ABCDEF
    seeds = torch.tensor([seed])
    block, row, stream = (5 << 32) + 7, 11, rng.TOKENS
    got = rng.words(seeds, torch.tensor([block]), row, stream)[0, 0].tolist()
    assert got == words((seed & ONES, seed >> 32), (7, 5, row, stream))


def test_a_seed_with_bit_63_set_uses_its_high_word():
    seeds = torch.tensor([-2, 2**63 - 2])
    noise = rng.normal(seeds, (8,))
    assert not torch.equal(noise[0], noise[1])


def test_normals_are_box_muller_pairs_of_a_block():
    seeds = torch.tensor([3])
    w = rng.words(seeds, torch.arange(1), 2, rng.STEP)[0, 0]
    u = [(int(x) if x < 2**31 else 2**32 - 1 - int(x)) * 4.6566127342e-10 for x in w]
    expected = []
    for a, b in (u[:2], u[2:]):
        r = (-2 * torch.tensor(a).log()).sqrt()
        expected += [r * torch.cos(torch.tensor(2 * torch.pi * b)), r * torch.sin(torch.tensor(2 * torch.pi * b))]
    assert torch.allclose(rng.normal(seeds, (4,), row=2)[0], torch.stack(expected), atol=1e-5)


def test_a_sample_depends_on_its_seed_alone():
    alone = rng.normal(torch.tensor([9]), (3, 5, 7), row=4)
    batch = rng.normal(torch.tensor([1, 9, 2, 9]), (3, 5, 7), row=4)
    assert torch.equal(batch[1], alone[0])
    assert torch.equal(batch[3], alone[0])
    assert not torch.equal(batch[0], alone[0])


def test_elements_are_numbered_in_c_order_whatever_the_shape():
    flat = rng.normal(torch.tensor([5]), (30,))
    assert torch.equal(rng.normal(torch.tensor([5]), (2, 3, 5)).flatten(), flat.flatten())
    assert torch.equal(rng.normal(torch.tensor([5]), (7,))[0], flat[0, :7])


def test_moments_and_independence():
    x = rng.normal(rng.seed_range(0, 256), (8192,), row=1).double()
    assert abs(x.mean().item()) < 0.01
    assert abs(x.var().item() - 1) < 0.01
    assert abs((x**4).mean().item() - 3) < 0.02
    correlation = torch.corrcoef(x[:8])
    assert (correlation - torch.eye(8)).abs().max() < 0.08
    rows = torch.stack([rng.normal(torch.tensor([0]), (4096,), row=r, stream=s)[0] for r in range(3) for s in range(3)])
    assert (torch.corrcoef(rows) - torch.eye(9)).abs().max() < 0.08


def test_draws_on_a_gpu_neither_copy_from_the_host_nor_wait():
    with fake_device() as traffic:
        seeds = torch.empty(3, dtype=torch.int64, device="cuda")
        row = torch.empty((), dtype=torch.int64, device="cuda")
        blocks = torch.arange(5, device="cuda")
        drawn = [rng.normal(seeds, (2, 3), 4), rng.normal(seeds, (2, 3), row), rng.uniform(seeds, (5,), 1, rng.TOKENS)]
        drawn.append(rng.words(seeds, blocks, 7, rng.MODEL))
    assert all(t.device.type == "cuda" for t in drawn)
    assert not traffic


def test_integers_and_uniforms_equal_tritons_and_normals_to_1e_6(tmp_path):
    """In a process of its own, because the interpreter has to be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    script = """
import torch, triton, triton.language as tl
from genai.core import rng
@triton.jit
def kernel(seed, row, stream, W, U, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c0 = i.to(tl.uint32); z = c0 * 0
    a, b, c, d = tl.philox(tl.load(seed), c0, z, z + row, z + stream)
    ua = tl.uint_to_uniform_float(a); ub = tl.uint_to_uniform_float(b)
    uc = tl.uint_to_uniform_float(c); ud = tl.uint_to_uniform_float(d)
    n0, n1 = tl.pair_uniform_to_normal(ua, ub)
    n2, n3 = tl.pair_uniform_to_normal(uc, ud)
    tl.store(W + 4*i, a.to(tl.int64)); tl.store(W + 4*i + 1, b.to(tl.int64))
    tl.store(W + 4*i + 2, c.to(tl.int64)); tl.store(W + 4*i + 3, d.to(tl.int64))
    tl.store(U + 4*i, ua); tl.store(U + 4*i + 1, ub); tl.store(U + 4*i + 2, uc); tl.store(U + 4*i + 3, ud)
    tl.store(N + 4*i, n0); tl.store(N + 4*i + 1, n1); tl.store(N + 4*i + 2, n2); tl.store(N + 4*i + 3, n3)
for seed in (0, 123456789012345, -7):
    B = 1024
    W = torch.empty(4*B, dtype=torch.int64); U = torch.empty(4*B); N = torch.empty(4*B)
    kernel[(1,)](torch.tensor([seed]), 3, 1, W, U, N, BLOCK=B)
    s = torch.tensor([seed])
    assert torch.equal(rng.words(s, torch.arange(B), 3, 1).flatten(), W & 0xFFFFFFFF)
    assert torch.equal(rng.uniform(s, (4*B,), 3, 1)[0], U)
    assert (rng.normal(s, (4*B,), 3, 1)[0] - N).abs().max() < 1e-6
print("equal")
"""
    path = tmp_path / "kernel.py"
    path.write_text(script)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(path)], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_mix_separates_neighbouring_keys():
    seeds = {rng.mix(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= s < 2**63 for s in seeds)
    assert rng.mix(1, 2) != rng.mix(2, 1)
