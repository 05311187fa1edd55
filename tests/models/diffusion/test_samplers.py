"""Samplers: their levels, their rows against formulas and public ones, exact propagation, order of convergence, editing."""

import copy
import functools
import itertools
import math

import diffusers
import pytest
import torch
from torch import nn

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Prediction
from genai.kernels.affine_step import Row
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.edm import EDM
from genai.models.diffusion.flow import Flow
from genai.models.diffusion.likelihood import vlb
from genai.models.diffusion.nets.unet import UNet
from genai.models.diffusion.process import schedules
from genai.models.diffusion.process.paths import CLEAN, LinearPath, Marginal, VarianceExploding, to_x0
from genai.models.diffusion.sampling import samplers, tables
from genai.models.diffusion.sampling.guidance import autoguidance, classifier_free_guidance, conditional_denoiser
from genai.models.diffusion.sampling.samplers import sample
from tests.kernels.test_kernels import in_the_interpreter
from tests.models.diffusion.test_diffusion import MEAN, SCHEDULES, VAR, gaussian_model

SPACINGS = ["trailing", "leading", "linspace", "karras", "log_snr"]
SOLVERS = {
    "ddpm": tables.ddpm,
    "ddpm large": functools.partial(tables.ddpm, variance="large"),
    "ddim": tables.ddim,
    "ddim eta 0.5": functools.partial(tables.ddim, eta=0.5),
    "ddim eta 1": functools.partial(tables.ddim, eta=1.0),
    "heun": functools.partial(tables.heun, space="sigma"),
    "heun flow": tables.heun,
    "midpoint": functools.partial(tables.midpoint, space="sigma"),
    "midpoint flow": tables.midpoint,
    "2m": tables.dpmpp_2m,
    "2m sde": functools.partial(tables.dpmpp_2m, eta=1.0),
}


def table_of(name, path, steps, spacing="trailing"):
    return SOLVERS[name](path, tables.discretize(path, steps, spacing))


# The levels


@pytest.mark.parametrize(("T", "steps"), [(1, 1), (7, 3), (200, 50), (200, 200), (1000, 17), (10, 9)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_fall_from_the_noisiest_to_clean_data(T, steps, spacing):
    path = schedules.cosine(T)
    levels = tables.discretize(path, steps, spacing)
    assert len(levels) == steps + 1
    assert levels[-1] == CLEAN
    assert all(t.ratio > s.ratio for t, s in itertools.pairwise(levels))
    assert levels[0].t == T - 1
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1) for level in levels)
    if spacing in ("linspace", "karras", "log_snr") and steps > 1:
        assert levels[-2].t == pytest.approx(0, abs=1e-9)


def test_spacings_are_those_of_their_papers():
    path = schedules.linear(1000)
    times = {s: [level.t for level in tables.discretize(path, 4, s)[:-1]] for s in SPACINGS}
    assert times["trailing"] == [999, 749, 499, 249]
    assert times["leading"] == [999, 500, 250, 0]
    assert times["linspace"] == [999, 666, 333, 0]
    ratios = [level.ratio for level in tables.discretize(path, 4, "karras")[:-1]]
    roots = [r ** (1 / 7) for r in ratios]
    assert [b - a for a, b in itertools.pairwise(roots)] == pytest.approx([roots[1] - roots[0]] * 3)
    logs = [math.log(level.ratio) for level in tables.discretize(path, 4, "log_snr")[:-1]]
    assert [b - a for a, b in itertools.pairwise(logs)] == pytest.approx([logs[1] - logs[0]] * 3)


@pytest.mark.parametrize("path", [schedules.linear(1000), VarianceExploding(), LinearPath()])
@pytest.mark.parametrize("ratio", [0.03, 0.7, 12.0])
def test_the_level_of_a_ratio_has_it(path, ratio):
    level = path.marginal_of_ratio(ratio)
    assert level.ratio == pytest.approx(ratio)
    assert path.marginal(level.t) == pytest.approx(level)


@pytest.mark.parametrize("steps", [0, 11, -1])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(
        UserError, match=rf"sampler\.steps={steps} must be a whole number between 1 and the model's T=10"
    ):
        tables.discretize(schedules.linear(10), steps)


