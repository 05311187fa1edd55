"""The fused norm: Triton against torch, by its interpreter here and on a GPU where there is one; what it compiles to; and
that the U-Net uses it on a GPU and nothing new elsewhere."""

import itertools
import re

import pytest
import torch
from torch import nn

from genai.kernels import norm as kernels
from genai.models.diffusion.nets.unet import UNet
from tests.conftest import compiled_for_gpus, fake_device
from tests.kernels.test_kernels import in_the_interpreter

SHAPES = [
    ((2, 33, 7, 7), 1),
    ((1, 48, 14, 14), 12),
    ((3, 20, 1, 1), 5),
    ((1, 160, 3, 3), 2),
    ((1, 4, 33, 33), 2),
    ((2, 6, 5), 3),
]  # odd, without numbers to spare, of one tile and of several
USES = [(False, False), (False, True), (True, True)]  # scale_shift, silu
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def arguments(shape, groups, dtype, last, scaled, device):
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(shape, generator=generator)
    dy = torch.randn(shape, generator=generator)
    weight, bias = 1 + 0.3 * torch.randn(2, shape[1], generator=generator)
    scale_shift = 0.5 * torch.randn(shape[0], 2 * shape[1], generator=generator)
    tensors = [t.to(device, dtype) for t in (x, dy, weight, bias, scale_shift)]
    if last:
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    return tensors if scaled else [*tensors[:4], None]


def expected(x, dy, weight, bias, scale_shift, groups, silu):
    """Output and gradients by torch, in float64 from the same inputs."""
    x = x.detach().double().requires_grad_()
    scale_shift = None if scale_shift is None else scale_shift.detach().double().requires_grad_()
    norm = nn.GroupNorm(groups, x.shape[1], device=x.device, dtype=torch.float64)
    norm.weight, norm.bias = (nn.Parameter(t.detach().double()) for t in (weight, bias))
    y = kernels.reference(norm, x, scale_shift, silu)
    wanted = [t for t in (x, norm.weight, norm.bias, scale_shift) if t is not None]
    return [y, *torch.autograd.grad(y, wanted, dy.double())]


def check(device):
    from genai.kernels.triton_norm import FusedNorm

    cases = itertools.product((False, True), SHAPES, USES, TOLERANCE)
    for last, (shape, groups), (scaled, silu), dtype in itertools.islice(
        cases, 1, None, 4
    ):  # each pair of choices occurs
        if last and len(shape) < 4:
            continue
        x, dy, weight, bias, scale_shift = arguments(shape, groups, dtype, last, scaled, device)
        inputs = [t if t is None else t.requires_grad_() for t in (x, weight, bias, scale_shift)]
        y = FusedNorm.apply(*inputs, groups, 1e-5, silu)
        found = [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)]
        assert y.dtype == dtype
        assert y.stride() == x.stride() == found[1].stride()
        for got, want in zip(found, expected(x, dy, weight, bias, scale_shift, groups, silu), strict=True):
            summed = (x.numel() / want.numel()) ** 0.5  # whose rounding adds up
            bound = TOLERANCE[dtype] * want.abs().clamp_min(max(want.abs().mean().item(), summed, 1))
            about = (shape, dtype, last, scaled, silu, (got - want).abs().max())
            assert ((got.double() - want).abs() <= bound).all(), about


def check_statistics(device):
    """A mean a thousand times the deviation costs float32's rounding of x and no more; slices and mixed dtypes do."""
    from genai.kernels.triton_norm import FusedNorm

    x = 1000 + torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0)).to(device)
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    want = nn.functional.group_norm(x.double(), 2)
    for given in (x, x.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 1]):
        y = FusedNorm.apply(given, weight, bias, None, 2, 1e-5, False)
        assert (y - want).abs().max() < 2e-4
    y = FusedNorm.apply(x.bfloat16(), weight, bias, torch.zeros(2, 16, device=device).half(), 2, 1e-5, True)
    want = nn.functional.silu(nn.functional.group_norm(x.bfloat16().double(), 2))
    assert y.dtype == torch.bfloat16
    assert (y - want).abs().max() < 3e-2


def check_unet():
    """A U-Net with every norm fused: the same function and gradients, channels-last from end to end."""
    from genai.kernels.triton_norm import in_layout

    net = UNet((1, 4, 4), 8, (1,), 1, (4,), classes=3)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    x, time, label = torch.randn(1, 1, 4, 4), torch.tensor([500.0]), torch.tensor([2])
    found, layouts = [], []
    for fused in (False, True):
        kernels._can_fuse = lambda norm, x, fused=fused: layouts.append(in_layout(x)[1]) or fused
        y = net(x, time, label)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*net.parameters()])])
    assert len(layouts) == 2 * sum(isinstance(m, nn.GroupNorm) for m in net.modules())
    assert all(layouts)
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max().clamp_min(1)


