"""Samplers as tables: a pure function states every reverse step once, in float64, and one executor walks the rows.

A solver is told the levels it has to visit and nothing of the model, so each works on every path. Two coordinates make
the formulas short: x / alpha, whose noise is sigma / alpha (the variance-exploding view of Karras et al. 2022), and
x / (alpha + sigma), whose noise is sigma / (alpha + sigma) (flow matching). A first-order step is the same in both, and in
DDIM's own: Euler's method, flow matching's and DDIM are one solver, and so are DDIM with eta = 1, DDPM's
ancestral sampling and Euler ancestral; they differ in the levels they visit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Batch, Denoiser, OnStep, Prediction
from genai.kernels.affine_step import Impl, Row, affine_step, prefer
from genai.models.diffusion.base import Diffusion
from genai.models.diffusion.cuda_graph import replayed, say
from genai.models.diffusion.guidance import classifier_free
from genai.models.diffusion.paths import CLEAN, Level, Path

Spacing = Literal["trailing", "leading", "linspace", "karras", "log_snr"]
Space = Literal["sigma", "flow"]


@dataclass(frozen=True)
class Table:
    """K reverse steps from level `start`: at rows[k] the network sees the state at times[k].

    x0_prev of a row is the x0 of the row before it, x_base the state before that row.
    """

    start: Level
    times: list[float]
    rows: list[Row]

    def after(self, noise: float) -> "Table":
        """The rest of the table from the first of its levels whose sigma is at most `noise`: image to image."""
        for k in range(len(self.rows)):
            here = self.start if k == 0 else Level(self.times[k], self.rows[k - 1].alpha, self.rows[k - 1].sigma)
            if here.sigma <= noise and self.rows[k].c == self.rows[k].d == 0:
                return Table(here, self.times[k:], self.rows[k:])
        raise UserError(f"no step of the sampler starts at sigma <= {noise}: give more noise or more sampler.steps")


# Which levels to visit


def levels(path: Path, steps: int, spacing: Spacing = "trailing", rho: float = 7.0) -> list[Level]:
    """`steps` levels from much noise to little, and clean data.

    trailing (from t_max down in equal strides), leading (strides up from t_min, without t_max) and linspace (both ends) are
    spaced in time (Lin et al. 2024, table 2); karras in the rho-th root of sigma / alpha (Karras et al. 2022, eq. 5),
    log_snr in its logarithm.

    Raises UserError for a number of steps or a spacing that the path does not have.
    """
    low, high = path.level(path.t_min), path.level(path.t_max)
    T = int(path.t_max) + 1 if path.discrete else 10**6
    if not 1 <= steps <= T:
        raise UserError(f"sampler.steps={steps} must be between 1 and the model's T={T}")
    fractions = [k / (steps - 1) if steps > 1 else 0.0 for k in range(steps)]
    if spacing != "trailing" and not low.sigma:
        raise UserError(f"sampler.spacing={spacing} would visit clean data, where this path ends: use trailing")
    if spacing in ("karras", "log_snr"):
        if math.isinf(high.ratio):
            raise UserError(f"sampler.spacing={spacing} cannot start from pure noise (alpha = 0): use trailing")
        if spacing == "karras":
            first, last = high.ratio ** (1 / rho), low.ratio ** (1 / rho)
            ratios = [(first + f * (last - first)) ** rho for f in fractions]
        else:
            ratios = [high.ratio * (low.ratio / high.ratio) ** f for f in fractions]
        visited = [high, *(path.level_of(ratio) for ratio in ratios[1:])]
    else:
        span = path.t_max - path.t_min
        if path.discrete:
            times = {
                "trailing": [round(T - k * T / steps) - 1 for k in range(steps)],
                "leading": [T // steps * k for k in reversed(range(steps))],
                "linspace": [round(path.t_max - f * span) for f in fractions],
            }
        else:
            times = {
                "trailing": [path.t_max - k / steps * span for k in range(steps)],
                "leading": [path.t_min + k / steps * span for k in reversed(range(steps))],
                "linspace": [path.t_max - f * span for f in fractions],
            }
        if spacing not in times:
            raise UserError(f"sampler.spacing={spacing!r} is none of trailing, leading, linspace, karras, log_snr")
        visited = [path.level(t) for t in times[spacing]]
    return [*visited, CLEAN]


# How to step between them


def _table(levels: Sequence[Level], steps: Sequence[tuple[Level, Level, Row]]) -> Table:
    """From (level the network sees, level reached, row) of each step."""
    rows = [row._replace(alpha=to.alpha, sigma=to.sigma) for _, to, row in steps]
    return Table(levels[0], [seen.t for seen, _, _ in steps], rows)


def euler_row(t: Level, s: Level, eta: float = 0.0) -> Row:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, eps re-derived from x and the clipped x0 (DDIM, Song et al.
    2021, eq. 12 and 16; there alpha^2 is alpha)."""
    if not eta:
        a = s.sigma / t.sigma
        return Row(a=a, b=s.alpha - a * t.alpha)
    r = s.ratio / t.ratio
    a = s.sigma / t.sigma * (1 - eta**2 + (eta * r) ** 2) ** 0.5
    return Row(a=a, b=s.alpha - a * t.alpha, s=eta * s.sigma * max(1 - r**2, 0.0) ** 0.5)


