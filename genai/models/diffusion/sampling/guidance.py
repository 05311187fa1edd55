"""Guidance: functions that return a guided denoiser. Networks are the same with and without it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch, Denoiser, Prediction
from genai.models.diffusion.base import Condition, Diffusion
from genai.models.diffusion.process.paths import Path


def conditional_denoiser(model: Diffusion, condition: Condition) -> Denoiser:
    """Return the model as a denoiser under its conditions, without guidance: one network call per step."""
    given = model.project_context(condition.cond)
    return lambda x, t: model.denoise(x, t, given)


def classifier_free_guidance(model: Diffusion, condition: Condition, w: float) -> Denoiser:
    """Return the denoiser out = u + w (c - u), one call on twice the batch (Ho & Salimans 2022).

    w = 1 switches guidance off and w = 0 samples unconditionally; both call the network on the batch alone. The paper's w is
    this one minus 1.
    """
    given, null = condition
    if w == 1:
        return conditional_denoiser(model, condition)
    null = {name: null[name].to(c).expand_as(c) for name, c in given.items()}
    if w == 0:
        unconditional = model.project_context(null)
        return lambda x, t: model.denoise(x, t, unconditional)
    # The two halves of the batch share every layer, so one call is cheaper than two.
    both = model.project_context({name: torch.cat([c, null[name]]) for name, c in given.items()})

    def guided(x: Tensor, t: float) -> Prediction:
        prediction = model.denoise(torch.cat([x, x]), t, both)
        out, out_uncond = prediction.out.chunk(2)
        return prediction._replace(out=out, out_uncond=out_uncond, w=w)

    return guided


def autoguidance(better: Denoiser, worse: Denoiser, w: float) -> Denoiser:
    """Return the denoiser out = u + w (c - u) with u from a worse model under the same conditions (Karras et al. 2024,
    eq. 3).

    The worse model is, for instance, smaller or less trained. A call raises UserError if the two models differ in path
    or parameterization.
    """

    def guided(x: Tensor, t: float) -> Prediction:
        ours, other = better(x, t), worse(x, t)
        if (ours.p, ours.q) != (other.p, other.q):
            raise UserError(
                "autoguidance= must be a model of the same path and parameterization as this one: name another run"
            )
        return ours._replace(out_uncond=other.out, w=w)

    return guided


def limit_to_interval(guided: Denoiser, unguided: Denoiser, path: Path, low: float, high: float) -> Denoiser:
    """Return a denoiser that is guided where low < sigma / alpha <= high (Kynkaanniemi et al. 2024, eq. 5)."""

    def limited(x: Tensor, t: float) -> Prediction:
        return (guided if low < path.marginal(t).ratio <= high else unguided)(x, t)

    return limited


class Guidance(NamedTuple):
    """The guidance of one sampling call: weight w where low < sigma / alpha <= high, away from the model `worse` if it is
    given, else from the unconditional prediction."""

    w: float
    low: float = 0.0
    high: float = math.inf
    worse: Diffusion | None = None


def first_stage(model: Diffusion) -> object:
    """Return the origin of a latent model's first stage (see `checkpoint.part.Origin`); None where there is none."""
    return getattr(model.codec, "pretrained_from", None)


def resolve_guidance(
    model: Diffusion, cond: Batch, w: float | None, interval: Sequence[float | None] | None, worse: Diffusion | None
) -> Guidance:
    """Return the guidance of a call. w None means the model's own weight; an end of `interval` that is None is open.

    Raises UserError for guidance that the model does not support, and for options that would change nothing.
    """
    if worse is None and w is not None:
        if not model.null():
            raise UserError(f"guidance={w} was given, but this model is unconditional: leave guidance= out")
        if "negative" not in cond or model.classes is not None:
            model.check_guidance(w, "guidance")
    if worse is not None and (worse.shape, worse.field) != (model.shape, model.field):
        raise UserError(
            f"autoguidance= is a model of {list(worse.shape)}, and this one is of {list(model.shape)}: they must agree"
        )
    if worse is not None and first_stage(worse) != first_stage(model):
        raise UserError(
            "autoguidance= has a different first stage from this model: name a run in the latents of the same one"
        )
    if worse is not None and "negative" in cond:
        raise UserError(
            "autoguidance= guides away from a worse model, negative_prompt= away from a caption: give only one of them"
        )
    w = model.guidance if w is None else w
    if w == 1 and (worse is not None or interval is not None):
        key = "autoguidance" if worse is not None else "guidance_interval"
        raise UserError(f"{key}= changes nothing at guidance=1, which switches guidance off: give guidance= above 1")
    if w == 0 and worse is not None:
        raise UserError(
            "autoguidance= at guidance=0 is the worse model alone: give guidance= above 1, or sample from that model"
        )
    if interval is None:
        return Guidance(w, worse=worse)
    low, high = interval
    low, high = low or 0.0, math.inf if high is None else high
    if not low < high:
        raise UserError(f"guidance_interval={list(interval)} must be [low,high] of sigma / alpha with low below high")
    if worse is None and not model.null():
        raise UserError("guidance_interval= was given, but this model is unconditional: leave guidance_interval= out")
    return Guidance(w, low, high, worse)


def guided_denoiser(model: Diffusion, cond: Batch, n: int, guide: Guidance) -> Denoiser:
    """Return the model with its guidance as a denoiser for n samples; each model encodes the conditions itself."""
    condition, (w, low, high, worse) = model.encode_conditions(cond, n), guide
    if worse is not None:
        guided = autoguidance(
            conditional_denoiser(model, condition), conditional_denoiser(worse, worse.encode_conditions(cond, n)), w
        )
    elif condition.null:
        guided = classifier_free_guidance(model, condition, w)
    else:
        return conditional_denoiser(model, condition)
    everywhere = (low, high) == (0, math.inf)
    return (
        guided
        if everywhere
        else limit_to_interval(guided, conditional_denoiser(model, condition), model.path, low, high)
    )