def test_interpreted_triton_is_the_formula():
    in_the_interpreter(
        "import torch; torch.set_num_threads(1); from tests.kernels import test_norm as t; "
        "t.check('cpu'); t.check_statistics('cpu'); t.check_unet()"
    )


@pytest.mark.gpu
def test_triton_is_the_formula():
    check("cuda")
    check_statistics("cuda")


def test_the_formula_is_torchs_where_the_kernels_cannot_run():
    """On a CPU the same bits as ever; on a GPU while it is traced, for doubles and for what holds no numbers."""
    norm, x, emb = nn.GroupNorm(2, 4), torch.randn(2, 4, 3, 3), torch.randn(2, 8)
    scale, shift = emb[:, :, None, None].chunk(2, 1)
    want = nn.functional.silu(torch.addcmul(shift, norm(x), 1 + scale))
    assert torch.equal(kernels.normalize(norm, x, emb, silu=True), want)
    assert torch.equal(kernels.normalize(norm, x), norm(x))
    with fake_device() as traffic:
        norm = nn.GroupNorm(2, 4, device="cuda")
        y = kernels.normalize(norm, torch.empty(2, 4, 3, 3, device="cuda"), torch.empty(2, 8, device="cuda"), silu=True)
        assert y.device.type == "cuda"
    assert not traffic


# What it compiles to

COMPILE = """
import json, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from genai.kernels import triton_norm as module
from genai.kernels.triton_affine_step import vector
wide = ["X", "Y", "DX", "DY"]
whole = [*module._SIZES, "eps"]

def build(name, dtype, capability, channels, last):
    kernel, p = getattr(module, name), module.plan(channels, 256, last)
    size = vector(p.inner, {"fp32": 4, "bf16": 2}[dtype])
    constants = {"VECTOR": size, "OUTER": p.OUTER, "INNER": p.INNER, "LAST": last, "SCALED": True, "SILU": True}
    constants |= {"CHUNK": p.chunk, **module.merge_tile(p.chunks, 4)}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in whole:
            signature[argument] = "fp32" if argument == "eps" else "i32"
        else:
            narrow = argument in (*wide, "SCALE_SHIFT", "DSCALE_SHIFT")
            signature[argument] = f"*{dtype}" if narrow else "*fp32"
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": module.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return built.asm["ptx"], subprocess.run(command, capture_output=True, text=True, check=True).stdout

print(json.dumps([build(*case) for case in json.loads(sys.argv[1])]))
"""
# loads and stores of whole tiles
MOVED = {
    "moments_kernel": (1, 0),
    "normalize_kernel": (1, 1),
    "gradient_sums_kernel": (2, 0),
    "gradient_kernel": (2, 1),
}
CASES = [
    *itertools.product(MOVED, ["bf16"], [80, 90, 100], [128], [True]),
    *itertools.product([*MOVED][1::2], ["fp32"], [90], [128], [True]),
    *itertools.product([*MOVED][2:], ["bf16"], [90], [128], [False]),
    ("normalize_kernel", "bf16", 90, 33, True),
    ("statistics_kernel", "bf16", 90, 128, True),
    ("gradient_statistics_kernel", "bf16", 90, 128, True),
]


@pytest.fixture(scope="module")
def compiled():
    return compiled_for_gpus(COMPILE, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_kernels_move_16_bytes_at_once_and_spill_nothing(compiled, case):
    from genai.kernels.triton_norm import TILE, WARPS

    (name, dtype, _, channels, last), (code, usage) = case, compiled[case]
    assert ".local" not in code
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage  # registers sufficed
    if channels % 8 == 0 and name in MOVED:
        passes = TILE * (4 if dtype == "fp32" else 2) // (WARPS * 32 * 16)  # of a program's threads over a tile
        loads, stores = (len(re.findall(rf"{op}\.global[.\w:]*v4\.b32", code)) for op in ("ld", "st"))
        assert loads >= MOVED[name][0] * passes  # and the numbers of channels
        assert stores == MOVED[name][1] * passes
        if last and dtype == "bf16":
            assert not re.search(r"(ld|st)\.global[.\w:]*b16", code)