def test_zero_terminal_snr_keeps_the_first_and_empties_the_last():
    plain = schedules.linear(1000)
    s = schedules.zero_terminal_snr(plain)
    assert s.alpha[0] == pytest.approx(plain.alpha[0].item())
    assert s.alpha[-1] == 0
    assert math.isinf(s.marginal(999).ratio)
    theirs = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr(1 - (1 - torch.linspace(1e-4, 0.02, 1000)))
    assert torch.allclose((s.alpha**2).float(), (1 - theirs).cumprod(0), atol=1e-5)


def test_cells_that_cannot_exist_are_refused_by_name():
    pure = schedules.zero_terminal_snr(schedules.linear(100))
    with pytest.raises(UserError, match="parameterization=eps cannot predict x0 from pure noise"):
        gaussian_model("eps", pure)
    for spacing in ("karras", "log_snr"):
        with pytest.raises(UserError, match=f"spacing={spacing} cannot start from pure noise"):
            tables.discretize(pure, 10, spacing)
    for name in ("heun", "midpoint"):
        with pytest.raises(UserError, match="space=sigma cannot start from pure noise"):
            table_of(name, pure, 10)
    with pytest.raises(UserError, match="spacing=linspace would visit clean data"):
        tables.discretize(LinearPath(), 10, "linspace")
    with pytest.raises(UserError, match="'even' must be one of trailing, leading"):
        tables.discretize(pure, 10, "even")
    with pytest.raises(UserError, match="space='flaw' must be one of sigma, flow"):
        tables.heun(pure, tables.discretize(pure, 10), space="flaw")


# The rows


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_with_eta_1_on_all_steps_is_ddpm(make):
    s = make(200)
    ddim, ddpm = table_of("ddim eta 1", s, 200), table_of("ddpm", s, 200)
    x0, x, z = torch.randn(3, 1000, dtype=torch.float64)
    for k, t in enumerate(range(199, 0, -1)):
        a, b, var = vlb.posterior(s, t)  # q(x_{t-1} | x_t, x0), from the formulas of the bound
        assert ddpm.times[k] == ddim.times[k] == t
        assert ddpm.rows[k] == ddim.rows[k]
        r = ddim.rows[k]
        assert torch.allclose(r.a * x + r.b * x0 + r.s * z, a * x + b * x0 + var**0.5 * z, atol=1e-6)


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_ddpm_rows_are_the_posterior_and_the_last_returns_x0(make):
    s = make(50)
    small, large = table_of("ddpm", s, 50), table_of("ddpm large", s, 50)
    for k, t in enumerate(range(49, 0, -1)):
        a, b, var = vlb.posterior(s, t)
        assert small.rows[k].a == pytest.approx(a, rel=1e-9)
        assert small.rows[k].b == pytest.approx(b, rel=1e-9)
        assert small.rows[k].s ** 2 == pytest.approx(var, rel=1e-9)
        assert large.rows[k].s ** 2 == pytest.approx(1 - (s.alpha[t] / s.alpha[t - 1]).item() ** 2, rel=1e-9)
    for name in SOLVERS:
        last = table_of(name, s, 50).rows[-1]
        assert last.d or last == Row(0.0, 1.0, 0.0), "a step by one slope ends in x0"


