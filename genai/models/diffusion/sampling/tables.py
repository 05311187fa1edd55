"""Tables: a pure function states every reverse step of a sampler once, in float64; `samplers` walks the rows.

A solver `(path, levels) -> Table` is told the levels it has to visit and nothing of the model, so each works on every path.
Two coordinates make the formulas short: x / alpha, whose noise is sigma / alpha (the variance-exploding view of Karras
et al. 2022), and x / (alpha + sigma), whose noise is sigma / (alpha + sigma) (flow matching). A first-order step is the
same in both, and in DDIM's own: Euler's method, flow matching's and DDIM are one solver, and so are DDIM with eta = 1,
DDPM's ancestral sampling and Euler ancestral; they differ in the levels they visit.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from genai.core.errors import UserError, number
from genai.kernels.affine_step import Row
from genai.models.diffusion.process.paths import CLEAN, Marginal, Path, Spacing

Space = Literal["sigma", "flow"]


@dataclass(frozen=True)
class Table:
    """K reverse steps from level `start`: at rows[k] the network sees the state at times[k].

    x0_prev of a row is the x0 of the row before it, x_base the state before that row.
    """

    start: Marginal
    times: list[float]
    rows: list[Row]


Solver = Callable[[Path, Sequence[Marginal]], Table]
"""How to step from each of the levels to the next."""


# Which levels to visit


def discretize(
    path: Path,
    steps: int,
    spacing: Spacing = "trailing",
    rho: float = 7.0,
    shift: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> list[Marginal]:
    """`steps` levels from much noise to little, and clean data.

    trailing (from t_max down in equal strides), leading (equal strides up from t_min) and linspace (both ends) are spaced in
    time (Lin et al. 2024, table 2); karras in the rho-th root of sigma / alpha (Karras et al. 2022, eq. 5), log_snr in its
    logarithm. The first level is that of t_max always, leading's too: nowhere else is noise alone the state.

    Args:
        shift: above 1 moves all levels but the ends to more noise, below 1 to less (Esser et al. 2024, eq. 23).
        sigma_min, sigma_max: sigma / alpha of other ends than the path's, within it.

    Raises UserError for a number of steps, a spacing or an end that the path does not have.
    """
    low, high = _ends(path, sigma_min, sigma_max)
    T = int(path.t_max) + 1 if path.discrete else 10**6
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= T:
        raise UserError(f"sampler.steps={steps} must be between 1 and the model's T={T}, a whole number")
    fractions = [k / (steps - 1) if steps > 1 else 0.0 for k in range(steps)]
    if spacing != "trailing" and not low.sigma:
        raise UserError(
            f"sampler.spacing={spacing} would visit clean data, where this path ends: use trailing, or give sampler.sigma_min"
        )
    if spacing in ("karras", "log_snr"):
        if math.isinf(high.ratio):
            raise UserError(
                f"sampler.spacing={spacing} cannot start from pure noise (alpha = 0): use trailing, or give sampler.sigma_max"
            )
        if spacing == "karras":
            number(rho, "sampler.rho", 0, open_low=True)
            if math.log(max(high.ratio, 1 / low.ratio, high.ratio / low.ratio)) > 30 * rho:  # float64 has 16 digits
                raise UserError(
                    f"sampler.rho={rho} is too small for levels from {low.ratio:g} to {high.ratio:g}: give 1 or more"
                )
            first, last = high.ratio ** (1 / rho), low.ratio ** (1 / rho)
            ratios = [(first + f * (last - first)) ** rho for f in fractions]
        else:
            ratios = [high.ratio * (low.ratio / high.ratio) ** f for f in fractions]
        visited = [high, *(path.marginal_of_ratio(ratio) for ratio in ratios[1:])]
    else:
        span = high.t - low.t
        if path.discrete and sigma_min is sigma_max is None:
            times = {
                "trailing": [round(T - k * T / steps) - 1 for k in range(steps)],
                "leading": [T // steps * k for k in reversed(range(steps))],
                "linspace": [round(path.t_max - f * span) for f in fractions],
            }
        else:
            times = {
                "trailing": [high.t - k / steps * span for k in range(steps)],
                "leading": [low.t + k / steps * span for k in reversed(range(steps))],
                "linspace": [high.t - f * span for f in fractions],
            }
        if spacing not in times:
            raise UserError(f"sampler.spacing={spacing!r} must be one of trailing, leading, linspace, karras, log_snr")
        visited = [high, *(path.marginal(t) for t in times[spacing][1:])]
    if number(shift, "sampler.shift", 0, open_low=True) != 1:
        visited = [high, *(_shift(path, level, low, high, shift) for level in visited[1:])]
    return [*visited, CLEAN]


def _ends(path: Path, sigma_min: float | None, sigma_max: float | None) -> tuple[Marginal, Marginal]:
    """The least and the most noisy level. Raises UserError for one that lies outside of the path."""
    low, high = path.marginal(path.t_min), path.marginal(path.t_max)
    least, most = low.ratio, high.ratio
    trained = f"this model knows sigma / alpha from {least:g} to {most:g}"
    if sigma_max is not None:
        if not least < number(sigma_max, "sampler.sigma_max", 0, open_low=True) <= most * (1 + 1e-9):
            raise UserError(f"sampler.sigma_max={sigma_max} is out of range: {trained}")
        high = path.marginal_of_ratio(min(sigma_max, most))
    if sigma_min is not None:
        if not least * (1 - 1e-9) <= number(sigma_min, "sampler.sigma_min", 0, open_low=True) < high.ratio:
            below = "" if sigma_max is None else f", and it must lie below sampler.sigma_max={sigma_max}"
            raise UserError(f"sampler.sigma_min={sigma_min} is out of range: {trained}{below}")
        low = path.marginal_of_ratio(max(sigma_min, least))
    return low, high


def _shift(path: Path, level: Marginal, low: Marginal, high: Marginal, shift: float) -> Marginal:
    """u' = s u / (1 + (s - 1) u) with u = sigma / (alpha + sigma) from 0 at the least noisy level to 1 at the noisiest."""
    first, last = low.noise_fraction, high.noise_fraction
    u = (level.noise_fraction - first) / (last - first)
    u = first + (last - first) * shift * u / (1 + (shift - 1) * u)
    return path.marginal_of_ratio(u / (1 - u))


