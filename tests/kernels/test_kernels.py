"""The fused step: Triton against the formula, by its interpreter here and on a GPU where there is one; and what it
compiles to, which needs no GPU."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Prediction
from genai.kernels import affine_step as kernels
from genai.kernels.affine_step import Row, affine_step
from tests.conftest import ROOT, compiled_for_gpus, fake_device

SHAPES = [(3, 2, 5), (2, 3, 8, 8), (1, 1), (2, 1031), (2, 4, 520)]  # odd ones, one block and several
ROWS = {
    "first order": Row(0.5, 0.3),
    "noisy": Row(0.5, 0.3, 0.2),
    "multistep": Row(0.5, 0.3, 0.0, -0.1),
    "two-stage": Row(0.5, 0.3, 0.0, -0.1, 0.4),
    "all": Row(0.5, 0.3, 0.2, -0.1, 0.4, 0.8, 0.6),
    "last": Row(0.0, 1.0),
}
# guided, clip, inpaint, keep_x0: each pair of choices of two of them occurs
SETTINGS = [
    (False, None, False, False),
    (False, 0.7, True, True),
    (True, None, True, True),
    (True, 0.7, False, True),
    (True, 0.7, True, False),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative; the halves' own rounding


def arguments(shape, dtype, row, guided, clip, inpaint, keep_x0, device):
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(6, *shape, generator=generator).to(device, dtype)
    x, out, uncond, x0_prev, x_base, known = tensors.unbind()
    prediction = Prediction(out, uncond if guided else None, 1.7, 1.3, -0.7)
    options = {"seeds": rng.seed_range(2**40, shape[0]).to(device), "index": 6, "clip": clip, "keep_x0": keep_x0}
    options["x0_prev"] = x0_prev if row.c else None
    options["x_base"] = x_base if row.d else None
    if inpaint:
        options["known"], options["mask"] = known, (x > 0).to(dtype)
    return (x, prediction, row), options


def formula(x, prediction, row, *, seeds, index, clip, keep_x0, x0_prev=None, x_base=None, known=None, mask=None):
    """What affine_step promises, in float64 from the same inputs."""
    z = [rng.normal(seeds, x.shape[1:], index, stream).double() for stream in (rng.STEP, rng.MASK)]
    x, x0_prev, x_base, known, mask = (t if t is None else t.double() for t in (x, x0_prev, x_base, known, mask))
    out, uncond, w, p, q = prediction
    out = out.double() if uncond is None else uncond.double() + w * (out.double() - uncond.double())
    x0 = p * x + q * out
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    y = row.a * x + row.b * x0 + row.s * z[0]
    y = y if x0_prev is None else y + row.c * x0_prev
    y = y if x_base is None else y + row.d * x_base
    if mask is not None:
        y = mask * (row.alpha * known + row.sigma * z[1]) + (1 - mask) * y
    return y, x0


def check(impl, device):
    """Every row kind, dtype, size and setting of one implementation; each two of them in Triton's interpreter, which is slow."""
    settings = SETTINGS if (impl, device) != ("triton", "cpu") else []
    for k, (shape, row, dtype) in enumerate(itertools.product(SHAPES, ROWS.values(), TOLERANCE)):
        for guided, clip, inpaint, keep in (settings if dtype == torch.float32 else []) or [
            SETTINGS[k % len(SETTINGS)]
        ]:
            args, options = arguments(shape, dtype, row, guided, clip, inpaint, keep, device)
            kept = [t.clone() for t in (args[0], args[1].out)]
            y, x0 = affine_step(*args, impl=impl, **options)
            expected, expected_x0 = formula(*args, **options)
            assert y.dtype == dtype
            assert torch.equal(kept[0], args[0])
            assert torch.equal(kept[1], args[1].out)
            about = (dtype, shape, row, guided, clip, inpaint, keep)
            for got, want in [(y, expected), (x0, expected_x0)][: 1 + keep]:
                bound = TOLERANCE[dtype] * want.abs().clamp_min(1)
                assert ((got.double() - want).abs() <= bound).all(), (about, (got.double() - want).abs().max())