def test_ddim_row_is_the_papers_formula():
    """Equation 12 with x0 and eps written out, at one (t, s) of a shortened run."""
    s, eta = schedules.linear(100), 0.6
    table = tables.ddim(s, tables.discretize(s, 10), eta=eta)
    t, r = table.times[3], table.times[4]
    abar_t, abar_s = s.alpha_sigma(t)[0] ** 2, s.alpha_sigma(r)[0] ** 2
    std = eta * math.sqrt((1 - abar_s) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_s)
    x, x0 = 0.8, -0.3
    eps = (x - math.sqrt(abar_t) * x0) / math.sqrt(1 - abar_t)
    expected = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s - std**2) * eps
    assert table.rows[3].a * x + table.rows[3].b * x0 == pytest.approx(expected, abs=1e-12)
    assert table.rows[3].s == pytest.approx(std, abs=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_say_where_they_lead(name):
    """With x0 known, a state on the path stays on it: its mean is alpha x0 + sigma eps at every row's level."""
    path, x0, eps = schedules.cosine(100), 0.7, -1.3
    table = table_of(name, path, 10)
    x, x_base = table.start.alpha * x0 + table.start.sigma * eps, 0.0
    for row in table.rows:
        x, x_base = row.a * x + (row.b + row.c) * x0 + row.d * x_base, x
        kept = max(row.sigma**2 - row.s**2, 0) ** 0.5 if row.s else row.sigma
        assert name == "ddpm large" or x == pytest.approx(row.alpha * x0 + kept * eps, abs=1e-9)
        x = row.alpha * x0 + row.sigma * eps


# Exact propagation on Gaussian data


def propagated(table, affine, steps_z, x):
    """What the rows make of x and the noises where x0 = gain x + offset, by linear algebra on coefficient vectors."""
    basis = torch.zeros(3, 2 + steps_z, dtype=torch.float64)  # of x, of 1, of each z
    state, one = basis.clone(), basis.clone()
    state[:, 0], one[:, 1] = 1, 1
    base, x0_prev = basis, basis
    for k, (t, row) in enumerate(zip(table.times, table.rows, strict=True)):
        gain, offset = affine(t)
        x0 = gain[:, None] * state + offset[:, None] * one
        new = row.a * state + row.b * x0 + row.c * x0_prev + row.d * base
        new[:, 2 + k] += row.s
        state, base, x0_prev = new, state, x0
    return state


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_output_on_gaussian_data_is_what_the_rows_propagate(name, kind, make):
    torch.manual_seed(0)
    path = make(50)
    model = gaussian_model(kind, path)
    rounding = 1 / path.alpha[-1].item() if kind == "eps" else 1.0  # by which x0 = (x - sigma eps) / alpha cancels
    for steps, spacing in ((7, "trailing"), (5, "karras"), (5, "leading")):
        table, seeds = table_of(name, path, steps, spacing), rng.seed_range(7, 4)
        n, x = len(table.rows), torch.randn(4, 3, dtype=torch.float64)
        state = propagated(table, model.net.affine, n, x)
        z = torch.stack([rng.normal(seeds, (3,), row=k, stream=rng.STEP).double() for k in range(n)])  # (n, 4, 3)
        expected = state[:, 0] * x + state[:, 1] + torch.einsum("dk,kbd->bd", state[:, 2:], z)
        out = samplers.run_table(model.denoise, table, x, seeds)
        assert (out - expected).abs().max() < max(1e-10, 3e-13 * rounding) * max(1.0, expected.abs().max().item())


def exact(path, t):
    """(slope, offset) of E[x0 | x] at a level of any path, each (3,)."""
    _, alpha, sigma = path.marginal(t)
    gain = alpha * VAR / (alpha**2 * VAR + sigma**2)
    return gain, MEAN - gain * alpha * MEAN


class ExactEDM(nn.Module):
    """F of eq. 7, solved from the exact D."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, time):
        log_low, log_high = math.log(0.002), math.log(80.0)
        sigma = torch.exp(log_low + time[:, None] / 1000 * (log_high - log_low))
        c_skip, c_out, c_in = self.preconditioning(sigma)
        gain, offset = exact(VarianceExploding(), sigma)
        return (gain * x / c_in + offset - c_skip * x / c_in) / c_out


class ExactFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, time):
        t = time[:, None] / 1000
        gain, offset = exact(LinearPath(), t)
        return (x - gain * x - offset) / t  # eps - x0, with eps = (x - (1 - t) x0) / t


def continuous(kind):
    if kind == "flow":
        return Flow(ExactFlow(), [3], "vector")
    model = EDM(ExactEDM(), [3], 0.75, "vector")
    model.net.preconditioning = model.preconditioning
    return model


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("kind", "spacing"),
    [("edm", "karras"), ("edm", "log_snr"), ("edm", "trailing"), ("edm", "linspace"), ("flow", "trailing")],
)
def test_continuous_models_do_what_the_rows_propagate(name, kind, spacing):
    model = continuous(kind)
    levels = tables.discretize(model.path, 6, spacing)
    if kind == "flow" and name in ("heun", "midpoint"):
        with pytest.raises(UserError, match="space=sigma cannot start from pure noise"):
            SOLVERS[name](model.path, levels)
        return
    table, seeds = SOLVERS[name](model.path, levels), rng.seed_range(7, 4)
    n, x = len(table.rows), table.start.sigma * torch.randn(4, 3, dtype=torch.float64)
    state = propagated(table, functools.partial(exact, model.path), n, x)
    z = torch.stack([rng.normal(seeds, (3,), row=k, stream=rng.STEP).double() for k in range(n)])
    expected = state[:, 0] * x + state[:, 1] + torch.einsum("dk,kbd->bd", state[:, 2:], z)
    assert (samplers.run_table(model.denoise, table, x, seeds) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", SOLVERS)
def test_moments_approach_the_data_as_steps_grow(name):
    path = schedules.log_snr(1000, 20, -20)
    model, errors = gaussian_model("v", path), []
    for steps in (10, 80, 640):
        table = table_of(name, path, steps, "log_snr")
        state = propagated(table, model.net.affine, len(table.rows), None)
        mean, std = state[:, 1], (state[:, 0] ** 2 + (state[:, 2:] ** 2).sum(1)).sqrt()
        errors.append(max((mean - MEAN).abs().max().item(), (std - VAR.sqrt()).abs().max().item()))
    assert errors[0] > errors[1]
    assert errors[1] > errors[2] or errors[2] < 1e-3  # second-order solvers have arrived
    assert errors[2] < 0.05


# Order of convergence


MEANS, STDS, WEIGHTS = torch.tensor([[-1.5, 0.2, 1.1], [0.3, 0.5, 0.2], [0.3, 0.5, 0.2]], dtype=torch.float64)


def mixture(path):
    """The exact denoiser of a mixture of three Gaussians on the line."""

    def denoise(x, t):
        _, alpha, sigma = path.marginal(t)
        var = (alpha * STDS) ** 2 + sigma**2
        log_weight = WEIGHTS.log() - 0.5 * var.log() - 0.5 * (x - alpha * MEANS) ** 2 / var
        mean = MEANS + alpha * STDS**2 / var * (x - alpha * MEANS)
        return Prediction((log_weight.softmax(-1) * mean).sum(-1, keepdim=True))

    return denoise


@functools.cache
def solved(path, name, steps):
    """Carried from the path's noisiest level to its least noisy one, not to clean data, whose jump hides the order."""
    table = SOLVERS[name](path, tables.discretize(path, steps + 1, "log_snr")[:-1])
    x = path.marginal(path.t_max).sigma * torch.linspace(-2, 2, 32, dtype=torch.float64)[:, None]
    return samplers.run_table(mixture(path), table, x, torch.zeros(32, dtype=torch.int64))


@pytest.mark.parametrize("path", [VarianceExploding(0.05, 20.0), LinearPath(0.05, 0.95)], ids=["sigma", "flow"])
@pytest.mark.parametrize(
    ("name", "order"),
    [("ddim", 1), ("heun", 2), ("heun flow", 2), ("midpoint", 2), ("midpoint flow", 2), ("2m", 2)],
)
def test_order_of_convergence(path, name, order):
    reference = solved(path, "heun", 4_000)
    steps = (10, 20, 40, 80, 160)
    errors = torch.stack([(solved(path, name, n) - reference).abs().mean() for n in steps])
    slope = torch.linalg.lstsq(
        torch.stack([torch.tensor(steps, dtype=torch.float64).log2(), torch.ones(5, dtype=torch.float64)], 1),
        errors.log2()[:, None],
    ).solution[0]
    assert -slope.item() == pytest.approx(order, abs=0.2)


# Public samplers, given the same network outputs

STEPS = 12


def theirs_and_ours(scheduler, solver, vp, z=None):
    """Their loop and ours over their own sigmas, from one noise, through the same eps; float64."""
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    if isinstance(scheduler, diffusers.HeunDiscreteScheduler):
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])  # theirs repeats each
    visited = []
    for k, ratio in enumerate(sigmas.tolist()):
        alpha = (1 + ratio**2) ** -0.5 if vp else 1.0
        visited.append(Marginal(k, alpha, ratio * alpha))
    table = solver(None, visited)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) * visited[0].sigma
    outs = torch.randn(len(table.rows), *x.shape, generator=generator, dtype=torch.float64)
    theirs, seeds = x, rng.seed_range(0, 2)
    for k, t in enumerate(scheduler.timesteps):
        noise = rng.normal(seeds, x.shape[1:], row=k, stream=rng.STEP).double()
        if z is not None:
            z(noise)
        extra = {"variance_noise": noise} if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler) else {}
        theirs = scheduler.step(outs[k], t, theirs, **extra).prev_sample
    calls = iter(outs)

    def denoise(x, t):
        p, q = to_x0("eps", visited[t].alpha, visited[t].sigma)
        return Prediction(next(calls), p=p, q=q)

    return theirs, samplers.run_table(denoise, table, x, seeds)


