"""The sampler of all diffusion models: one function runs the table of any solver, with one network call and one affine
step per row."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from genai.core import rng
from genai.core.cuda_graph import find_graph, retry_without_graphs, warn_no_graph
from genai.core.errors import UserError
from genai.core.precision import upcast
from genai.core.protocols import Batch, Denoiser, OnStep, Prediction, for_models
from genai.kernels.affine_step import Impl, affine_step, choose_impl
from genai.models.diffusion.base import Diffusion
from genai.models.diffusion.process.paths import Marginal, Spacing
from genai.models.diffusion.sampling import guidance as guides
from genai.models.diffusion.sampling import tables
from genai.models.diffusion.sampling.tables import Solver, Table, discretize, start_at_strength

CONTINUOUS_STEPS = 1000  # what steps=None means on a path of continuous time; as many as DDPM has
MAX_FRAME_NUMBERS = 2**25  # elements of all frames of one call: 128 MiB of float32
INVERSION_SIGMA = 0.002  # sigma / alpha where inversion starts on a path that ends in clean data: EDM's sigma_min


def run_table(
    denoiser: Denoiser,
    table: Table,
    x: Tensor,
    seeds: Tensor,
    on_step: OnStep | None = None,
    clip: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Integrate x (B, ...) from the table's start to its end, with one network call and one affine step per row.

    With `known` and `mask`, shaped like x, the part where `mask` is 1 is replaced after each step by `known` with as much noise
    as the state has (inpainting). `seeds` int64 (B,) seed the noise of the steps, `clip` bounds |x0|; see `affine_step`. The
    state is float32 or wider, whatever dtype the denoiser returns.
    """
    x = upcast(x)
    known, mask = (None if t is None else t.to(x.dtype) for t in (known, mask))
    noisy = any(row.s for row in table.rows)
    impl = choose_impl(x, len(table.rows), noisy or mask is not None) if impl == "auto" else impl
    # Only rows with c or d read these, and only they get them: any other row would keep a tensor alive for nothing.
    x_base = x0_prev = None
    for k, (t, row) in enumerate(zip(table.times, table.rows, strict=True)):
        keep = k + 1 < len(table.rows) and table.rows[k + 1].c != 0
        prediction = denoiser(x, t)
        if prediction.out.dtype != x.dtype:  # a network in half precision; the affine step takes one dtype
            out, uncond = prediction.out.to(x.dtype), prediction.out_uncond
            prediction = prediction._replace(out=out, out_uncond=None if uncond is None else uncond.to(x.dtype))
        x_new, x0 = affine_step(
            x,
            prediction,
            row,
            seeds=seeds,
            index=k,
            clip=clip,
            x0_prev=x0_prev if row.c else None,
            x_base=x_base if row.d else None,
            known=known,
            mask=mask,
            noisy=noisy,
            keep_x0=keep,
            impl=impl,
        )
        x_base, x0_prev, x = x, x0, x_new
        if on_step is not None:
            on_step(k, len(table.rows), {"x": leave_inference_mode(x)})
    return x


