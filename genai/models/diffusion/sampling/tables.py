"""Solver tables: pure functions that compute the coefficients of every reverse step of a sampler once, in float64;
`run_table` executes them.

A solver `(path, marginals) -> Table` gets the points of the path to visit and knows nothing of the model, so each
solver works on every path. Two coordinates keep the formulas short: x / alpha, whose noise is sigma / alpha (the
variance-exploding view of Karras et al. 2022), and x / (alpha + sigma), whose noise is sigma / (alpha + sigma) (flow
matching). A first-order step is the same in both, and in DDIM's own: Euler's method, flow matching and DDIM are one
solver, and so are DDIM with eta = 1, DDPM's ancestral sampling and Euler ancestral. They differ only in the times they
visit.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from genai.core.errors import UserError, number, show
from genai.kernels.affine_step import Row
from genai.models.diffusion.process.paths import CLEAN, Marginal, Path, Spacing

Space = Literal["sigma", "flow"]
"""The coordinate in which a solver takes its slopes: x / alpha ("sigma") or x / (alpha + sigma) ("flow")."""


@dataclass(frozen=True)
class Table:
    """The K reverse steps of a sampler from the point `start`: for rows[k] the network is called at times[k].

    In a row, x0_prev is the x0 of the row before it, and x_base the state before that row.
    """

    start: Marginal
    times: list[float]
    rows: list[Row]


Solver = Callable[[Path, Sequence[Marginal]], Table]
"""A solver: returns the table of the steps between consecutive points of a path."""


# The times that a sampler visits


def discretize(
    path: Path,
    steps: int,
    spacing: Spacing = "trailing",
    rho: float = 7.0,
    shift: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> list[Marginal]:
    """Return the points of the path that a sampler visits, `steps` from noisy to nearly clean, then clean data.

    trailing (equal strides down from t_max), leading (equal strides up from t_min) and linspace (both ends) are even in
    time (Lin et al. 2024, table 2); karras is even in the rho-th root of sigma / alpha (Karras et al. 2022, eq. 5),
    log_snr in its logarithm. The first point is always that of t_max, for leading too: only there is the state pure
    noise.

    Args:
        shift: above 1 moves all points but the ends to more noise, below 1 to less (Esser et al. 2024, eq. 23).
        sigma_min, sigma_max: sigma / alpha of the last and first point, within the path; None is the end of the path.

    Raises UserError for a number of steps, a spacing or an end that the path does not have.
    """
    low, high = _ends(path, sigma_min, sigma_max)
    T = int(path.t_max) + 1 if path.discrete else 10**6  # continuous time has no natural limit; this one catches typos
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= T:
        most = f"the model's T={T}" if path.discrete else f"{T}"
        raise UserError(f"sampler.steps={show(steps)} must be a whole number between 1 and {most}")
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
            # The roots would span e^30, 13 of float64's 16 digits: interpolating between them would lose the rest.
            if math.log(max(high.ratio, 1 / low.ratio, high.ratio / low.ratio)) > 30 * rho:
                raise UserError(
                    f"sampler.rho={rho} is too small for noise from {low.ratio:g} to {high.ratio:g}: give 1 or more"
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
        visited = [high, *(_shift(path, marginal, low, high, shift) for marginal in visited[1:])]
    return [*visited, CLEAN]


def _ends(path: Path, sigma_min: float | None, sigma_max: float | None) -> tuple[Marginal, Marginal]:
    """Return the least and the most noisy point. Raises UserError if one lies outside the path."""
    low, high = path.marginal(path.t_min), path.marginal(path.t_max)
    least, most = low.ratio, high.ratio
    trained = f"this model is trained for sigma / alpha from {least:g} to {most:g}"
    if sigma_max is not None:
        # 1e-9 lets the ends of the path itself pass, whatever their last digits.
        if not least < number(sigma_max, "sampler.sigma_max", 0, open_low=True) <= most * (1 + 1e-9):
            raise UserError(f"sampler.sigma_max={sigma_max} is out of range: {trained}")
        high = path.marginal_of_ratio(min(sigma_max, most))
    if sigma_min is not None:
        if not least * (1 - 1e-9) <= number(sigma_min, "sampler.sigma_min", 0, open_low=True) < high.ratio:
            below = "" if sigma_max is None else f", and it must lie below sampler.sigma_max={sigma_max}"
            raise UserError(f"sampler.sigma_min={sigma_min} is out of range: {trained}{below}")
        low = path.marginal_of_ratio(max(sigma_min, least))
    return low, high


def _shift(path: Path, marginal: Marginal, low: Marginal, high: Marginal, shift: float) -> Marginal:
    """Move a point: u' = s u / (1 + (s - 1) u), where u = sigma / (alpha + sigma) is rescaled to [0, 1] between the
    ends."""
    first, last = low.noise_fraction, high.noise_fraction
    u = (marginal.noise_fraction - first) / (last - first)
    u = first + (last - first) * shift * u / (1 + (shift - 1) * u)
    return path.marginal_of_ratio(u / (1 - u))


def start_at_strength(path: Path, marginals: Sequence[Marginal], share: float) -> list[Marginal]:
    """Drop the points with more noise than sigma / (alpha + sigma) = share, and start exactly there.

    The start replaces the nearest point. All points are kept if none has that much noise. Raises UserError for less
    noise than the path has.
    """
    number(share, "strength", 0, 1, open_low=True)
    if share >= marginals[0].noise_fraction:
        return list(marginals)
    ratio, least = share / (1 - share), path.marginal(path.t_min)
    if ratio < least.ratio:
        raise UserError(
            f"strength={share} must be at least {least.noise_fraction:g}, the least noise that this model is trained for"
        )
    nearest = min(range(len(marginals) - 1), key=lambda k: abs(math.log(marginals[k].ratio / ratio)))
    return [path.marginal_of_ratio(ratio), *marginals[nearest + 1 :]]


# The steps between them


def _table(marginals: Sequence[Marginal], steps: Sequence[tuple[Marginal, Marginal, Row]]) -> Table:
    """Build a table. A step is (the point at which the network is called, the point it reaches, its row)."""
    rows = [row._replace(alpha=to.alpha, sigma=to.sigma) for _, to, row in steps]
    return Table(marginals[0], [called.t for called, _, _ in steps], rows)


def euler_row(t: Marginal, s: Marginal, eta: float = 0.0) -> Row:
    """Return the row x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z (DDIM, Song et al. 2021, eq. 12 and 16).

    eps is derived again from x and the clipped x0. The paper writes alpha for alpha^2.
    """
    if not eta:
        a = s.sigma / t.sigma
        return Row(a=a, b=s.alpha - a * t.alpha)
    # sigma_s^2 - std^2 is expanded: at eta = 1 and small r the difference would cancel.
    r = s.ratio / t.ratio
    a = s.sigma / t.sigma * (1 - eta**2 + (eta * r) ** 2) ** 0.5
    return Row(a=a, b=s.alpha - a * t.alpha, s=eta * s.sigma * max(1 - r**2, 0.0) ** 0.5)


def ddim(path: Path, marginals: Sequence[Marginal], *, eta: float = 0.0) -> Table:
    """Solve by one first-order step per pair of neighbours: eta = 0 is deterministic, eta = 1 has DDPM's variance.

    Raises UserError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"sampler.solver.eta={eta} must be between 0 (deterministic) and 1 (as noisy as DDPM)")
    return _table(marginals, [(t, s, euler_row(t, s, eta)) for t, s in itertools.pairwise(marginals)])