PUBLIC = {
    "euler": (diffusers.EulerDiscreteScheduler, {}, tables.ddim, False),
    "heun": (diffusers.HeunDiscreteScheduler, {}, functools.partial(tables.heun, space="sigma"), False),
    "dpmpp_2m": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++"},
        tables.dpmpp_2m,
        True,
    ),
    "dpmpp_2m karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
        tables.dpmpp_2m,
        True,
    ),
    "dpmpp_2m_sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        functools.partial(tables.dpmpp_2m, eta=1.0),
        True,
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_equals_diffusers(name):
    make, arguments, solver, vp = PUBLIC[name]
    theirs, ours = theirs_and_ours(make(1000, **arguments), solver, vp)
    assert (theirs - ours).abs().max() < 1e-4 * theirs.abs().max()


def test_euler_ancestral_equals_diffusers(monkeypatch):
    drawn = []
    module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: drawn[-1])
    scheduler = diffusers.EulerAncestralDiscreteScheduler(1000)
    solver = functools.partial(tables.ddim, eta=1.0)
    theirs, ours = theirs_and_ours(scheduler, solver, False, drawn.append)
    assert (theirs - ours).abs().max() < 1e-4 * theirs.abs().max()


def test_2m_is_k_diffusions():
    """sample_dpmpp_2m of k-diffusion (Crowson), its formulas written out: sigma(t) = exp(-t), x in the exploding view."""
    sigmas = [level.t for level in tables.discretize(VarianceExploding(), 9, "karras")[:-1]] + [0.0]
    outs = torch.randn(9, 5, dtype=torch.float64)
    x = y = torch.randn(5, dtype=torch.float64) * sigmas[0]
    old = None
    for i in range(9):
        t, t_next = -math.log(sigmas[i]), -math.log(sigmas[i + 1]) if sigmas[i + 1] else math.inf
        h = t_next - t
        if old is None or sigmas[i + 1] == 0:
            x = sigmas[i + 1] / sigmas[i] * x - math.expm1(-h) * outs[i]
        else:
            r = (t + math.log(sigmas[i - 1])) / h
            x = sigmas[i + 1] / sigmas[i] * x - math.expm1(-h) * ((1 + 1 / (2 * r)) * outs[i] - 1 / (2 * r) * old)
        old = outs[i]
    calls = iter(outs)
    table = table_of("2m", VarianceExploding(), 9, "karras")
    ours = samplers.run_table(
        lambda *_: Prediction(next(calls)[None]), table, y[None], torch.zeros(1, dtype=torch.int64)
    )
    assert torch.allclose(ours[0], x, atol=1e-10)


