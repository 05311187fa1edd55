"""Samplers as tables: a pure function states every reverse step once, in float64, and one executor walks the rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Batch, Denoiser, OnStep
from genai.kernels.affine_step import Row, affine_step
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.guidance import classifier_free
from genai.models.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Table:
    """K reverse steps: the state at times[k] becomes, by rows[k], the state at times[k + 1]; -1 is clean data.

    States live on the variance-preserving path alpha x0 + sigma eps of the schedule the table was made from.
    """

    times: list[int]
    rows: list[Row]


def time_pairs(T: int, steps: int) -> list[tuple[int, int]]:
    """(t, s) pairs, trailing spacing: the first t is T - 1, the last s is -1, which returns x0.

    Raises UserError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise UserError(f"sampler.steps={steps} must be between 1 and the model's T={T}")
    times = [round(T - k * T / steps) - 1 for k in range(steps)]
    return list(zip(times, [*times[1:], -1], strict=True))


def ddpm_table(schedule: Schedule, steps: int | None = None, variance: str = "small") -> Table:
    """Ancestral steps from q(x_s | x_t, x0) (DDPM, Ho et al. 2020, eq. 6 and 7, with alpha_t / alpha_s for a longer step).

    variance: "small" is the posterior's own (beta tilde), "large" is beta. The last step adds no noise.
    """
    if variance not in ("small", "large"):
        raise UserError(f"sampler.variance={variance!r} is none of small, large")
    pairs = time_pairs(len(schedule), len(schedule) if steps is None else steps)
    rows = []
    for t, s in pairs:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        ratio = alpha_t / alpha_s
        beta = sigma_t**2 - (ratio * sigma_s) ** 2
        std = beta**0.5 * (sigma_s / sigma_t if variance == "small" else float(s >= 0))
        rows.append(Row(a=ratio * sigma_s**2 / sigma_t**2, b=alpha_s * beta / sigma_t**2, s=std))
    return Table([t for t, _ in pairs] + [-1], rows)


def ddim_table(schedule: Schedule, steps: int = 50, eta: float = 0.0) -> Table:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, eps re-derived from x and the clipped x0 (DDIM, Song et al.
    2021, eq. 12 and 16). eta = 0 is deterministic, eta = 1 has DDPM's variance."""
    if not 0 <= eta <= 1:
        raise UserError(f"sampler.eta={eta} must be between 0 (deterministic) and 1 (as noisy as DDPM)")
    pairs = time_pairs(len(schedule), steps)
    rows = []
    for t, s in pairs:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        std = eta * sigma_s / sigma_t * max(1 - (alpha_t / alpha_s) ** 2, 0.0) ** 0.5
        a = max(sigma_s**2 - std**2, 0.0) ** 0.5 / sigma_t
        rows.append(Row(a=a, b=alpha_s - a * alpha_t, s=std))
    return Table([t for t, _ in pairs] + [-1], rows)


def walk(
    denoiser: Denoiser,
    table: Table,
    x: Tensor,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    clip: float | None = None,
) -> Tensor:
    """Carry x (B, ...) from times[0] to clean data, one network call and one affine step a row."""
    for k, (t, row) in enumerate(zip(table.times, table.rows, strict=False)):
        prediction = denoiser(x, t, cond)
        x = affine_step(x, prediction, row, clip=clip, seeds=seeds, index=k)
        if on_step is not None:
            on_step(k, len(table.rows), {"x": x})
    return x


@torch.inference_mode()
def _sample(
    model: DDPM, table: Table, seeds: Tensor, cond: Batch | None, on_step: OnStep | None, guidance: float | None
) -> Batch:
    """Noise by seed, carried through the table; guidance None is the model's own."""
    if guidance is not None and model.classes is None:
        raise UserError(f"guidance={guidance} was given, but this model is unconditional: leave guidance= out")
    seeds = seeds.to(model.device)
    cond = {k: c.to(model.device) for k, c in (cond or {}).items()}
    denoiser: Denoiser = model.denoise
    if cond:
        denoiser = classifier_free(denoiser, model.null(), model.guidance if guidance is None else guidance)
    x = rng.normal(seeds, model.shape, stream=rng.INITIAL).to(model.dtype)
    return {model.field: walk(denoiser, table, x, seeds, cond, on_step, model.clip)}


def ddpm(
    model: DDPM,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int | None = None,
    variance: str = "small",
    guidance: float | None = None,
) -> Batch:
    """Ancestral sampling with `steps` steps (default: all T), see `ddpm_table`."""
    return _sample(model, ddpm_table(model.schedule, steps, variance), seeds, cond, on_step, guidance)


def ddim(
    model: DDPM,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int = 50,
    eta: float = 0.0,
    guidance: float | None = None,
) -> Batch:
    """DDIM sampling with `steps` steps, see `ddim_table`."""
    return _sample(model, ddim_table(model.schedule, steps, eta), seeds, cond, on_step, guidance)
