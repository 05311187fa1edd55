"""The sampler of diffusion: every key with every solver on every path, with the exact denoiser of a mixture of Gaussians."""

import functools
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from genai.checkpoint.build import build_typed
from genai.core import rng
from genai.core.errors import UserError
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.edm import EDM
from genai.models.diffusion.flow import Flow
from genai.models.diffusion.process import schedules
from genai.models.diffusion.process.paths import to_x0
from genai.models.diffusion.sampling import samplers, tables
from genai.models.diffusion.sampling.samplers import sample
from tests.conftest import ROOT

MEANS, STD, SHAPE = (-0.5, 0.5), 0.15, (1, 2, 2)


class Mixture(nn.Module):
    """The exact denoiser of a mixture of two Gaussians, one for each label 0 and 1; the null label 2 stands for both.

    `scale` blurs the data that it assumes.
    """

    def __init__(self, kind: str, scale: float = 1.0):
        super().__init__()
        self.kind, self.scale = kind, scale
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, time, label):
        time = time[0].item()
        if self.kind == "edm":
            level, (p, q, c_in) = self.model.path.marginal(sigma := self.sigma(time)), self.model.preconditioning(sigma)
            x = x / c_in
        else:
            level = self.model.path.marginal(time * 200 / 1000 if self.kind == "ddpm" else time / 1000)
            p, q = to_x0("v" if self.kind == "ddpm" else "flow", level.alpha, level.sigma)
        weights = torch.tensor([[1.0, 1e-300], [1e-300, 1.0], [0.5, 0.5]], dtype=torch.float64)[label]  # (B, 2)
        means, var = torch.tensor(MEANS, dtype=torch.float64), (self.scale * STD) ** 2
        total = level.alpha**2 * var + level.sigma**2
        apart = x.flatten(1)[:, None] - level.alpha * means[:, None]  # (B, 2, pixels)
        share = (weights.log() - 0.5 * (apart**2).sum(2) / total).softmax(1)[..., None]
        x0 = (share * (means[:, None] + level.alpha * var / total * apart)).sum(1).view_as(x)
        return (x0 - p * x) / q

    def sigma(self, time):
        low, high = math.log(self.model.path.t_min), math.log(self.model.path.t_max)
        return math.exp(low + time / 1000 * (high - low))


@functools.cache
def exact(kind, scale=1.0):
    net, rest = Mixture(kind, scale), {"classes": 2, "clip": None}
    made = {
        "ddpm": lambda: DDPM(net, schedules.cosine(200), SHAPE, parameterization="v", **rest),
        "edm": lambda: EDM(net, SHAPE, 0.5, **rest),
        "flow": lambda: Flow(net, SHAPE, **rest),
    }[kind]().eval()
    net.__dict__["model"] = made
    return made