# Running a model


def tiny_unet(classes=10):
    torch.manual_seed(0)
    net = UNet([1, 8, 8], 8, [1, 2], 1, [4], classes)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.1)
    return DDPM(net, schedules.cosine(50), [1, 8, 8], classes=classes, guidance=1.5).eval()


FAMILIES = [tables.ddim, tables.ddpm, tables.heun, tables.midpoint, tables.dpmpp_2m]
ddim = functools.partial(sample, solver=tables.ddim)


def of(table):
    """The solver that has but one table."""
    return lambda path, levels: table


@pytest.mark.parametrize("solver", FAMILIES, ids=lambda f: f.__name__)
def test_a_sample_is_the_same_in_any_batch(solver):
    model = tiny_unet()
    seeds, label = rng.seed_range(3, 16), torch.arange(16) % 10
    whole = sample(model, seeds, {"label": label}, solver=solver, steps=5)["image"]
    for size in (1, 4):
        for first in range(0, 16, size):
            part = slice(first, first + size)
            x = sample(model, seeds[part], {"label": label[part]}, solver=solver, steps=5)["image"]
            assert (x - whole[part]).abs().max() < 1e-4
    assert whole.flatten(1).std(0).min() > 0.01  # samples differ from each other


IN_TRITON = """
import functools, torch
torch.set_num_threads(1)
from genai.core import rng
from genai.models.diffusion.sampling import samplers, tables
from tests.models.diffusion.test_samplers import tiny_unet
model, seeds, label = tiny_unet(), rng.seed_range(3, 16), torch.arange(16) % 10
for solver in (functools.partial(tables.ddim, eta=1.0), tables.dpmpp_2m):
    draw = functools.partial(samplers.sample, solver=solver, steps=4, spacing="log_snr")
    whole = draw(model, seeds, {"label": label}, impl="torch")["image"]
    for size in (1, 4, 16):
        for first in range(0, 16, 4 if size == 1 else size):
            part = slice(first, first + size)
            x = draw(model, seeds[part], {"label": label[part]}, impl="triton")["image"]
            assert (x - whole[part]).abs().max() < 1e-4, (size, first)
"""


