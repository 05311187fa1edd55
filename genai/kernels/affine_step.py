"""The per-step update shared by every diffusion sampler: affine in tensors, with scalar coefficients per step.

Four implementations compute the same: `reference` (the formula), `_torch` (in place, fewer passes), Inductor, and
Triton (one pass over memory). `affine_step` checks the arguments and picks one.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Prediction

Impl = Literal["auto", "triton", "torch", "compiled"]

# Measured on one core by benchmarks/step.py: seconds that a compiled step saves per element, without and with noise, and
# seconds that compiling takes.
SAVED_SECONDS, SAVED_SECONDS_NOISY, COMPILE_SECONDS = 0.7e-9, 30e-9, 20.0


class Row(NamedTuple):
    """The coefficients of a step x' = a x + b x0 + c x0_prev + d x_base + s z, and of its target x' ~ N(alpha x0,
    sigma^2)."""

    a: float = 0.0
    b: float = 0.0
    s: float = 0.0
    c: float = 0.0
    d: float = 0.0
    alpha: float = 1.0
    sigma: float = 0.0


def affine_step(
    x: Tensor,
    prediction: Prediction,
    row: Row,
    *,
    seeds: Tensor,
    index: int,
    clip: float | None = None,
    x0_prev: Tensor | None = None,
    x_base: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    noisy: bool | None = None,
    keep_x0: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Take one reverse step, in one pass over memory where Triton runs.

        out   = u + w (c - u) if the prediction is guided
        x0    = clip(p x + q out)
        x'    = a x + b x0 + c x0_prev + d x_base + s z
        x'    = m (alpha known + sigma z2) + (1 - m) x' with a mask: inpainting

    Args:
        x: state (B, ...); the other tensors have its shape, dtype and device. None of them is changed.
        prediction: the denoiser's output at x: out, out_uncond, w, p and q.
        row: coefficients of the step.
        seeds: int64 (B,); z and z2 are Philox streams 1 and 2, row `index`, of these seeds.
        index: number of the step, which selects the noise.
        clip: bound of |x0|, None for none.
        x0_prev, x_base: x0 of the previous step and the state before it; needed if c or d is not 0.
        known, mask: a clean sample and how much of it (0 to 1) to keep; given together or not at all.
        noisy: True if the kernel draws noise, by default if s is not 0; always True lets one kernel serve all rows of a table.
        keep_x0: also return x0.
        impl: "triton" raises where it cannot run, "auto" then takes torch and warns once; "compiled" is torch by
            Inductor, which takes seconds at first, see `choose_impl`.

    Returns: x' (B, ...), and x0 or an empty tensor; contiguous, whatever the layout of the arguments.

    Raises UserError if the tensors do not fit each other, or if Triton is asked for gradients.
    """
    out, out_uncond, w, p, q = prediction
    others = out, out_uncond, x0_prev, x_base, known, mask
    noisy = row.s != 0 if noisy is None else noisy
    if not _check(x, others, seeds, row, noisy or mask is not None):
        x, seeds, *others = _contiguous(x, seeds, *others)
    k = [w, p, q, row.a, row.b, row.c, row.d, row.s, row.alpha, row.sigma]
    call = {"auto": _auto, "torch": _torch, "triton": _triton, "compiled": _run_compiled}[impl]
    return call(x, *others, seeds, index, k, clip, noisy, keep_x0)


NAMES = "out", "out_uncond", "x0_prev", "x_base", "known", "mask"


def _check(x: Tensor, others: Sequence[Tensor | None], seeds: Tensor, row: Row, draws: bool) -> bool:
    """Return True if all tensors that are read are contiguous; seeds count only if noise is drawn.

    `others` is in the order of NAMES. Raises UserError if the arguments do not fit. Plain loops: for small states each
    attribute looked up shows in the time of a step.
    """
    shape, dtype, device = x.shape, x.dtype, x.device
    contiguous = x.is_contiguous() and (not draws or seeds.is_contiguous())
    for tensor in others:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            name = next(name for name, other in zip(NAMES, others, strict=True) if other is tensor)
            raise UserError(
                f"{name} is {_describe(tensor)}, but the state of the sampler is {_describe(x)}: they must agree"
            )
        contiguous = contiguous and tensor.is_contiguous()
    fits = not draws or (seeds.shape == shape[:1] and seeds.dtype == torch.int64 and seeds.device == device)
    if not shape or not fits:
        wanted = f"int64 {list(shape[:1])} on {device}"
        raise UserError(
            f"seeds is {_describe(seeds)}, but the state is {_describe(x)}: one seed a sample is needed, {wanted}"
        )
    *_, x0_prev, x_base, known, mask = others
    if (known is None) != (mask is None):
        name, other = ("known", "mask") if mask is None else ("mask", "known")
        raise UserError(f"{name} was given without {other}: inpainting needs both, and any other step neither")
    if row.c and x0_prev is None:
        raise UserError(f"x0_prev was not given, but the row's factor of it is c={row.c:g}, not 0")
    if row.d and x_base is None:
        raise UserError(f"x_base was not given, but the row's factor of it is d={row.d:g}, not 0")
    return contiguous


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def _contiguous(*args) -> list:
    """Make each tensor contiguous: noise is numbered in C order, and Triton's offsets count elements in memory."""
    return [a.contiguous() if isinstance(a, Tensor) else a for a in args]