def start_at_strength(path: Path, levels: Sequence[Marginal], share: float) -> list[Marginal]:
    """The levels from the one whose sigma / (alpha + sigma) is `share` on, which takes the place of the nearest; all of them
    where none has that much noise.

    Raises UserError for less noise than the path has.
    """
    number(share, "strength", 0, 1, open_low=True)
    if share >= levels[0].noise_fraction:
        return list(levels)
    ratio, least = share / (1 - share), path.marginal(path.t_min)
    if ratio < least.ratio:
        raise UserError(
            f"strength={share} must be at least {least.noise_fraction:g}, the least noise that this model knows"
        )
    nearest = min(range(len(levels) - 1), key=lambda k: abs(math.log(levels[k].ratio / ratio)))
    return [path.marginal_of_ratio(ratio), *levels[nearest + 1 :]]


# How to step between them


def _table(levels: Sequence[Marginal], steps: Sequence[tuple[Marginal, Marginal, Row]]) -> Table:
    """From (level the network sees, level reached, row) of each step."""
    rows = [row._replace(alpha=to.alpha, sigma=to.sigma) for _, to, row in steps]
    return Table(levels[0], [seen.t for seen, _, _ in steps], rows)


def euler_row(t: Marginal, s: Marginal, eta: float = 0.0) -> Row:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, eps re-derived from x and the clipped x0 (DDIM, Song et al.
    2021, eq. 12 and 16; there alpha^2 is alpha)."""
    if not eta:
        a = s.sigma / t.sigma
        return Row(a=a, b=s.alpha - a * t.alpha)
    r = s.ratio / t.ratio
    a = s.sigma / t.sigma * (1 - eta**2 + (eta * r) ** 2) ** 0.5
    return Row(a=a, b=s.alpha - a * t.alpha, s=eta * s.sigma * max(1 - r**2, 0.0) ** 0.5)


def ddim(path: Path, levels: Sequence[Marginal], *, eta: float = 0.0) -> Table:
    """One first-order step between neighbours; eta = 0 is deterministic, eta = 1 has DDPM's variance."""
    if not 0 <= eta <= 1:
        raise UserError(f"sampler.solver.eta={eta} must be between 0 (deterministic) and 1 (as noisy as DDPM)")
    return _table(levels, [(t, s, euler_row(t, s, eta)) for t, s in itertools.pairwise(levels)])