def leave_inference_mode(x: Tensor) -> Tensor:
    """Return x, or a copy that autograd may use if inference mode made x."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


@for_models(Diffusion, autoguidance=Diffusion)
@torch.inference_mode()
def sample(
    model: Diffusion,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    solver: Solver,
    steps: int | None = 50,
    spacing: Spacing | None = None,
    rho: float = 7.0,
    shift: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    guidance: float | None = None,
    guidance_interval: Sequence[float | None] | None = None,
    autoguidance: Diffusion | None = None,
    image: Tensor | None = None,
    strength: float | None = None,
    mask: Tensor | None = None,
    invert: bool = False,
    frames: bool = False,
    cuda_graph: bool | None = None,
    impl: Impl = "auto",
) -> Batch:
    """Draw samples by integrating from noise, or from a noised image, to data along the path with any solver.

    Args:
        seeds: int64 (n,), one seed per sample, which determines all of its noise.
        cond: conditions of n samples, see `Diffusion.encode_conditions`.
        solver: a solver of `tables` with its own options bound, such as partial(ddim, eta=1.0).
        steps: steps of the solver; None visits all times of a discrete path, 1,000 of a continuous one.
        spacing, rho, shift, sigma_min, sigma_max: times to visit, see `tables.discretize`; spacing None is the path's
            own.
        guidance: weight of classifier-free guidance or autoguidance; None is the model's own, 1 switches guidance off,
            0 samples unconditionally.
        guidance_interval: (low, high) of sigma / alpha in which guidance acts; None for an end leaves it open.
        autoguidance: a worse model that samples are guided away from, instead of from the unconditional prediction.
        image: (n, *data_shape) in [-1, 1], the image to start from, or to keep a part of.
        strength: sigma / (alpha + sigma) of the starting state, above 0; None or 1 is the path's noisiest.
        mask: broadcasts to image, in [0, 1]: how much of it to keep; the rest is filled in. The `mask` of `genai.sample`
            is 1 minus this one.
        invert: start from the noise that encodes the image, found by integrating the unconditional ODE from data to
            noise (DDIM inversion, Song et al. 2021, section 4.3), instead of from noise by seed.
        frames: also return `frames` (N, K + 1, *data_shape) of the first N samples: x / (alpha + sigma) before the
            first step and after each.
        cuda_graph: replay batches from the second on as one CUDA graph, which calls on_step for the last step only;
            None does so unless something needs to see the steps.

    Returns the batch {field: (n, *data_shape)}. Raises UserError for options that contradict each other or do not fit
    the model, and if the samples are not finite.
    """
    n, path = len(seeds), model.path
    if steps is None:
        steps = int(path.t_max) + 1 if path.discrete else CONTINUOUS_STEPS
    marginals = discretize(path, steps, spacing or path.spacing, rho, shift, sigma_min, sigma_max)
    _check_image(model, n, image, strength, mask, invert)
    guide = guides.resolve_guidance(model, cond or {}, guidance, guidance_interval, autoguidance)
    marginals = marginals if strength is None else start_at_strength(path, marginals, strength)
    table = solver(path, marginals)
    if invert and any(row.s for row in table.rows):
        raise UserError(
            "invert=true needs a sampler that adds no noise: ddim with eta=0, heun, midpoint or dpmpp_2m with eta=0"
        )
    conditions = {name: value.to(model.device) for name, value in (cond or {}).items()}
    inputs = {**conditions, "seeds": seeds.to(model.device)}
    x = table.start.sigma * rng.normal(inputs["seeds"], model.shape, stream=rng.INITIAL).to(model.dtype)
    if image is not None:
        image = image.to(model.device, model.dtype)
        known = model.encode_data({model.field: image}).to(model.dtype)
        x = _invert(model, marginals, known) if invert else x + table.start.alpha * known
        if mask is not None:
            mask = mask.to(image).expand_as(image)
            inputs |= {"known": known, "mask": mask if model.latent is None else model.latent.downsample_mask(mask)}
    inputs["x"] = x

    def trajectory(inputs: Batch, on_step: OnStep | None = None, watch: bool = False) -> Tensor:
        cond, (x, seeds) = {name: inputs[name] for name in conditions}, (inputs["x"], inputs["seeds"])
        denoise = guides.guided_denoiser(model, cond, n, guide)
        denoise = _check_outputs(denoise, len(table.rows)) if watch else denoise
        return run_table(denoise, table, x, seeds, on_step, model.clip, inputs.get("known"), inputs.get("mask"), impl)

    recorder = _FrameRecorder(table, x, on_step) if frames else None
    on_step = recorder or on_step
    graph = None
    if _uses_graph(cuda_graph, model, autoguidance, on_step):
        # A graph holds Python numbers as constants, so all of them are in the key under which it is cached.
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        kind = table.start, tuple(table.times), tuple(table.rows), guide, model.clip, impl, autocast
        graph = find_graph(model, kind, trajectory, inputs)
    if graph is None:
        out = retry_without_graphs(model, lambda: trajectory(inputs, on_step))
    else:
        out = graph(inputs)
        if on_step is not None:
            on_step(len(table.rows) - 1, len(table.rows), {"x": leave_inference_mode(out)})
    if not out.isfinite().all():
        # Only now look for the step: checking each one would make the host wait for the device every time.
        trajectory(inputs, watch=True)
        raise UserError(
            "samples are not finite, though the network's outputs are: the state overflows, so use a lower guidance=, "
            "or a model trained with model.clip="
        )
    out = model.decode_data(out)
    if mask is not None and image is not None and model.latent is not None:
        out = torch.lerp(out, image, mask)  # a first stage reconstructs the kept part only approximately
    batch = {model.field: leave_inference_mode(out)}
    return batch if recorder is None else {**batch, "frames": recorder.decode(model)}


def _check_image(
    model: Diffusion, n: int, image: Tensor | None, strength: float | None, mask: Tensor | None, invert: bool
) -> None:
    """Raise UserError unless image, strength, mask and invert go together and fit the model."""
    if image is None:
        given = {"strength": strength is not None, "mask": mask is not None, "invert": invert}
        for key in (key for key, is_given in given.items() if is_given):
            raise UserError(
                f"{key}= says what to do with a given {model.field}, and there is none: give {model.field}=, or leave {key}= out"
            )
        return
    if list(image.shape) != [n, *model.data_shape]:
        raise UserError(
            f"{model.field} has shape {list(image.shape)}, but {n} samples of this model start from {[n, *model.data_shape]}"
        )
    if mask is None and not invert and strength in (None, 1):
        raise UserError(
            f"{model.field}= alone changes nothing: give strength= below 1 (how much noise to add), mask= or invert=true"
        )
    fits = mask is None or (
        mask.ndim == image.ndim and all(m in (1, k) for m, k in zip(mask.shape, image.shape, strict=True))
    )
    if mask is not None and not fits:
        raise UserError(
            f"mask has shape {list(mask.shape)}, but the {model.field} has {list(image.shape)}: they must agree"
        )
    if invert and model.null() and model.label_dropout == 0:
        raise UserError(
            "invert=true needs unconditional predictions, which model.label_dropout=0 never trained: leave invert= out"
        )


def _invert(model: Diffusion, marginals: Sequence[Marginal], x: Tensor) -> Tensor:
    """Integrate the unconditional ODE from x up to the noisiest point below pure noise; returns the state at marginals[0].

    The midpoint method takes two network calls per step. The data are taken as the state at the path's least noisy
    point. The network is not called at marginals[0]: in pure noise the state says nothing about x0.
    """
    path = model.path
    low = path.marginal(path.t_min) if path.marginal(path.t_min).sigma else path.marginal_of_ratio(INVERSION_SIGMA)
    up = [*([low] if low.ratio < marginals[-2].ratio else []), *marginals[-2::-1]]
    if len(up) < 2:
        raise UserError("invert=true needs at least two points of the path above the data: give more sampler.steps")
    denoise = guides.conditional_denoiser(model, model.encode_conditions(None, len(x)))
    seeds = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return run_table(denoise, tables.midpoint(path, up), x, seeds, clip=model.clip)


class _FrameRecorder:
    """An on_step that keeps the states of the first samples, scaled by 1 / (alpha + sigma) to one range."""

    def __init__(self, table: Table, x: Tensor, on_step: OnStep | None):
        self.table, self.on_step, numbers = table, on_step, x[0].numel() * (len(table.rows) + 1)
        self.n = max(min(len(x), MAX_FRAME_NUMBERS // numbers), 1)
        self.states = [x[: self.n] / (table.start.alpha + table.start.sigma)]

    def __call__(self, i: int, n: int, state: Batch) -> None:
        row = self.table.rows[i]
        self.states.append(state["x"][: self.n] / (row.alpha + row.sigma))
        if self.on_step is not None:
            self.on_step(i, n, state)

    def decode(self, model: Diffusion) -> Tensor:
        """Return the recorded states in the space of the data, (N, K + 1, *data_shape)."""
        return leave_inference_mode(torch.stack([model.decode_data(x) for x in self.states], 1))


def _uses_graph(asked: bool | None, model: Diffusion, worse: Diffusion | None, on_step: OnStep | None) -> bool:
    """Return True if the trajectory may become a CUDA graph; warn if one was asked for and cannot be used."""
    reason = None
    if model.device.type != "cuda":
        reason = f"the model is on {model.device}"
    elif isinstance(on_step, _FrameRecorder):
        reason = "frames=true shows every step"
    elif worse is not None or model.training:
        reason = "autoguidance calls two models" if worse is not None else "the model is in training mode"
    if asked and reason:
        warn_no_graph(reason)
    return reason is None and (getattr(on_step, "counts_only", on_step is None) if asked is None else asked)


def _check_outputs(denoiser: Denoiser, steps: int) -> Denoiser:
    """Wrap a denoiser so that it raises UserError at the first step whose network output is not finite."""
    calls = itertools.count()

    def watched(x: Tensor, t: float) -> Prediction:
        prediction, k = denoiser(x, t), next(calls)
        if not prediction.out.isfinite().all():
            raise UserError(
                f"the network's output is not finite at step {k} of {steps} (t = {t:g}): training has diverged "
                "(a lower optim.lr helps), or its activations overflow this dtype"
            )
        return prediction

    return watched