def test_interpreted_triton_gives_the_samples_of_torch_in_any_batch():
    in_the_interpreter(IN_TRITON)


def test_guidance_extrapolates_from_the_null_and_1_is_none():
    model = tiny_unet()
    x, cond = torch.randn(2, 1, 8, 8), {"label": torch.tensor([3, 4])}
    c, u = model.denoise(x, 20, cond), model.denoise(x, 20, {"label": torch.tensor([10, 10])})
    assert torch.equal(model.denoise(x, 20).out, u.out)
    condition = model.encode_conditions(cond, 2)
    guided = classifier_free_guidance(model, condition, 3.0)(x, 20)
    expected = c.p * x + c.q * (u.out + 3.0 * (c.out - u.out))
    assert torch.allclose(guided.x0(x), expected, atol=1e-4)
    assert (guided.out_uncond - u.out).abs().max() < 1e-5
    for w, out in ((0.0, u.out), (1.0, c.out)):
        alone = classifier_free_guidance(model, condition, w)(x, 20)
        assert alone.out_uncond is None and torch.equal(alone.out, out)


def worse_than(model):
    worse = copy.deepcopy(model)
    with torch.no_grad():
        for p in worse.parameters():
            p.mul_(0.9)
    return worse


def test_autoguidance_extrapolates_from_the_worse_model():
    model = tiny_unet()
    worse = worse_than(model)
    x, cond = torch.randn(2, 1, 8, 8), {"label": torch.tensor([3, 4])}
    ours, theirs = (conditional_denoiser(m, m.encode_conditions(cond, 2)) for m in (model, worse))
    guided = autoguidance(ours, theirs, 2.0)(x, 20)
    better, other = model.denoise(x, 20, cond), worse.denoise(x, 20, cond)
    assert torch.allclose(guided.x0(x), other.x0(x) + 2 * (better.x0(x) - other.x0(x)), atol=1e-4)
    worse.parameterization = "v"
    with pytest.raises(UserError, match="autoguidance= must be a model of the same path"):
        autoguidance(ours, theirs, 2.0)(x, 20)


def test_guidance_acts_within_its_interval():
    """Two calls a step in one of twice the batch there, one of the batch elsewhere."""
    model, seen = tiny_unet(), []
    model.clip = None
    model.net.register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))
    seeds, cond = torch.arange(2), {"label": torch.tensor([3, 4])}
    draw = functools.partial(ddim, model, seeds, cond, steps=10)
    table = table_of("ddim", model.path, 10)
    limited = draw(guidance=3.0, guidance_interval=[0.2, 2.0])["image"]
    assert seen == [4 if 0.2 < model.path.marginal(t).ratio <= 2.0 else 2 for t in table.times]
    assert 2 in seen and 4 in seen
    never, always = draw(guidance=1.0)["image"], draw(guidance=3.0)["image"]
    assert torch.equal(draw(guidance=3.0, guidance_interval=[None, None])["image"], always)
    assert torch.equal(draw(guidance=3.0, guidance_interval=[1e5, None])["image"], never)
    assert not torch.equal(limited, never) and not torch.equal(limited, always)


def test_on_step_sees_every_state():
    model, seen = gaussian_model(), []
    ddim(model, rng.seed_range(0, 2), None, lambda i, n, state: seen.append((i, n, state["x"].shape)), steps=5)
    assert seen == [(i, 5, (2, 3)) for i in range(5)]