def reference(
    x: Tensor,
    out: Tensor,
    out_uncond: Tensor | None,
    x0_prev: Tensor | None,
    x_base: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    seeds: Tensor,
    row: int | Tensor,
    k: Sequence[float] | Tensor,
    clip: float | None,
    noisy: bool,
    keep_x0: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the formula as written, in float32 or wider; k holds w, p, q, a, b, c, d, s, alpha, sigma."""
    w, p, q, a, b, c, d, s, alpha, sigma = k
    wide = functools.partial(torch.Tensor.to, dtype=torch.promote_types(x.dtype, torch.float32))
    x_, out = wide(x), wide(out)
    if out_uncond is not None:
        out = wide(out_uncond) + w * (out - wide(out_uncond))
    x0 = p * x_ + q * out
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    y = a * x_ + b * x0
    if x0_prev is not None:
        y = y + c * wide(x0_prev)
    if x_base is not None:
        y = y + d * wide(x_base)
    if noisy:
        y = y + s * rng.normal(seeds, x.shape[1:], row, rng.STEP)
    if mask is not None and known is not None:
        z = rng.normal(seeds, x.shape[1:], row, rng.MASK)
        y = wide(mask) * (alpha * wide(known) + sigma * z) + (1 - wide(mask)) * y
    return y.to(x.dtype), x0.to(x.dtype) if keep_x0 else x.new_empty(0)


def _torch(
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
    """Compute the same in place on one new tensor and in fewer passes: y = x0 / q first, clipping included."""
    w, p, q, a, b, c, d, s, alpha, sigma = k
    if x.dtype in (torch.float16, torch.bfloat16) or q == 0:
        return reference(x, out, out_uncond, x0_prev, x_base, known, mask, seeds, row, k, clip, noisy, keep_x0)
    if out_uncond is not None:
        out = torch.lerp(out_uncond, out, w)
    y = torch.add(out, x, alpha=p / q)
    if clip is not None:
        y.clamp_(-clip / abs(q), clip / abs(q))
    x0 = y * q if keep_x0 else x.new_empty(0)
    y.mul_(b * q)  # y is x0 / q up to here, so clipping cost no pass of its own
    for factor, tensor in ((a, x), (c, x0_prev), (d, x_base)):
        if factor and tensor is not None:
            y.add_(tensor, alpha=factor)
    if s:
        y.add_(rng.normal(seeds, x.shape[1:], row, rng.STEP).to(y), alpha=s)
    if mask is not None and known is not None:
        target = torch.mul(known, alpha)
        if sigma:
            target.add_(rng.normal(seeds, x.shape[1:], row, rng.MASK).to(y), alpha=sigma)
        y.lerp_(target, mask)
    return y, x0


@functools.cache
def _compile() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(reference)


_uncompiled: set[str] = set()
"""Types of device for which Inductor failed once; it takes seconds to fail again."""


def _run_compiled(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Run `reference` compiled by Inductor. Per-step values go in as tensors, so one compilation serves all steps."""
    from torch._dynamo.exc import BackendCompilerFailed  # takes a second to import

    if x.device.type in _uncompiled:
        return _torch(x, *args)
    *tensors, row, k, clip, noisy, keep_x0 = args
    factors = torch.tensor(k, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    try:
        return _compile()(x, *tensors, torch.tensor(row, device=x.device), factors, clip, noisy, keep_x0)
    except BackendCompilerFailed as error:
        _uncompiled.add(x.device.type)
        _warn_once(f"diffusion steps are not compiled: {str(error).strip().splitlines()[0]}")
        return _torch(x, *args)


def choose_impl(x: Tensor, steps: int, noisy: bool) -> Impl:
    """Return the fastest implementation for `steps` steps of a state like x: "compiled" on a CPU where that pays
    off."""
    pays = steps * x.numel() * (SAVED_SECONDS_NOISY if noisy else SAVED_SECONDS) > COMPILE_SECONDS
    compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    return "compiled" if pays and x.device.type == "cpu" and compiler else "auto"


def _triton(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    if reason := triton_obstacle(x):
        raise UserError(f"impl=triton cannot run here: {reason} (impl=auto or torch can)")
    if torch.is_grad_enabled() and _requires_grad(x, *args):
        raise UserError("impl=triton has no gradient, but a tensor of the step requires one (impl=auto or torch has)")
    from genai.kernels import triton_affine_step

    return triton_affine_step.launch(x, *args)


def _requires_grad(*args) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def triton_obstacle(x: Tensor) -> str | None:
    """Return why the kernel cannot run on tensors like x, None if it can."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, and this is {str(x.dtype).removeprefix('torch.')}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a GPU, and this is on {x.device}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def _auto(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and _requires_grad(x, *args):
        return _torch(x, *args)
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return torch.ops.genai.affine_step(x, *args)
    return (_on_gpu if x.is_cuda else _torch)(x, *args)  # directly: torch's dispatcher takes 20 us per call


def _on_gpu(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    if reason := triton_obstacle(x):
        _warn_once(f"diffusion steps run in torch instead of Triton: {reason}")
        return _torch(x, *args)
    return _triton(x, *args)


@functools.cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _fake_step(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if args[-1] else 0)


def _no_gradient(*_):
    raise UserError("torch.ops.genai.affine_step has no gradient; genai.kernels.affine_step.affine_step has")


torch.library.define(
    "genai::affine_step",
    "(Tensor x, Tensor out, Tensor? out_uncond, Tensor? x0_prev, Tensor? x_base, Tensor? known, Tensor? mask, "
    "Tensor seeds, int row, float[] k, float? clip, bool noisy, bool keep_x0) -> (Tensor, Tensor)",
)
torch.library.impl("genai::affine_step", "cpu", lambda *args: _torch(*_contiguous(*args)))
torch.library.impl("genai::affine_step", "cuda", lambda *args: _on_gpu(*_contiguous(*args)))
torch.library.register_fake("genai::affine_step", _fake_step)
torch.library.register_autograd("genai::affine_step", _no_gradient)
