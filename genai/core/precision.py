"""The precision of networks: they may compute in half, while everything around them stays float32 or wider.

Around a network are a sampler's state, times, schedules, the latents of a frozen first stage, moving averages and
losses.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.spellings import canonical

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true")
"""Precisions as Lightning spells them: weights and network in float32; weights in float32, matrix products and
convolutions in half; weights and network in half. "auto" is bf16-mixed on a GPU that can, else 32-true."""

HALF_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}
MATMUL_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def precision_of(name: object, device: str | torch.device, key: str = "precision") -> str:
    """Return the precision that `name`, in any spelling, means on a device. Raises UserError for an unknown name."""
    name = canonical(key, name)
    if not isinstance(name, str) or name not in PRECISIONS:
        raise UserError(f"{key}={name} must be one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    return "bf16-mixed" if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context for a model from `cast_for_inference`; a null context unless the precision is mixed."""
    if not precision.endswith("-mixed"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, HALF_DTYPES[precision])


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast, in which everything is computed in the dtype of its tensors."""
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Return a context without autocast and TF32, for frozen networks whose outputs are compared across runs."""
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn) if device.type == "cuda" else ()
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        with no_autocast(device):
            yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def cast_for_inference(model: nn.Module, precision: str) -> nn.Module:
    """Convert a model for inference in a precision, in place, and return it.

    In mixed precision the weights of matrix products and convolutions are rounded here once, where autocast would round
    them at every call. Embeddings stay as they are, since autocast leaves them alone.
    """
    if precision == "bf16-true":
        return model.to(torch.bfloat16)
    if precision in HALF_DTYPES:
        _round(model, HALF_DTYPES[precision], {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)})
    return model


def _round(module: nn.Module, dtype: torch.dtype, kept: set[int]) -> None:
    """Convert the layers in MATMUL_LAYERS to dtype, except those whose weight's id is in `kept` and modules of KeepPrecision."""
    if isinstance(module, KeepPrecision):
        return
    if type(module) in MATMUL_LAYERS and id(module.weight) not in kept:
        module.to(dtype)
    for child in module.children():
        _round(child, dtype, kept)


def allow_tf32(device: torch.device, precision: str) -> str | None:
    """Let float32 networks on a GPU multiply in TF32 (10 bits of mantissa); returns a sentence that says so, else
    None."""
    # Compute capability 8 (Ampere) is the first with TF32.
    if device.type != "cuda" or precision != "32-true" or torch.cuda.get_device_capability(device)[0] < 8:
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return f"float32 networks multiply in TF32 on {torch.cuda.get_device_name(device)}"


@functools.cache
def print_once(sentence: str) -> None:
    """Print a sentence once."""
    print(sentence, flush=True)


def upcast(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is at least as wide."""
    return x.float() if x.dtype.itemsize < 4 else x


def downcast(x: Tensor, net: nn.Module | Tensor) -> Tensor:
    """Return x in the dtype of a network's weights if that is narrower. Passing one weight is quicker than the
    network."""
    dtype = (net if isinstance(net, Tensor) else next(net.parameters())).dtype
    return x.to(dtype) if dtype.itemsize < x.dtype.itemsize else x


def keep_precision(t: Tensor, converted: Tensor) -> Tensor:
    """Return t on the device of `converted`, and in its dtype unless that is narrower: a tensor after `Module.to`."""
    return t.to(converted.device) if converted.dtype.itemsize < t.dtype.itemsize else converted


class KeepPrecision(nn.Module):
    """A module whose parameters and buffers, and those of its submodules, keep their precision when a model is
    converted."""

    def _apply(self, fn: Callable, recurse: bool = True):
        return super()._apply(lambda t: keep_precision(t, fn(t)), recurse)


class KeepBufferPrecision(nn.Module):
    """A module whose own buffers keep their precision when it is converted."""

    def _apply(self, fn: Callable, recurse: bool = True):
        own = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)
        for name, t in own.items():
            self._buffers[name] = keep_precision(t, self._buffers[name])  # type: ignore[arg-type]
        return self