def layouts(t):
    """The same numbers under other strides: channels last, every second element of a larger tensor, one not at its start."""
    last = t.to(memory_format=torch.channels_last)
    every_second = torch.stack([t, t], -1).flatten(-2)[..., ::2]
    return [t, last, every_second, torch.cat([t[:1], t])[1:]]


def check_layouts(impl, device):
    """Neither the layout of a tensor nor that of the seeds changes a number, and what is returned is contiguous."""
    (x, prediction, row), options = arguments((3, 2, 3, 3), torch.float32, ROWS["all"], True, 0.7, True, True, device)
    want = formula(x, prediction, row, **options)
    tensors = [x, prediction.out, prediction.out_uncond, *(options[k] for k in ("x0_prev", "x_base", "known", "mask"))]
    for k in range(4):
        x, out, uncond, *others = (layouts(t)[(k + i) % 4] for i, t in enumerate(tensors))  # mixed
        given = {**options, **dict(zip(("x0_prev", "x_base", "known", "mask"), others, strict=True))}
        got = affine_step(x, prediction._replace(out=out, out_uncond=uncond), row, impl=impl, **given)
        assert all(t.is_contiguous() and (t - w).abs().max() < 1e-5 for t, w in zip(got, want, strict=True)), k
    (x, prediction, row), options = arguments((3, 2, 3, 3), torch.float32, ROWS["all"], False, None, True, True, device)
    many = torch.tensor([5, 6, 7, 8, 9, 10], device=device)
    for seeds in (many[::2], many[1:4], many[:1].expand(3), torch.stack([many, many], 1)[:3, 1]):
        want, _ = formula(x, prediction, row, **{**options, "seeds": seeds.clone()})
        got, _ = affine_step(x, prediction, row, impl=impl, **{**options, "seeds": seeds})
        assert (got - want).abs().max() < 1e-5, seeds


def check_refusals(impl, device):
    """One sentence for what no implementation may guess."""
    x, seeds = torch.randn(2, 3, device=device), rng.seed_range(0, 2).to(device)
    for message, row, given in (
        ("mask was given without known", ROWS["last"], {"mask": x}),
        ("known was given without mask", ROWS["last"], {"known": x}),
        ("x0_prev was not given, but the row's factor of it is c=-0.1, not 0", ROWS["multistep"], {}),
        ("x_base was not given", ROWS["two-stage"], {"x0_prev": x}),
        ("seeds is int32", ROWS["noisy"], {"seeds": seeds.int()}),
        (r"seeds is int64 \[1\].*one seed a sample is needed, int64 \[2\] on", ROWS["noisy"], {"seeds": seeds[:1]}),
        (r"seeds is int64 \[2, 1\]", ROWS["noisy"], {"seeds": seeds[:, None]}),
        ("seeds is int64 .* on meta", ROWS["noisy"], {"seeds": seeds.to("meta")}),
    ):
        with pytest.raises(UserError, match=message):
            affine_step(x, Prediction(x), row, **{"seeds": seeds, "index": 0, "impl": impl, **given})


def in_the_interpreter(script):
    """Run `script` in a process of its own, because the interpreter has to be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torch_is_the_formula():
    check("torch", "cpu")
    check_layouts("torch", "cpu")
    check_refusals("torch", "cpu")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiled_torch_is_the_formula():
    setting = (True, 0.7, True, True)
    torch._dynamo.reset()  # other tests compile in this process too
    torch._dynamo.utils.counters.clear()
    for row in (ROWS["all"], Row(0.6, 0.2, 0.1, 0.3, -0.2, 0.9, 0.1)):  # one compilation serves both
        args, options = arguments((2, 3, 8, 8), torch.float32, row, *setting, "cpu")
        y, x0 = affine_step(*args, impl="compiled", **options)
        expected, expected_x0 = formula(*args, **options)
        assert (y - expected).abs().max() < 5e-6
        assert (x0 - expected_x0).abs().max() < 5e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiled_noise_multiplies_no_index():
    """For a GPU Inductor writes indices in 32 bits, where Philox's factors do not fit; the C++ shows the same expressions."""
    (_, prediction, row), options = arguments(
        (2, 3, 8, 8), torch.float32, ROWS["noisy"], False, None, False, False, "cpu"
    )
    x, k = prediction.out, torch.tensor([*prediction[2:], row.a, row.b, row.c, row.d, row.s, row.alpha, row.sigma])

    def step(x, index, k):
        return kernels.reference(x, x, None, None, None, None, None, options["seeds"], index, k, None, True, False)

    _, codes = run_and_get_code(torch.compile(step), x, torch.tensor(3), k)
    assert "3528531795" in codes[0]
    assert not re.search(r"\d{10}L*\)?\s*\*\s*\(*(?:static_cast<\w+>\()?x\d", codes[0])