def ddpm(path: Path, levels: Sequence[Marginal], *, variance: str = "small") -> Table:
    """Ancestral steps from q(x_s | x_t, x0) (DDPM, Ho et al. 2020, eq. 6 and 7, with alpha_t / alpha_s for a longer step).

    variance: "small" is the posterior's own (beta tilde), "large" is beta. The last step adds no noise.
    """
    if variance not in ("small", "large"):
        raise UserError(f"sampler.solver.variance={variance!r} must be one of small, large")
    steps = []
    for t, s in itertools.pairwise(levels):
        row = euler_row(t, s, eta=1.0)
        if variance == "large" and s.sigma:
            row = row._replace(s=(t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2) ** 0.5)
        steps.append((t, s, row))
    return _table(levels, steps)


def _coordinate(level: Marginal, space: Space) -> tuple[float, float]:
    """(u, m): x / m has noise u there."""
    m = level.alpha if space == "sigma" else level.alpha + level.sigma
    return level.sigma / m if m else math.inf, m


def _check_space(levels: Sequence[Marginal], space: Space) -> None:
    if space not in ("sigma", "flow"):
        raise UserError(f"sampler.solver.space={space!r} must be one of sigma, flow")
    if not all(_coordinate(level, space)[1] for level in levels):
        raise UserError(
            "sampler.solver.space=sigma cannot start from pure noise (alpha = 0): use sampler.solver.space=flow"
        )


def heun(path: Path, levels: Sequence[Marginal], *, space: Space | None = "flow") -> Table:
    """An Euler step, then the mean of the slopes at its two ends (Karras et al. 2022, algorithm 1); the slope is
    (x / m - x0) / u in either coordinate. Where sigma reaches 0 the Euler step stands.

    space: None for sigma where alpha is 1, as in the paper, else flow.
    """
    space = space or ("sigma" if all(level.alpha == 1 for level in levels) else "flow")
    _check_space(levels, space)
    steps = []
    for t, s in itertools.pairwise(levels):
        (u, m), (u_s, m_s) = _coordinate(t, space), _coordinate(s, space)
        steps.append((t, s, euler_row(t, s)))
        if s.sigma:
            first, second = (u_s - u) / (2 * u), (u_s - u) / (2 * u_s)
            row = Row(a=second, b=-m_s * second, c=-m_s * first, d=m_s / m * (1 + first))
            steps.append((s, s, row))
    return _table(levels, steps)


def midpoint(path: Path, levels: Sequence[Marginal], *, space: Space = "flow") -> Table:
    """The whole step with the slope half-way, reached by an Euler step."""
    _check_space(levels, space)
    steps = []
    for t, s in itertools.pairwise(levels):
        (u, m), (u_s, m_s) = _coordinate(t, space), _coordinate(s, space)
        middle = (u + u_s) / 2
        half = path.marginal_of_ratio(middle if space == "sigma" else middle / (1 - middle))
        _, m_half = _coordinate(half, space)
        slope = (u_s - u) / middle
        steps.append((t, half, euler_row(t, half)))
        steps.append((half, s, Row(a=m_s / m_half * slope, b=-m_s * slope, d=m_s / m)))
    return _table(levels, steps)


def dpmpp_2m(path: Path, levels: Sequence[Marginal], *, eta: float = 0.0) -> Table:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): exponential integrator in h = log SNR / 2, x0 extrapolated from the last
    two. eta = 1 solves the SDE (their appendix on SDE solvers, the midpoint variant). The first step and the last
    are of first order."""
    if eta < 0:
        raise UserError(f"sampler.solver.eta={eta} must be at least 0 (deterministic); 1 is the SDE")
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