def test_a_network_that_gives_nan_is_named_with_its_step():
    model = gaussian_model()
    forward = model.net.forward
    model.net.forward = lambda x, time: forward(x, time) * (torch.nan if time[0] < 500 else 1)
    with pytest.raises(UserError, match=r"output is not finite at step 3 of 5 \(t = 19\)"):
        ddim(model, rng.seed_range(0, 2), steps=5)


# Editing


@pytest.mark.parametrize("name", ["ddim", "ddpm", "2m"])
def test_inpainting_ends_in_the_known_part_and_follows_it_with_noise(name):
    model, seeds = gaussian_model(), rng.seed_range(0, 3)
    known, mask = torch.randn(3, 3, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0]).double().expand(3, 3)
    table, states = table_of(name, model.path, 10), []
    x = rng.normal(seeds, (3,), stream=rng.INITIAL).double()
    out = samplers.run_table(
        model.denoise, table, x, seeds, on_step=lambda i, n, s: states.append(s["x"]), known=known, mask=mask
    )
    assert torch.equal(out[:, 0], known[:, 0])
    for k, row in enumerate(table.rows):
        z = rng.normal(seeds, (3,), row=k, stream=rng.MASK).double()
        assert torch.allclose(states[k][:, 0], (row.alpha * known + row.sigma * z)[:, 0])
    free = samplers.run_table(model.denoise, table, x, seeds)
    assert torch.allclose(out[:, 1:], free[:, 1:])  # coordinates of this Gaussian are independent


# Where they start, and their conditions


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["ddpm", "edm", "flow"])
def test_every_solver_starts_at_the_state_its_first_level_says(kind, solver, spacing):
    """Noise alone is the state of the noisiest level, and of no other."""
    model, seen = gaussian_model() if kind == "ddpm" else continuous(kind), []
    denoise = model.denoise
    model.denoise = lambda x, t, cond=None: seen.append((t, x)) or denoise(x, t, cond)
    seeds = rng.seed_range(5, 3)
    for steps in (1, 4):
        seen.clear()
        if kind == "flow" and spacing != "trailing":
            with pytest.raises(UserError, match="use trailing"):
                sample(model, seeds, solver=solver, steps=steps, spacing=spacing)
            continue
        sample(model, seeds, solver=solver, steps=steps, spacing=spacing)
        t, x = seen[0]
        assert t == pytest.approx(model.path.t_max)
        level = model.path.marginal(t)
        assert torch.allclose(x, level.sigma * rng.normal(seeds, (3,), stream=rng.INITIAL).to(x))


@pytest.mark.parametrize(
    ("cond", "sentence"),
    [
        ({"lable": torch.tensor([1, 2])}, "cond has lable, but this model takes label"),
        (
            {"label": torch.tensor([1, 2]), "negative": torch.tensor([1, 2])},
            "cond has negative, but this model takes label",
        ),
        ({"label": torch.tensor([1])}, r"label is int64 \[1\], but 2 samples of this model take int64 \[2\]"),
        ({"label": torch.tensor(1)}, r"label is int64 \[\], but 2 samples"),
        ({"label": torch.tensor([1.0, 2.0])}, r"label is float32 \[2\], but 2 samples"),
    ],
)
def test_conditions_that_a_model_does_not_take_are_refused(cond, sentence):
    model = tiny_unet()
    for solver in FAMILIES:
        with pytest.raises(UserError, match=sentence):
            sample(model, torch.arange(2), cond, solver=solver, steps=1)


def test_fields_that_are_not_conditions_are_left_out():
    model, seeds = tiny_unet(classes=None), torch.arange(2)
    model.classes = None
    plain = ddim(model, seeds, None, steps=2)["image"]
    assert torch.equal(ddim(model, seeds, {"label": torch.tensor([1, 2])}, steps=2)["image"], plain)


def test_samples_are_ordinary_tensors():
    """What a sampler returns or shows can be used where gradients are computed."""
    model, seen = gaussian_model(), []
    batch = ddim(model, torch.arange(2), None, lambda i, n, state: seen.append(state["x"]), steps=2)
    assert not any(x.is_inference() for x in (*batch.values(), *seen))
    (batch["vector"].requires_grad_() * seen[0]).sum().backward()