def test_steps_are_compiled_where_that_pays():
    large, small = torch.empty(8, 3, 256, 256), torch.empty(16, 1, 8, 8)
    found = "compiled" if shutil.which("g++") else "auto"
    assert kernels.choose_impl(large, 1000, True) == found
    assert kernels.choose_impl(large, 10, True) == kernels.choose_impl(small, 1000, True) == "auto"
    assert kernels.choose_impl(large, 1000, False) == kernels.choose_impl(large.to("meta"), 1000, True) == "auto"


def test_a_step_that_cannot_be_compiled_says_why(tmp_path):
    script = """
import torch, warnings
from genai.kernels import affine_step as module
from genai.kernels.affine_step import Row, affine_step
from genai.core.protocols import Prediction
x, compiled, tried = torch.ones(1, 2), module._compile(), []
module._compile = lambda: lambda *args: (tried.append(1), compiled(*args))[1]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        y, _ = affine_step(x, Prediction(x), Row(0.5, 0.5), seeds=torch.zeros(1, dtype=torch.long), index=0, impl="compiled")
assert y.tolist() == [[1.0, 1.0]], y
assert [str(w.message) for w in said if "diffusion" in str(w.message)][0].startswith("diffusion steps are not compiled: ")
assert len(tried) == 1  # each try takes seconds
"""
    environment = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_interpreted_triton_is_the_formula():
    in_the_interpreter(
        "import torch; torch.set_num_threads(1); from tests.kernels import test_kernels as t; t.check('triton', 'cpu'); "
        "t.check_layouts('triton', 'cpu'); t.check_refusals('triton', 'cpu'); t.check_triton_has_no_gradient('cpu')"
    )


@pytest.mark.gpu
def test_compiled_torch_is_the_formula_on_a_gpu():
    for row in ROWS.values():
        args, options = arguments((2, 3, 8, 8), torch.float32, row, True, 0.7, True, True, "cuda")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "diffusion steps")
            y, x0 = affine_step(*args, impl="compiled", **options)
        expected, expected_x0 = formula(*args, **options)
        assert (y - expected).abs().max() < 5e-6
        assert (x0 - expected_x0).abs().max() < 5e-6


@pytest.mark.gpu
def test_triton_is_the_formula():
    check("triton", "cuda")
    check_layouts("triton", "cuda")
    check_refusals("triton", "cuda")
    check_triton_has_no_gradient("cuda")


def check_triton_has_no_gradient(device):
    x, seeds = torch.randn(2, 3, device=device), rng.seed_range(0, 2).to(device)
    out = x.clone().requires_grad_()
    with pytest.raises(UserError, match="impl=triton has no gradient"):
        affine_step(x, Prediction(out), ROWS["last"], seeds=seeds, index=0, impl="triton")
    with torch.no_grad():
        affine_step(x, Prediction(out), ROWS["last"], seeds=seeds, index=0, impl="triton")
    y, _ = affine_step(x, Prediction(out), Row(0.5, 0.3), seeds=seeds, index=0, impl="auto")
    (gradient,) = torch.autograd.grad(y.sum(), out)
    assert torch.allclose(gradient, torch.full_like(out, 0.3))


def test_a_step_is_differentiated_right():
    (x, prediction, row), options = arguments((2, 1, 3), torch.float64, ROWS["all"], True, 0.7, True, True, "cpu")
    tensors = [x, prediction.out, prediction.out_uncond, *(options.pop(k) for k in ("x0_prev", "x_base", "known"))]

    def step(x, out, uncond, x0_prev, x_base, known):
        given = prediction._replace(out=out, out_uncond=uncond)
        return affine_step(x, given, row, x0_prev=x0_prev, x_base=x_base, known=known, **options)

    inputs = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(step, inputs)

    def last(out):
        return affine_step(x, Prediction(out, p=1.3, q=-0.7), ROWS["last"], seeds=options["seeds"], index=0)[0].sum()

    (gradient,) = torch.autograd.grad(torch.compile(last, backend="eager")(inputs[1]), inputs[1])
    assert torch.allclose(gradient, torch.full_like(gradient, -0.7))