def images(n=6):
    """Half of each label."""
    noise = rng.normal(rng.seed_range(9, n), SHAPE).double()
    return torch.tensor(MEANS).double().repeat(n // 2)[:, None, None, None] + STD * noise


SOLVERS = {
    "ddim": tables.ddim,
    "ddim eta 0.5": functools.partial(tables.ddim, eta=0.5),
    "ddpm": tables.ddpm,
    "ddpm large": functools.partial(tables.ddpm, variance="large"),
    "heun": tables.heun,
    "midpoint": tables.midpoint,
    "dpmpp_2m": tables.dpmpp_2m,
    "dpmpp_2m_sde": functools.partial(tables.dpmpp_2m, eta=1.0),
}
NOISY = ("ddim eta 0.5", "ddpm", "ddpm large", "dpmpp_2m_sde")
SEEDS, LABEL = rng.seed_range(3, 6), {"label": torch.arange(6) % 2}
PAIRS = list(itertools.product(("ddpm", "edm", "flow"), SOLVERS))
everywhere = pytest.mark.parametrize(("kind", "solver"), PAIRS, ids=[f"{kind}-{solver}" for kind, solver in PAIRS])


class Watch:
    """Notes the state, time and size of the batch of each network call."""

    def __init__(self, model, monkeypatch):
        self.calls, denoise = [], type(model).denoise

        def watched(x, t, cond=None):
            self.calls.append((x, t, len(x)))
            return denoise(model, x, t, cond)

        monkeypatch.setattr(model, "denoise", watched)

    def levels(self, model, solver):
        """Those of the first call of each step."""
        times = [t for _, t, _ in self.calls][:: 2 if solver in ("heun", "midpoint") else 1]
        return [model.path.marginal(t) for t in times]


def draw(kind, solver, cond=LABEL, steps=8, **keys):
    return sample(exact(kind), SEEDS, cond, solver=SOLVERS[solver], steps=steps, **keys)


def near(x, label, tolerance=0.35):
    """Whether samples are of the labels asked for."""
    return (x.mean((1, 2, 3)) - torch.tensor(MEANS).double()[label]).abs().max() < tolerance


@everywhere
def test_samples_are_of_the_data(kind, solver):
    x = draw(kind, solver, steps=30)["image"]
    assert near(x, LABEL["label"])
    assert draw(kind, solver, None, steps=30)["image"].mean((1, 2, 3)).abs().min() > 0.2  # of one or the other


@everywhere
def test_an_image_starts_at_the_level_asked_for(kind, solver, monkeypatch):
    """Multistep solvers too, and no step is left out below it."""
    model = exact(kind)
    for strength in (0.3, 0.6, 0.9):
        watch = Watch(model, monkeypatch)
        x = draw(kind, solver, image=images(), strength=strength)["image"]
        levels = watch.levels(model, solver)
        assert levels[0].noise_fraction == pytest.approx(strength, abs=1e-6)
        eps = rng.normal(SEEDS, SHAPE, stream=rng.INITIAL).double()
        assert torch.allclose(watch.calls[0][0], levels[0].alpha * images() + levels[0].sigma * eps, atol=1e-6)
        whole = tables.discretize(model.path, 8, model.path.spacing)
        assert [a.noise_fraction for a in levels[1:]] == pytest.approx(
            [a.noise_fraction for a in whole[-len(levels) : -1]]
        )
        assert len(levels) == min(range(1, 9), key=lambda k: abs(math.log(whole[-k - 1].ratio * (1 / strength - 1))))
        assert near(x, LABEL["label"])
    kept = draw(kind, solver, None, image=images(), strength=0.05)["image"]
    assert (kept - images()).abs().max() < 0.25
    with pytest.raises(UserError, match=r"strength=1.5 must be a number"):
        draw(kind, solver, image=images(), strength=1.5)


@everywhere
def test_a_mask_keeps_the_known_part_and_the_rest_agrees_with_it(kind, solver):
    mask, many = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double().expand(6, *SHAPE), images(60)
    keys = {"solver": SOLVERS[solver], "steps": 20, "image": many, "mask": mask[:1]}
    x = sample(exact(kind), rng.seed_range(0, 60), None, **keys)["image"]
    assert torch.equal(x[:, :, 0], many[:, :, 0])
    filled = x[:, :, 1].mean((1, 2))
    assert (filled.sign() == many.mean((1, 2, 3)).sign()).float().mean() > 0.8 and filled.abs().max() < 1
    assert torch.equal(draw(kind, solver, None, image=images(), mask=torch.ones(6, *SHAPE))["image"], images())
    both = draw(kind, solver, None, image=images(), mask=mask, strength=0.2)["image"]
    assert torch.equal(both[:, :, 0], images()[:, :, 0]) and (both - images()).abs().max() < 0.8


@everywhere
def test_an_image_s_noise_leads_back_to_it(kind, solver):
    if solver in NOISY:
        with pytest.raises(UserError, match="invert=true needs a sampler that adds no noise"):
            draw(kind, solver, image=images(), invert=True)
        return
    back = draw(kind, solver, None, steps=50, image=images(), invert=True)["image"]
    assert (back - images()).square().mean().sqrt() < 0.05
    other = draw(kind, solver, {"label": 1 - LABEL["label"]}, steps=50, image=images(), invert=True)["image"]
    assert near(other, 1 - LABEL["label"])


@everywhere
def test_guidance_is_twice_the_batch_in_its_interval_and_not_elsewhere(kind, solver, monkeypatch):
    model = exact(kind)
    for w, interval in ((2.0, None), (2.0, [0.3, 3.0]), (1.0, None), (0.0, None)):
        watch = Watch(model, monkeypatch)
        draw(kind, solver, guidance=w, guidance_interval=interval)
        low, high = interval or (None, None)
        acts = [(low or 0) < model.path.marginal(t).ratio <= (high or math.inf) and w == 2 for _, t, _ in watch.calls]
        assert [n for *_, n in watch.calls] == [12 if inside else 6 for inside in acts]
        assert interval is None or len(set(acts)) == 2
    assert torch.allclose(draw(kind, solver, guidance=0)["image"], draw(kind, solver, None)["image"])


@everywhere
def test_autoguidance_leads_away_from_a_worse_model(kind, solver, monkeypatch):
    worse = exact(kind, 3.0)
    watch = Watch(worse, monkeypatch)
    x = draw(kind, solver, steps=16, guidance=2.0, autoguidance=worse)["image"]
    alone, bad = (
        draw(kind, solver, steps=16)["image"],
        sample(worse, SEEDS, LABEL, solver=SOLVERS[solver], steps=16)["image"],
    )
    assert {n for *_, n in watch.calls} == {6}
    spread = lambda x: (x - torch.tensor(MEANS)[LABEL["label"]][:, None, None, None]).square().mean()  # noqa: E731
    assert spread(x) < spread(alone) < spread(bad)
    with pytest.raises(UserError, match="autoguidance= changes nothing at guidance=1"):
        draw(kind, solver, autoguidance=worse)


@everywhere
def test_other_ends_and_a_shift_move_the_levels(kind, solver, monkeypatch):
    model = exact(kind)
    for spacing in ("trailing", "linspace", "karras"):
        watch = Watch(model, monkeypatch)
        draw(kind, solver, spacing=spacing, sigma_min=0.05, sigma_max=20.0)
        ratios = [level.ratio for level in watch.levels(model, solver)]
        assert len(ratios) == 8 and all(a > b for a, b in itertools.pairwise(ratios))
        assert ratios[0] == pytest.approx(20, rel=1e-6) and ratios[-1] > 0.05 * (1 - 1e-6)
        assert spacing == "trailing" or ratios[-1] == pytest.approx(0.05, rel=1e-6)
    for shift in (3.0, 1 / 3):
        watch = Watch(model, monkeypatch)
        draw(kind, solver, shift=shift)
        plain = tables.discretize(model.path, 8, model.path.spacing)[:-1]
        moved = watch.levels(model, solver)
        assert moved[0] == pytest.approx(plain[0])
        assert all((a.ratio > b.ratio) == (shift > 1) for a, b in zip(moved[1:-1], plain[1:-1], strict=True))
        if kind == "flow":  # the formula of the paper
            expected = [shift * level.t / (1 + (shift - 1) * level.t) for level in plain]
            assert [level.t for level in moved] == pytest.approx(expected)


@everywhere
def test_frames_show_the_way(kind, solver):
    states = []
    watch = lambda i, n, state: states.append(state["x"])  # noqa: E731
    batch = sample(exact(kind), SEEDS, LABEL, watch, solver=SOLVERS[solver], steps=8, frames=True)
    frames = batch["frames"]
    assert frames.shape == (6, len(states) + 1, *SHAPE)
    assert torch.equal(frames[:, -1], batch["image"]) and torch.equal(batch["image"], draw(kind, solver)["image"])
    first = exact(kind).path.marginal(exact(kind).path.t_max)
    eps = rng.normal(SEEDS, SHAPE, stream=rng.INITIAL).double()
    assert torch.allclose(frames[:, 0], first.sigma * eps / (first.alpha + first.sigma))


@pytest.mark.parametrize("kind", ["ddpm", "edm", "flow"])
def test_ancestral_sampling_takes_one_call_a_step(kind, monkeypatch):
    """All T of a discrete path; the number asked for, or the papers', of others."""
    assert samplers.CONTINUOUS_STEPS == 1000
    monkeypatch.setattr(samplers, "CONTINUOUS_STEPS", 30)
    for steps, calls in ((7, 7), (None, 200 if kind == "ddpm" else 30)):
        watch = Watch(exact(kind), monkeypatch)
        draw(kind, "ddpm", steps=steps)
        assert len(watch.calls) == calls


def test_each_path_names_the_spacing_that_it_is_sampled_with(monkeypatch):
    for kind, spacing in (("ddpm", "trailing"), ("edm", "karras"), ("flow", "trailing")):
        for solver in ("heun", "dpmpp_2m_sde"):
            assert torch.equal(draw(kind, solver)["image"], draw(kind, solver, spacing=spacing)["image"])


NODES = {path.stem: OmegaConf.load(path) for path in sorted((ROOT / "conf" / "sampler").glob("*.yaml"))}
DIFFUSION = [name for name, node in NODES.items() if node._target_ == "genai.models.diffusion.sampling.samplers.sample"]


@pytest.mark.parametrize("kind", ["ddpm", "edm", "flow"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_a_sampler_as_it_comes_is_near_the_data_in_few_steps(kind, name):
    if kind == "flow" and NODES[name].spacing:
        pytest.skip("karras would visit clean data, where this path ends")
    node: Any = OmegaConf.to_container(NODES[name])
    x = build_typed({**node, "steps": 10})(exact(kind), SEEDS, LABEL)["image"]
    away = x - torch.tensor(MEANS).double()[LABEL["label"]][:, None, None, None]
    assert away.square().mean().sqrt() < 3 * STD


def test_heun_steps_in_the_coordinate_of_its_paper_on_the_path_of_its_paper():
    for kind, space in (("ddpm", "flow"), ("edm", "sigma"), ("flow", "flow")):
        path = exact(kind).path
        levels = tables.discretize(path, 6, path.spacing)
        assert tables.heun(path, levels, space=None) == tables.heun(path, levels, space=space)
    assert NODES["heun"].solver.space is None


ELSEWHERE: Any = Flow(nn.Identity(), SHAPE, "image")
ELSEWHERE.latent = SimpleNamespace(codec=SimpleNamespace(pretrained_from=("a", "ema", True)))
REFUSED = {
    "strength= says what to do with a given image": {"strength": 0.5},
    "mask= says what to do with a given image": {"mask": torch.ones(6, *SHAPE)},
    "invert= says what to do with a given image": {"invert": True},
    "image= alone changes nothing: give strength= below 1": {"image": images()},
    r"image has shape \[5, 1, 2, 2\], but 6 samples of this model start from \[6, 1, 2, 2\]": {
        "image": images()[:5],
        "strength": 0.5,
    },
    r"mask has shape \[6, 1, 2, 3\], but the image has \[6, 1, 2, 2\]": {
        "image": images(),
        "mask": torch.ones(6, 1, 2, 3),
    },
    r"sampler.sigma_max=1000 is out of range: this model is trained for sigma / alpha from 0.002 to 80": {
        "sigma_max": 1000
    },
    r"sampler.sigma_min=0.001 is out of range: .* from 0.002 to 80": {"sigma_min": 0.001},
    r"sampler.sigma_min=30 is out of range: .*, and it must lie below sampler.sigma_max=20": {
        "sigma_min": 30,
        "sigma_max": 20,
    },
    r"sampler.rho=0 must be a number greater than 0": {"rho": 0},
    r"sampler.rho=0.1 is too small for noise from 0.002 to 80: give 1 or more": {"rho": 0.1},
    r"sampler.rho=0.001 is too small for noise from 39 to 40": {"rho": 0.001, "sigma_min": 39, "sigma_max": 40},
    r"sampler.shift=-1 must be a number greater than 0": {"shift": -1},
    r"strength=0.001 must be at least 0.001996": {"image": images(), "strength": 0.001},
    r"guidance_interval= changes nothing at guidance=1": {"guidance_interval": [0.1, 1]},
    r"guidance_interval=\[2, 1\] must be \[low,high\] of sigma / alpha": {"guidance": 2.0, "guidance_interval": [2, 1]},
    r"autoguidance= at guidance=0 is the worse model alone": {"guidance": 0.0, "autoguidance": exact("edm")},
    r"autoguidance= is a model of \[3\], and this one is of \[1, 2, 2\]": {
        "guidance": 2.0,
        "autoguidance": Flow(nn.Identity(), [3], "image"),
    },
    r"autoguidance= has a different first stage from this model": {"guidance": 2.0, "autoguidance": ELSEWHERE},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_go_together_is_refused(sentence):
    with pytest.raises(UserError, match=sentence):
        draw("edm", "ddim", **REFUSED[sentence])


def test_a_path_that_ends_in_pure_noise_or_clean_data_takes_other_spacings_between_ends_of_its_own():
    for spacing in ("karras", "log_snr", "leading", "linspace"):
        with pytest.raises(UserError, match=f"spacing={spacing} would visit clean data"):
            draw("flow", "ddim", spacing=spacing)
    with pytest.raises(UserError, match=r"spacing=karras cannot start from pure noise .* give sampler.sigma_max"):
        draw("flow", "ddim", spacing="karras", sigma_min=0.01)


def test_frames_are_of_as_many_samples_as_memory_is_for(monkeypatch):
    monkeypatch.setattr(samplers, "MAX_FRAME_NUMBERS", 9 * 4 * 2 + 5)
    assert draw("flow", "ddim", frames=True)["frames"].shape == (2, 9, *SHAPE)