def ddpm(path: Path, marginals: Sequence[Marginal], *, variance: str = "small") -> Table:
    """Sample ancestrally from q(x_s | x_t, x0) (Ho et al. 2020, eq. 6 and 7, with alpha_t / alpha_s for longer steps).

    `variance` is "small", the posterior's (beta tilde), or "large", beta. The last step adds no noise. Raises UserError
    for another.
    """
    if variance not in ("small", "large"):
        raise UserError(f"sampler.solver.variance={variance!r} must be one of small, large")
    steps = []
    for t, s in itertools.pairwise(marginals):
        row = euler_row(t, s, eta=1.0)
        if variance == "large" and s.sigma:
            row = row._replace(s=(t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2) ** 0.5)
        steps.append((t, s, row))
    return _table(marginals, steps)


def _coordinate(marginal: Marginal, space: Space) -> tuple[float, float]:
    """Return (u, m) at a point: the coordinate x / m = (alpha / m) x0 + u eps; u is infinite where m = 0."""
    m = marginal.alpha if space == "sigma" else marginal.alpha + marginal.sigma
    return marginal.sigma / m if m else math.inf, m


def _check_space(marginals: Sequence[Marginal], space: Space) -> None:
    """Raise UserError for an unknown space, or for sigma / alpha where a point is pure noise (alpha = 0)."""
    if space not in ("sigma", "flow"):
        raise UserError(f"sampler.solver.space={space!r} must be one of sigma, flow")
    if not all(_coordinate(marginal, space)[1] for marginal in marginals):
        raise UserError(
            "sampler.solver.space=sigma cannot start from pure noise (alpha = 0): use sampler.solver.space=flow"
        )