NOISE = """
import torch, triton, triton.language as tl
from genai.core import rng
from genai.kernels.triton_affine_step import normals, uniforms
@triton.jit
def draw(seed, row, stream: tl.constexpr, U, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    u0, u1, u2, u3 = uniforms(tl.load(seed), i.to(tl.int64), row, stream)
    tl.store(U + 4*i, u0); tl.store(U + 4*i + 1, u1); tl.store(U + 4*i + 2, u2); tl.store(U + 4*i + 3, u3)
    tl.store(N + tl.arange(0, 4*BLOCK), normals(tl.load(seed), i.to(tl.int64), row, stream))
for value in (0, 123456789012345, -7):
    for stream in (1, 2):
        B, seed = 8192, torch.tensor([value], device=DEVICE)
        U, N = torch.empty(4*B, device=DEVICE), torch.empty(4*B, device=DEVICE)
        draw[(1,)](seed, 999, stream, U, N, BLOCK=B)
        assert torch.equal(rng.uniform(seed, (4*B,), 999, stream)[0], U)  # the integers', one to one in 24 bits
        error = (rng.normal(seed, (4*B,), 999, stream)[0] - N).abs().max().item()
        assert error < 1e-6, error
print("equal")
"""


def test_interpreted_noise_is_that_of_torch(tmp_path):
    path = tmp_path / "noise.py"  # Triton reads its kernels from a file
    path.write_text("DEVICE = 'cpu'\n" + NOISE)
    assert in_the_interpreter(f"import runpy; runpy.run_path({str(path)!r})").strip() == "equal"


@pytest.mark.gpu
def test_noise_is_that_of_torch(tmp_path):
    path = tmp_path / "noise.py"
    path.write_text("DEVICE = 'cuda'\n" + NOISE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=400)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


FAR = """
import torch, triton, triton.language as tl
from genai.kernels.triton_affine_step import first_element
@triton.jit
def far(n, OFFSET):
    tl.store(OFFSET + tl.program_id(0), first_element(tl.program_id(0), n))
offset = torch.empty(5, dtype=torch.int64)
far[(5,)](2**30, offset)
assert offset.tolist() == [k * 2**30 for k in range(5)], offset
print("equal")
"""


def test_offsets_pass_2_to_the_31(tmp_path):
    """The function that every load and store of the kernel goes through, at samples that lie far behind."""
    path = tmp_path / "far.py"
    path.write_text(FAR)
    assert in_the_interpreter(f"import runpy; runpy.run_path({str(path)!r})").strip() == "equal"


# The door


def test_the_operator_passes_torchs_own_checks_and_compiles_and_exports():
    x, out = torch.randn(2, 3, 2, 3, 3)
    k = [1.0, 1.3, -0.7, 0.5, 0.3, 0.0, 0.4, 0.2, 1.0, 0.0]
    many = rng.seed_range(0, 6)
    for x_, out_, seeds in zip(
        layouts(x), [out, out, *layouts(out)[1:3]], [many[:3], many[::2], many[:1].expand(3), many[3:]], strict=True
    ):
        given = (x_, out_, None, None, out, None, None, seeds, 6, k, 1.0, True, True)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(torch.ops.genai.affine_step.default, given, test_utils=tests)

    class Step(torch.nn.Module):
        def forward(self, x, out):
            prediction = Prediction(out, p=1.3, q=-0.7)
            seeds = torch.arange(6)[::2]
            return affine_step(x, prediction, ROWS["noisy"], seeds=seeds, index=2, clip=1.0, keep_x0=True)

    x = x.to(memory_format=torch.channels_last)  # and out is not: the strides promised must be those that come
    expected = Step()(x, out)
    for run in (torch.compile(Step(), backend="eager", fullgraph=True), torch.export.export(Step(), (x, out)).module()):
        assert all(torch.equal(a, b) for a, b in zip(run(x, out), expected, strict=True))