def ddim_table(levels: Sequence[Level], eta: float = 0.0) -> Table:
    """One first-order step between neighbours; eta = 0 is deterministic, eta = 1 has DDPM's variance."""
    if not 0 <= eta <= 1:
        raise UserError(f"sampler.eta={eta} must be between 0 (deterministic) and 1 (as noisy as DDPM)")
    return _table(levels, [(t, s, euler_row(t, s, eta)) for t, s in itertools.pairwise(levels)])


def ddpm_table(levels: Sequence[Level], variance: str = "small") -> Table:
    """Ancestral steps from q(x_s | x_t, x0) (DDPM, Ho et al. 2020, eq. 6 and 7, with alpha_t / alpha_s for a longer step).

    variance: "small" is the posterior's own (beta tilde), "large" is beta. The last step adds no noise.
    """
    if variance not in ("small", "large"):
        raise UserError(f"sampler.variance={variance!r} is none of small, large")
    steps = []
    for t, s in itertools.pairwise(levels):
        row = euler_row(t, s, eta=1.0)
        if variance == "large" and s.sigma:
            row = row._replace(s=(t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2) ** 0.5)
        steps.append((t, s, row))
    return _table(levels, steps)


def _coordinate(level: Level, space: Space) -> tuple[float, float]:
    """(u, m): x / m has noise u there."""
    m = level.alpha if space == "sigma" else level.alpha + level.sigma
    return level.sigma / m if m else math.inf, m


def _checked(levels: Sequence[Level], space: Space) -> None:
    if space not in ("sigma", "flow"):
        raise UserError(f"sampler.space={space!r} is none of sigma, flow")
    if not all(_coordinate(level, space)[1] for level in levels):
        raise UserError("sampler.space=sigma cannot start from pure noise (alpha = 0): use sampler.space=flow")


def heun_table(levels: Sequence[Level], space: Space = "sigma") -> Table:
    """An Euler step, then the mean of the slopes at its two ends (Karras et al. 2022, algorithm 1); the slope is
    (x / m - x0) / u in either coordinate. Where sigma reaches 0 the Euler step stands."""
    _checked(levels, space)
    steps = []
    for t, s in itertools.pairwise(levels):
        (u, m), (u_s, m_s) = _coordinate(t, space), _coordinate(s, space)
        steps.append((t, s, euler_row(t, s)))
        if s.sigma:
            first, second = (u_s - u) / (2 * u), (u_s - u) / (2 * u_s)
            row = Row(a=second, b=-m_s * second, c=-m_s * first, d=m_s / m * (1 + first))
            steps.append((s, s, row))
    return _table(levels, steps)


def midpoint_table(path: Path, levels: Sequence[Level], space: Space = "sigma") -> Table:
    """The whole step with the slope half-way, reached by an Euler step."""
    _checked(levels, space)
    steps = []
    for t, s in itertools.pairwise(levels):
        (u, m), (u_s, m_s) = _coordinate(t, space), _coordinate(s, space)
        middle = (u + u_s) / 2
        half = path.level_of(middle if space == "sigma" else middle / (1 - middle))
        _, m_half = _coordinate(half, space)
        slope = (u_s - u) / middle
        steps.append((t, half, euler_row(t, half)))
        steps.append((half, s, Row(a=m_s / m_half * slope, b=-m_s * slope, d=m_s / m)))
    return _table(levels, steps)


