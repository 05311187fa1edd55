"""Samplers: one executor carries noise through the rows of a table, a network call and an affine step each."""

import itertools

import torch
from torch import Tensor

from genai.core import rng
from genai.core.cuda_graph import replayed, say
from genai.core.errors import UserError, at_least
from genai.core.precision import wide
from genai.core.protocols import Batch, Denoiser, OnStep, Prediction, for_models
from genai.kernels.affine_step import Impl, affine_step, prefer
from genai.models.diffusion.base import Diffusion
from genai.models.diffusion.guidance import classifier_free
from genai.models.diffusion.tables import (
    Space,
    Spacing,
    Table,
    ddim_table,
    ddpm_table,
    dpmpp_2m_table,
    heun_table,
    levels,
    midpoint_table,
)


def walk(
    denoiser: Denoiser,
    table: Table,
    x: Tensor,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    clip: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Carry x (B, ...) from the table's start to its end, one network call and one affine step a row.

    With `known` and `mask` (as x), what the mask covers is replaced after each step by known data as noisy as the state. The
    state is float32 or wider, whatever the denoiser answers in.
    """
    x = wide(x)
    known, mask = (None if t is None else t.to(x.dtype) for t in (known, mask))
    noisy = any(row.s for row in table.rows)
    impl = prefer(x, len(table.rows), noisy or mask is not None) if impl == "auto" else impl
    x_base = x0_prev = None
    for k, (t, row) in enumerate(zip(table.times, table.rows, strict=True)):
        keep = k + 1 < len(table.rows) and table.rows[k + 1].c != 0
        prediction = denoiser(x, t, cond)
        if prediction.out.dtype != x.dtype:
            out, uncond = prediction.out.to(x.dtype), prediction.out_uncond
            prediction = prediction._replace(out=out, out_uncond=None if uncond is None else uncond.to(x.dtype))
        x_new, x0 = affine_step(
            x, prediction, row, seeds=seeds, index=k, clip=clip, x0_prev=x0_prev if row.c else None,
            x_base=x_base if row.d else None, known=known, mask=mask, noisy=noisy, keep_x0=keep, impl=impl,
        )  # fmt: skip
        x_base, x0_prev, x = x, x0, x_new
        if on_step is not None:
            on_step(k, len(table.rows), {"x": ordinary(x)})
    return x


def ordinary(x: Tensor) -> Tensor:
    """x, or a copy where inference mode made it, which may be used where gradients are computed."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


@torch.inference_mode()
def run(
    model: Diffusion,
    table: Table,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    guidance: float | None = None,
    cuda_graph: bool | None = None,
    denoiser: Denoiser | None = None,
    image: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Batch:
    """Noise by seed, carried through the table; guidance None is the model's own. Of cond the model gets what it takes;
    guidance leads away from the caption `negative`, or else from none.

    Args:
        cuda_graph: replay batches after the second as one CUDA graph; None does where nothing asks to see the steps. With
            True on_step hears of the last step only.
        denoiser: instead of the model with its guidance, see `genai.models.diffusion.guidance`.
        image: start from this, (B, *shape), noised to the table's first level, instead of from noise alone; see `Table.after`.
        known, mask: inpainting, see `walk`.
    """
    n, shape = len(seeds), [len(seeds), *model.shape]
    if guidance is not None and not model.null():
        raise UserError(f"guidance={guidance} was given, but this model is unconditional: leave guidance= out")
    if image is None and table.start.ratio < 0.99 * model.path.level(model.path.t_max).ratio:
        raise UserError(
            f"the table starts at t = {table.start.t:g}, where there is data in the state: give image=, or a table from noise"
        )
    if image is not None and list(image.shape) != shape:
        raise UserError(f"image is {list(image.shape)}, but {n} samples of this model start from {shape}")
    cond, seeds = _conditions(model, cond, n), seeds.to(model.device)
    if guidance is not None and ("negative" not in cond or model.classes is not None):
        model.check_guidance(guidance, "guidance")
    x = table.start.sigma * rng.normal(seeds, model.shape, stream=rng.INITIAL).to(model.dtype)
    if image is not None:
        x = x + table.start.alpha * image.to(x)
    given = {"x": x, "seeds": seeds, "known": known, "mask": mask}
    inputs = {**cond, **{name: tensor for name, tensor in given.items() if tensor is not None}}
    w = model.guidance if guidance is None else guidance

    def trajectory(inputs: Batch, on_step: OnStep | None = None, watch: bool = False) -> Tensor:
        conditions = model.encoded({name: inputs[name] for name in cond if name != "negative"})
        if denoiser is None and not cond:
            conditions = model.told(None, n)
        denoise = denoiser or model.denoise
        if denoiser is None and cond:
            null = model.nulls(1)
            null.update({"caption": inputs["negative"]} if "negative" in inputs else {})
            denoise = classifier_free(denoise, model.encoded(null), w)
        if watch:
            denoise = _watched(denoise, len(table.rows))
        known, mask = inputs.get("known"), inputs.get("mask")
        return walk(
            denoise, table, inputs["x"], inputs["seeds"], conditions, on_step, model.clip, known, mask, impl
        )  # fmt: skip

    if _graphed(cuda_graph, model, denoiser, on_step):
        half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        kind = table.start, tuple(table.times), tuple(table.rows), w, model.clip, impl, half
        out = replayed(model, kind, trajectory, inputs)
        if on_step is not None:
            on_step(len(table.rows) - 1, len(table.rows), {"x": ordinary(out)})
    else:
        out = trajectory(inputs, on_step)
    if not out.isfinite().all():  # the same again, with the host looking at every step
        trajectory(inputs, watch=True)
        raise UserError(
            "samples are not finite, though the network's outputs are: its numbers are too large, sample with clip"
        )
    return {model.field: ordinary(model.shown(out))}


def _conditions(model: Diffusion, cond: Batch | None, n: int) -> Batch:
    """The conditions of n samples that the model takes, and `negative`; a label or a caption that it does not take, as data come
    with, is left out. Raises UserError for any other name."""
    cond, takes = cond or {}, [*model.null(), *(["negative"] if model.text is not None else [])]
    if unknown := set(cond) - {"label", "caption", *takes}:
        raise UserError(
            f"cond has {', '.join(sorted(unknown))}, but this model takes {', '.join(takes) or 'no conditions'}"
        )
    given = model.given(cond, n)
    if "negative" in cond and "negative" in takes:
        given = {**(given or model.nulls(n)), "negative": model.given({"caption": cond["negative"]}, n)["caption"]}
    return given


def _graphed(asked: bool | None, model: Diffusion, denoiser: Denoiser | None, on_step: OnStep | None) -> bool:
    """Whether a trajectory may become a CUDA graph; what keeps one that was asked for from it is said."""
    reason = None
    if model.device.type != "cuda":
        reason = f"the model is on {model.device}"
    elif denoiser is not None or model.training:
        reason = "the denoiser is not the model's own" if denoiser is not None else "the model is in training mode"
    if asked and reason:
        say(reason)
    return reason is None and (on_step is None if asked is None else asked)


def _watched(denoiser: Denoiser, steps: int) -> Denoiser:
    """Raises UserError that names the first step at which the network's output is not finite."""
    calls = itertools.count()

    def watched(x: Tensor, t: float, cond: Batch | None) -> Prediction:
        prediction, k = denoiser(x, t, cond), next(calls)
        if not prediction.out.isfinite().all():
            raise UserError(
                f"the network's output is not finite at step {k} of {steps} (t = {t:g}): training has diverged "
                "(a lower optim.lr helps), or its numbers are too large for this dtype"
            )
        return prediction

    return watched


@for_models(Diffusion)
def ddpm(
    model: Diffusion,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int | None = None,
    spacing: Spacing = "trailing",
    variance: str = "small",
    guidance: float | None = None,
    cuda_graph: bool | None = None,
) -> Batch:
    """Ancestral sampling with `steps` steps (default: all T), see `ddpm_table`."""
    visited = levels(model.path, int(model.path.t_max) + 1 if steps is None else steps, spacing)
    return run(model, ddpm_table(visited, variance), seeds, cond, on_step, guidance, cuda_graph)


@for_models(Diffusion)
def ddim(
    model: Diffusion,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int = 50,
    spacing: Spacing = "trailing",
    eta: float = 0.0,
    guidance: float | None = None,
    cuda_graph: bool | None = None,
) -> Batch:
    """First-order sampling, see `ddim_table`; with other spacings Euler's method and Euler ancestral (eta = 1)."""
    return run(model, ddim_table(levels(model.path, steps, spacing), eta), seeds, cond, on_step, guidance, cuda_graph)


@for_models(Diffusion)
def heun(
    model: Diffusion,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int = 20,
    spacing: Spacing = "karras",
    space: Space = "sigma",
    guidance: float | None = None,
    cuda_graph: bool | None = None,
) -> Batch:
    """Heun's second-order method with two network calls a step, see `heun_table`."""
    return run(model, heun_table(levels(model.path, steps, spacing), space), seeds, cond, on_step, guidance, cuda_graph)


@for_models(Diffusion)
def midpoint(
    model: Diffusion,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int = 20,
    spacing: Spacing = "trailing",
    space: Space = "flow",
    guidance: float | None = None,
    cuda_graph: bool | None = None,
) -> Batch:
    """The midpoint method with two network calls a step, see `midpoint_table`."""
    table = midpoint_table(model.path, levels(model.path, steps, spacing), space)
    return run(model, table, seeds, cond, on_step, guidance, cuda_graph)


@for_models(Diffusion)
def dpmpp_2m(
    model: Diffusion,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int = 20,
    spacing: Spacing = "log_snr",
    eta: float = 0.0,
    guidance: float | None = None,
    cuda_graph: bool | None = None,
) -> Batch:
    """DPM-Solver++ of second order with one network call a step, see `dpmpp_2m_table`."""
    return run(
        model, dpmpp_2m_table(levels(model.path, steps, spacing), eta), seeds, cond, on_step, guidance, cuda_graph
    )


def invert(model: Diffusion, image: Tensor, cond: Batch | None = None, *, steps: int = 50) -> Tensor:
    """DDIM inversion: clean samples (B, *shape) -> the noise that `ddim` with as many steps leads back to them (Song et al.
    2021, section 4.3); exact as steps grow. The data count as the state at the least noisy level.

    Raises UserError for less than 2 steps, and for images of another shape.
    """
    up = levels(model.path, at_least(steps, 2, "steps"))[-2::-1]
    if image.shape[1:] != model.shape:
        raise UserError(f"image is {list(image.shape)}, but samples of this model are {list(model.shape)} each")
    with torch.inference_mode():
        x = image.to(model.device, model.dtype)
        seeds, cond = torch.zeros(len(x), dtype=torch.int64, device=x.device), _conditions(model, cond, len(x))
        return ordinary(
            walk(model.denoise, ddim_table(up), x, seeds, model.told(cond, len(x)), clip=None) / up[-1].sigma
        )