def heun(path: Path, marginals: Sequence[Marginal], *, space: Space | None = "flow") -> Table:
    """Solve by Heun's method: an Euler step, then the mean of the slopes at its two ends (Karras et al. 2022, alg. 1).

    The slope is (x / m - x0) / u, where x / m is the coordinate and u its noise, see `_coordinate`. The step to sigma = 0 is
    Euler's alone, since there u = 0. `space` None takes sigma if alpha is 1 throughout, as in the paper, else flow. Raises
    UserError as `_check_space` does.
    """
    space = space or ("sigma" if all(marginal.alpha == 1 for marginal in marginals) else "flow")
    _check_space(marginals, space)
    steps = []
    for t, s in itertools.pairwise(marginals):
        (u, m), (u_s, m_s) = _coordinate(t, space), _coordinate(s, space)
        steps.append((t, s, euler_row(t, s)))
        if s.sigma:
            first, second = (u_s - u) / (2 * u), (u_s - u) / (2 * u_s)
            row = Row(a=second, b=-m_s * second, c=-m_s * first, d=m_s / m * (1 + first))
            steps.append((s, s, row))
    return _table(marginals, steps)


def midpoint(path: Path, marginals: Sequence[Marginal], *, space: Space = "flow") -> Table:
    """Solve by the midpoint method: the whole step with the slope at its middle, which an Euler step reaches.

    Raises UserError as `_check_space` does.
    """
    _check_space(marginals, space)
    steps = []
    for t, s in itertools.pairwise(marginals):
        (u, m), (u_s, m_s) = _coordinate(t, space), _coordinate(s, space)
        middle = (u + u_s) / 2
        half = path.marginal_of_ratio(middle if space == "sigma" else middle / (1 - middle))
        _, m_half = _coordinate(half, space)
        slope = (u_s - u) / middle
        steps.append((t, half, euler_row(t, half)))
        steps.append((half, s, Row(a=m_s / m_half * slope, b=-m_s * slope, d=m_s / m)))
    return _table(marginals, steps)


def dpmpp_2m(path: Path, marginals: Sequence[Marginal], *, eta: float = 0.0) -> Table:
    """Solve by DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), an exponential integrator in h = log SNR / 2.

    x0 is extrapolated from its last two values; the first step, which has one value only, and the last, where h is
    infinite, are of first order. eta = 1 solves the SDE (the paper's appendix on SDE solvers, midpoint variant). Raises
    UserError for a negative eta.
    """
    if eta < 0:
        raise UserError(f"sampler.solver.eta={eta} must be at least 0 (deterministic); 1 is the SDE")
    steps, h_prev = [], math.inf
    for t, s in itertools.pairwise(marginals):
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
    return _table(marginals, steps)