def test_layouts_are_those_of_the_samples():
    """Noise is numbered in C order whatever the memory format, and a channels-last state gives the same numbers."""
    args, options = arguments((2, 3, 8, 8), torch.float32, ROWS["all"], True, 0.7, True, True, "cpu")
    plain = affine_step(*args, **options)
    last = {"memory_format": torch.channels_last}
    x, prediction, row = args
    prediction = prediction._replace(out=prediction.out.to(**last))
    options = {k: v.to(**last) if isinstance(v, torch.Tensor) and v.ndim == 4 else v for k, v in options.items()}
    for got, want in zip(affine_step(x.to(**last), prediction, row, **options), plain, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_tensors_that_do_not_fit_are_refused():
    x, seeds = torch.randn(2, 3), rng.seed_range(0, 2)
    for out in (torch.randn(2, 4), torch.randn(2, 3).double(), torch.randn(2, 3, device="meta")):
        with pytest.raises(UserError, match=r"out is float.* but the state of the sampler is float32 \[2, 3\] on cpu"):
            affine_step(x, Prediction(out), ROWS["last"], seeds=seeds, index=0)
    with pytest.raises(UserError, match="x_base is float32"):
        affine_step(x, Prediction(x), ROWS["last"], seeds=seeds, index=0, x_base=x[:1])


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, seeds = torch.randn(2, 3), rng.seed_range(0, 2)
    with pytest.raises(UserError, match="impl=triton cannot run here: it needs a GPU, and this is on cpu"):
        affine_step(x, Prediction(x), ROWS["last"], seeds=seeds, index=0, impl="triton")
    with pytest.raises(UserError, match="it takes float32, float16 and bfloat16, and this is float64"):
        affine_step(x.double(), Prediction(x.double()), ROWS["last"], seeds=seeds, index=0, impl="triton")
    assert "float64" in kernels.triton_obstacle(x.double())


# On a GPU, without one


@pytest.fixture
def launched(monkeypatch):
    """What the kernel is launched with: (what is compiled for it, the current device) of each launch."""
    kernel = pytest.importorskip("genai.kernels.triton_affine_step", reason="Triton exists for Linux only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    jitted, device, seen = kernel.affine_step_kernel, [0], []
    specialized = create_function_from_signature(
        jitted.signature, jitted.params, make_backend(GPUTarget("cuda", 90, 32))
    )

    def exchange(index):
        before, device[0] = device[0], index if index >= 0 else device[0]
        return before

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((specialized(*args, **options)[1], device[0]))

    monkeypatch.setattr(kernel, "affine_step_kernel", Recorder())
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return kernel.launch, seen


K = [1.0, 1.3, -0.7, 0.5, 0.3, 0.0, 0.4, 0.2, 1.0, 0.0]


def test_no_address_compiles_the_kernel_anew(launched):
    """For a graph is captured with copies of the tensors, and what is compiled while it is captured ends that."""
    launch, seen = launched
    x, many = torch.zeros(4, 8), rng.seed_range(0, 9)
    odd = torch.zeros(33)[1:].reshape(4, 8)
    for given, seeds in itertools.product((x, odd), (many[:4], many[1:5])):
        launch(x, given, None, None, None, given, given, seeds, 3, K, 1.0, True, False)
    assert len({str(key) for key, _ in seen}) == 1


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_step_on_a_gpu_runs_on_the_device_of_its_tensors_and_never_waits(launched):
    _, seen = launched
    with fake_device() as traffic:
        for index, impl in ((0, "triton"), (1, "triton"), (1, "torch"), (1, "auto")):
            x = torch.empty(3, 2, 5, device=f"cuda:{index}")
            seeds = torch.empty(6, dtype=torch.int64, device=x.device)[::2]
            given = {"seeds": seeds, "index": 2, "x0_prev": x, "x_base": x, "known": x, "mask": x, "keep_x0": True}
            y, x0 = affine_step(x, Prediction(x, x, 2.0, 1.3, -0.7), ROWS["all"], clip=1.0, impl=impl, **given)
            assert y.device == x0.device == x.device
    assert [device for _, device in seen] == [0, 1]  # the last goes through the operator
    assert not traffic


def test_a_graph_is_captured_on_the_device_of_its_inputs(launched, monkeypatch):
    from genai.core import cuda_graph

    captured = []

    class Graph:
        def replay(self): ...

    @contextlib.contextmanager
    def graph(_, stream, capture_error_mode):
        captured.append((stream, torch.cuda._exchange_device(-1)))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    cuda_graph._stream.cache_clear()
    with fake_device():
        for index in (0, 1, 1):
            x = torch.empty(2, device=f"cuda:{index}")
            out = cuda_graph.capture(lambda inputs: inputs["x"] + 1, {"x": x})({"x": x})
            assert out.device == x.device
    cuda_graph._stream.cache_clear()
    assert captured == [("stream of cuda:0", 0), ("stream of cuda:1", 1), ("stream of cuda:1", 1)]
    assert torch.cuda._exchange_device(-1) == 0


# What it compiles to

COMPILE = """
import json, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from genai.kernels.triton_affine_step import BLOCK, vector, affine_step_kernel as kernel
tensors = ["X", "OUT", "OUT_UNCOND", "X0_PREV", "X_BASE", "KNOWN", "MASK", "SEEDS", "Y", "X0"]
flags = ["GUIDED", "CLIPPED", "PREV", "BASE", "NOISY", "INPAINT", "KEEP"]
needs = {"OUT_UNCOND": "GUIDED", "X0_PREV": "PREV", "X_BASE": "BASE", "KNOWN": "INPAINT", "MASK": "INPAINT"}

def build(dtype, capability, size, features):
    size = size or vector(1024, {"fp32": 4, "bf16": 2}[dtype])
    signature, constants = {}, {"VECTOR": size, "BLOCK": BLOCK, **{flag: flag in features for flag in flags}}
    for name in kernel.arg_names:
        if name in constants or (name in needs and needs[name] not in features):
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name in tensors:
            signature[name] = "*i64" if name == "SEEDS" else f"*{dtype}"
        else:
            signature[name] = "i32" if name in ("n_vectors", "chunks", "row") else "fp32"
    names = enumerate(kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names
               if name in tensors and name not in constants and name != "SEEDS"}
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return built.asm["ptx"], subprocess.run(command, capture_output=True, text=True, check=True).stdout

print(json.dumps([build(*case) for case in json.loads(sys.argv[1])]))
"""
INPUTS = {"GUIDED": 1, "PREV": 1, "BASE": 1, "INPAINT": 2}


CASES = [
    *itertools.product(
        ["fp32", "bf16"],
        [80, 90, 100],
        [None],
        [("CLIPPED",), ("GUIDED", "CLIPPED", "PREV", "BASE", "NOISY", "INPAINT", "KEEP")],
    ),
    ("fp32", 90, 1, ("CLIPPED",)),
]


@pytest.fixture(scope="module")
def compiled():
    return compiled_for_gpus(COMPILE, CASES)


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_compiled_kernel_moves_16_bytes_at_once_and_spills_nothing(compiled, case):
    (dtype, _, _, features), (code, usage) = case, compiled[case]
    loads = re.findall(r"ld\.global[.\w:]*", code)
    stores = re.findall(r"st\.global[.\w:]*", code)
    wide = [load for load in loads if load.endswith("v4.b32")]
    inputs, outputs = 2 + sum(INPUTS.get(f, 0) for f in features), 1 + ("KEEP" in features)
    passes = 1024 * (4 if dtype == "fp32" else 2) // (128 * 16)  # of the 128 threads over the block
    assert len(wide) == inputs * passes  # one load per input element
    assert set(loads) - set(wide) <= {"ld.global.b64"}  # the seed
    assert stores == ["st.global.v4.b32"] * (outputs * passes)
    assert ".local" not in code
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage  # registers sufficed


def test_sizes_that_16_bytes_do_not_divide_take_the_masked_variant(compiled):
    code, _ = compiled[CASES[-1]]
    assert "v4.b32" not in code
    assert re.search(r"@%p\d+ ld\.global\.b32", code)