def dpmpp_2m_table(levels: Sequence[Level], eta: float = 0.0) -> Table:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): exponential integrator in h = log SNR / 2, x0 extrapolated from the last
    two. eta = 1 solves the SDE (their appendix on SDE solvers, the midpoint variant). The first step and the last
    are of first order."""
    if eta < 0:
        raise UserError(f"sampler.eta={eta} must be at least 0 (deterministic); 1 is the SDE")
    steps, h_prev = [], math.inf
    for t, s in itertools.pairwise(levels):
        h = math.log(t.ratio / s.ratio) if s.sigma else math.inf
        damping = eta * h if eta else 0.0
        amount = -s.alpha * math.expm1(-h - damping)
        extrapolated = amount * h / (2 * h_prev) if s.sigma and math.isfinite(h_prev) else 0.0
        row = Row(
            a=s.sigma / t.sigma * math.exp(-damping),
            b=amount + extrapolated,
            c=-extrapolated,
            s=s.sigma * math.sqrt(-math.expm1(-2 * damping)),
        )
        steps.append((t, s, row))
        h_prev = h
    return _table(levels, steps)


# Walking a table


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

    With `known` and `mask` (as x), what the mask covers is replaced after each step by known data as noisy as the state.
    """
    noisy = any(row.s for row in table.rows)
    impl = prefer(x, len(table.rows), noisy or mask is not None) if impl == "auto" else impl
    x_base = x0_prev = None
    for k, (t, row) in enumerate(zip(table.times, table.rows, strict=True)):
        keep = k + 1 < len(table.rows) and table.rows[k + 1].c != 0
        x_new, x0 = affine_step(
            x, denoiser(x, t, cond), row, seeds=seeds, index=k, clip=clip, x0_prev=x0_prev if row.c else None,
            x_base=x_base if row.d else None, known=known, mask=mask, noisy=noisy, keep_x0=keep, impl=impl,
        )  # fmt: skip
        x_base, x0_prev, x = x, x0, x_new
        if on_step is not None:
            on_step(k, len(table.rows), {"x": x})
    return x


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
    """Noise by seed, carried through the table; guidance None is the model's own.

    Args:
        cuda_graph: replay batches after the second as one CUDA graph; None does where nothing asks to see the steps. With
            True on_step hears of the last step only.
        denoiser: instead of the model with its guidance, see `genai.models.diffusion.guidance`.
        image: start from this, (B, *shape), noised to the table's first level, instead of from noise alone; see `Table.after`.
        known, mask: inpainting, see `walk`.
    """
    if guidance is not None and model.classes is None:
        raise UserError(f"guidance={guidance} was given, but this model is unconditional: leave guidance= out")
    seeds = seeds.to(model.device)
    cond = {k: c.to(model.device) for k, c in (cond or {}).items()}
    x = table.start.sigma * rng.normal(seeds, model.shape, stream=rng.INITIAL).to(model.dtype)
    if image is not None:
        x = x + table.start.alpha * image.to(x)
    given = {"x": x, "seeds": seeds, "known": known, "mask": mask}
    inputs = {**cond, **{name: tensor for name, tensor in given.items() if tensor is not None}}
    w = model.guidance if guidance is None else guidance

    def trajectory(inputs: Batch, on_step: OnStep | None = None, watch: bool = False) -> Tensor:
        denoise = denoiser or (classifier_free(model.denoise, model.null(), w) if cond else model.denoise)
        if watch:
            denoise = _watched(denoise, len(table.rows))
        conditions = {name: inputs[name] for name in cond}
        known, mask = inputs.get("known"), inputs.get("mask")
        return walk(
            denoise, table, inputs["x"], inputs["seeds"], conditions, on_step, model.clip, known, mask, impl
        )  # fmt: skip

    if _graphed(cuda_graph, model, denoiser, on_step):
        kind = table.start, tuple(table.times), tuple(table.rows), w, model.clip, impl
        out = replayed(model, kind, trajectory, inputs)
        if on_step is not None:
            on_step(len(table.rows) - 1, len(table.rows), {"x": out})
    else:
        out = trajectory(inputs, on_step)
    if not out.isfinite().all():  # the same again, with the host looking at every step
        trajectory(inputs, watch=True)
    return {model.field: out}


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
                f"the network's output is not finite at step {k} of {steps} (t = {t:g}): the checkpoint is broken, or "
                "its numbers are too large for this dtype"
            )
        return prediction

    return watched


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
    2021, section 4.3); exact as steps grow. The data count as the state at the least noisy level."""
    up = levels(model.path, steps)[-2::-1]
    with torch.inference_mode():
        x = image.to(model.device, model.dtype)
        seeds = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return walk(model.denoise, ddim_table(up), x, seeds, cond, clip=None) / up[-1].sigma
