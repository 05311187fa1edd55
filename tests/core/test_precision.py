"""Half precision is the network's own: time, state, schedules, latents and averages stay float32, whatever it computes in."""

import functools
import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import genai
from genai.cli import compose_config
from genai.core import precision
from genai.core.errors import UserError
from genai.core.protocols import Prediction
from genai.evaluation.features import Extractor
from genai.losses import adversarial
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.edm import EDM
from genai.models.diffusion.flow import Flow
from genai.models.diffusion.likelihood import ode
from genai.models.diffusion.nets.levels import LevelPosterior
from genai.models.diffusion.nets.mlp import MLP
from genai.models.diffusion.nets.unet import UNet
from genai.models.diffusion.process import schedules
from genai.models.diffusion.sampling import samplers, tables
from genai.models.gan.biggan import orthogonal_penalty
from genai.models.gan.dcgan import Generator
from genai.models.vae.likelihoods import Categorical
from genai.models.vae.quantize import VectorQuantizer
from genai.nn.attention import Attention, RotaryPositions
from genai.nn.embed import time_embedding
from genai.nn.latent_space import Latent
from genai.ranges.table import RANGES
from genai.train.ema import EMA
from genai.train.muon import orthogonalize
from tests.checkpoint.test_old_runs import unpack
from tests.conftest import ROOT
from tests.models.diffusion.test_latent import autoencoder

HALVES = [torch.bfloat16, torch.float16]
ddim = functools.partial(samplers.sample, solver=tables.ddim)


@pytest.fixture
def flags(monkeypatch):
    """What torch.backends says of TF32, without a GPU that would listen."""
    found = types.SimpleNamespace(
        cuda=types.SimpleNamespace(matmul=types.SimpleNamespace(allow_tf32=False)),
        cudnn=types.SimpleNamespace(allow_tf32=False),
    )
    monkeypatch.setattr(torch, "backends", found)
    return found


def mlp(shape=(2,), classes=None, **arguments):
    torch.manual_seed(0)
    net = MLP(shape[0], 16, 1, classes)
    nn.init.normal_(net.head[-1].weight, std=0.3)
    return DDPM(net, schedules.linear(), shape, "vector", classes=classes, **{"clip": None, **arguments}).eval()


class Shrinks(nn.Module):
    """The exact eps for data N(0, 0.1^2), in the precision of its weight."""

    def __init__(self, schedule):
        super().__init__()
        self.gain = nn.Parameter((schedule.sigma / (0.01 * schedule.alpha**2 + schedule.sigma**2)).float())

    def forward(self, x, time):
        return self.gain[time.round().long()][:, None] * x.to(self.gain.dtype)


# Time and state


@pytest.mark.parametrize("half", HALVES)
def test_a_thousand_times_are_a_thousand_embeddings(half):
    model, times = mlp().to(half), []
    model.net.time.register_forward_pre_hook(lambda module, inputs: times.append(inputs[0][0]))
    model.net.blocks = nn.ModuleList()
    with torch.inference_mode():
        for t in range(1000):
            model.denoise(torch.zeros(1, 2), t)
    ours = torch.stack(times)
    assert ours.dtype == half
    assert len(ours.unique(dim=0)) == 1000
    assert (ours.double() - time_embedding(torch.arange(1000).double(), 16)).abs().max() < 0.01


@pytest.mark.parametrize("half", HALVES)
def test_a_thousand_steps_do_not_round_the_state(half):
    schedule = schedules.linear()
    model = DDPM(Shrinks(schedule), schedule, [16], "vector", clip=None).to(half)
    states = []
    watch = lambda i, n, state: states.append(state["x"].dtype)  # noqa: E731
    out = ddim(model, torch.arange(128), None, watch, steps=1000)["vector"]
    exact = ddim(model.float(), torch.arange(128), steps=1000)["vector"]
    assert set(states) == {torch.float32}
    assert out.std().item() == pytest.approx(exact.std().item(), rel=0.01)
    assert exact.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("half", HALVES)
def test_a_denoiser_may_answer_in_half_and_data_may_come_in_half(half):
    path = schedules.linear()
    table = tables.ddim(path, tables.discretize(path, 20))
    answer = lambda dtype: lambda x, t: Prediction((0.5 * x).to(dtype), (0.4 * x).to(dtype), 2.0, 1.0, -0.1)  # noqa: E731
    x, seeds = torch.randn(3, 4), torch.arange(3)
    exact = samplers.run_table(answer(torch.float32), table, x, seeds)
    ours = samplers.run_table(
        answer(half), table, x.to(half), seeds, known=x.to(half), mask=torch.zeros(3, 4, dtype=half)
    )
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, exact, atol=0.05)


@pytest.mark.parametrize("half", HALVES)
def test_every_way_to_a_sample_works_in_half(half):
    """clip=None too, where fp16 gave nan in silence; and training, whose schedules stay as they were."""
    net = lambda: MLP(2, 16, 1)  # noqa: E731
    for model in (mlp(), EDM(net(), [2], 0.5, "vector"), Flow(net(), [2], "vector")):
        draw = functools.partial(samplers.sample, solver=tables.heun if isinstance(model, EDM) else tables.ddim)
        exact = draw(model.eval(), torch.arange(4), steps=20)["vector"]
        ours = draw(model.to(half), torch.arange(4), steps=20)["vector"]
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, exact, rtol=0.1, atol=0.1 * exact.abs().max())
        batch = {"vector": torch.randn(8, 2, dtype=half)}
        losses = model(batch, 0)
        assert losses.total.dtype == torch.float32
        assert losses.total.isfinite()
    model = mlp().to(half)
    assert {model.alpha.dtype, model.sigma.dtype, model.weight.dtype} == {torch.float64}
    assert torch.equal(model.alpha, model.schedule.alpha)


def test_a_state_that_overflows_is_refused_though_the_network_is_finite():
    model = mlp()
    model.clip, model.denoise = None, lambda x, t, cond=None: Prediction(x.sign() * 1e38, q=100.0)
    with pytest.raises(UserError, match="samples are not finite"):
        ddim(model, torch.arange(2), steps=5)


@pytest.mark.parametrize("half", HALVES)
def test_neighbouring_times_stay_distinct_in_half(half):
    """Where the noise is below the spacing of the levels, the likelihood decides, and it must see the state unrounded."""
    torch.manual_seed(0)
    schedule = schedules.log_snr(1000, 16.0, -9.0)
    unet = UNet([1, 4, 4], 8, [1], 1, [], out_channels=256)
    model = DDPM(LevelPosterior(unet, 256, schedule), schedule, [1, 4, 4], parameterization="x0", levels=256).to(half)
    x0 = torch.randint(256, (2, 1, 4, 4)) / 127.5 - 1
    alpha, sigma = schedule.alpha_sigma(0)
    seen = model.denoise(alpha * x0 + sigma * torch.randn_like(x0), 0)
    assert (seen.x0(x0) - x0).abs().max() < 1 / 1000
    for t in range(0, 1000, 37):
        assert model.denoise(x0, t).out.isfinite().all()


@pytest.mark.parametrize("half", HALVES)
def test_likelihoods_of_a_half_network_are_those_of_the_network(half):
    torch.manual_seed(0)
    net = UNet([1, 4, 4], 8, [1], 1, [])
    model = DDPM(net, schedules.linear(20), [1, 4, 4], levels=5).eval()
    batch = {"image": torch.randint(5, (3, 1, 4, 4)) / 2 - 1}

    def both():
        return model.bound_terms(batch, 0).total(), ode.probability_flow(model, batch, 0, 5, steps=5)

    exact = both()
    model.to(half)
    for ours, theirs in zip(both(), exact, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=0.02)


# Attention


@pytest.mark.parametrize("half", HALVES)
def test_rotary_attention_takes_half(half):
    torch.manual_seed(0)
    attention, x = Attention(16, 2), torch.randn(2, 5, 16)
    _, rotation = RotaryPositions(16)(torch.arange(5), 8)
    exact = attention(x, rotation)
    ours = attention.to(half)(x.to(half), rotation)
    assert ours.dtype == half
    assert torch.allclose(ours.float(), exact, atol=0.02)
    assert {t.dtype for t in attention.heads_of(x.to(half), rotation)} == {half}


# Frozen parts and measures


def test_latents_are_the_same_in_every_precision():
    """So those that codec.cache keeps are those that an uncached run trains on."""
    latent = Latent(autoencoder())
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    latent.measure([{"image": x}])
    cached = latent.codec.encode(x)
    exact, back = latent.encode({"image": x, "latent": cached}), latent.decode(cached)
    for half in (False, True):
        model = Flow(UNet([4, 2, 2], 8, [1], 1, []), [4, 2, 2], latent=latent)
        model = model.to(torch.bfloat16) if half else model
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.encode_data({"image": x}), exact)
            assert torch.equal(model.encode_data({"image": x, "latent": cached}), exact)
            assert torch.equal(model.decode_data(cached), back)


def test_products_outside_of_networks_are_exact_under_autocast():
    torch.manual_seed(0)
    likelihood, out, g = Categorical(256), torch.randn(2, 256, 4, 4), torch.randn(8, 8)
    net, losses = nn.Linear(32, 32), torch.rand(64)
    quartiles = lambda: mlp().losses(losses, torch.arange(64) / 64).logs  # noqa: E731
    measures = [lambda: likelihood.mean(out), lambda: orthogonal_penalty(net), lambda: orthogonalize(g)]
    exact, logs = [measure() for measure in measures], quartiles()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(measure(), value) for measure, value in zip(measures, exact, strict=True))
        assert all(torch.equal(mean, logs[name][0]) for name, (mean, _) in quartiles().items())


def test_a_perceptual_distance_is_exact_under_autocast():
    class Distance(nn.Conv2d):
        def forward(self, x, y):
            seen.append(super().forward(x))
            return (seen[-1] - super().forward(y)).square().flatten(1).mean(1)

    seen, x = [], torch.rand(2, 1, 8, 8)
    model = autoencoder(perceptual=Distance(1, 4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        model({"image": x}, 0)
    assert torch.equal(seen[0], nn.Conv2d.forward(model.perceptual, x))


def test_features_are_exact_under_autocast():
    torch.manual_seed(0)
    see, images = Extractor(net := nn.Conv2d(1, 4, 3), lambda x: (net(x), None), False, "cpu"), torch.rand(2, 1, 8, 8)
    exact, _ = see(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(see(images)[0], exact)


def test_frozen_networks_do_not_multiply_in_tf32(flags):
    flags.cuda.matmul.allow_tf32 = flags.cudnn.allow_tf32 = True
    with pytest.raises(ZeroDivisionError), precision.full_precision(torch.device("cuda")):
        assert not flags.cuda.matmul.allow_tf32 and not flags.cudnn.allow_tf32
        _ = 1 / 0
    assert flags.cuda.matmul.allow_tf32 and flags.cudnn.allow_tf32


def test_a_gradient_penalty_takes_fakes_in_half():
    real, fake, u = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    exact = adversarial.gradient_penalty(net, real, fake.bfloat16().float(), u)
    assert torch.equal(adversarial.gradient_penalty(net, real, fake.bfloat16(), u), exact)


def test_running_statistics_stay_in_full():
    """Batch norm's, and a code book's, which a step moves by less than bf16 can tell."""
    torch.manual_seed(0)
    net, book = Generator([1, 8, 8], 4, channels=8).to(torch.bfloat16), VectorQuantizer(4, 3).to(torch.bfloat16)
    assert net(torch.randn(4, 4)).dtype == torch.bfloat16
    means = [b for name, b in net.named_buffers() if name.endswith("running_mean")]
    assert {b.dtype for b in means} == {torch.float32}
    assert any(not torch.equal(b, b.bfloat16().float()) for b in means)
    assert {b.dtype for b in book.buffers()} == {torch.float32}
    assert book.to(torch.float64).book.dtype == torch.float64


def test_the_average_of_half_weights_moves():
    """A thousandth of the way from 1 to 1.5 is less than the spacing of bf16 there."""
    model = nn.Linear(1, 1).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model, decay=0.999, power=None)
    nn.init.constant_(model.weight, 1.5)
    for _ in range(1000):
        ema.update()
    assert ema.module.weight.item() == pytest.approx(1.5 - 0.5 * 0.999**1000, rel=1e-4)
    assert ema.distance().isfinite()


# precision=, compile=, and what is said


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """An old run, and one of the repository's scripts in this process: script("sample.py", "n=4") -> what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_precision_from_the_command_line_changes_samples_by_the_network_s_rounding(script, tmp_path):
    unpack(tmp_path, "ddpm_mlp")
    images = {}
    for name in ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"):
        script("sample.py", "ckpt=ddpm_mlp", "n=8", f"precision={name}", f"out={name}", "steps=5")
        with np.load(f"{name}/samples.npz") as file:
            images[name] = file["samples"]
    plain = genai.sample(genai.load("ddpm_mlp"), n=8, steps=5)["vector"].numpy()
    assert np.array_equal(images["32-true"], plain)
    assert np.array_equal(images["auto"], plain)
    for name in ("bf16-mixed", "16-mixed", "bf16-true"):
        assert images[name].dtype == np.float32
        assert not np.array_equal(images[name], plain)
        assert np.abs(images[name] - plain).max() < 0.02 * np.abs(plain).max()


def test_evaluate_says_its_precision(script, tmp_path):
    unpack(tmp_path, "vae")
    figures = {}
    for name in ("32-true", "bf16-mixed", "bf16-true"):
        script("evaluate.py", "ckpt=vae", "n=8", "split=val", "baselines=false", f"precision={name}", "track=false")
        (card,) = (json.loads(path.read_text()) for path in Path("vae/cards").glob("bits_per_dim*.json"))
        figures[card["protocol"]["dtype"]] = card["value"]
    assert [*figures] == ["float32", "bf16-mixed", "bf16-true"]
    assert len({*figures.values()}) == 3
    assert max(figures.values()) - min(figures.values()) < 0.01 * min(figures.values())


@pytest.mark.parametrize("name", ["sample.py", "evaluate.py"])
def test_a_wrong_precision_is_refused(refused, name):
    sampler = ["sampler=ddim"] if name == "sample.py" else []
    assert "precision=fp8 must be one of auto, 32-true" in refused(name, *sampler, "precision=fp8")
    assert "compile=maybe must be true or false" in refused(name, *sampler, "compile=maybe")
    with pytest.raises(UserError, match="precision=fp8 must be one of auto, 32-true"):
        genai.load("nowhere", precision="fp8")
    with pytest.raises(UserError, match="compile=yes must be true or false"):
        genai.load("nowhere", compile="yes")


@pytest.mark.parametrize(
    "typed, stored",
    [
        ("bf16", "bf16-mixed"),
        ("BF16-mixed", "bf16-mixed"),
        ("32", "32-true"),
        (32, "32-true"),
        ("fp32", "32-true"),
        ("32-true", "32-true"),
        ("bf16-true", "bf16-true"),
        ("auto", "auto"),
    ],
)
def test_usual_spellings_of_a_precision_are_stored_as_one(typed, stored):
    assert compose_config("train", [f"trainer.precision={typed}"]).trainer.precision == stored
    assert compose_config("evaluate", [f"precision={typed}"]).precision == stored
    assert precision.precision_of(typed, "cpu") == (stored if stored != "auto" else "32-true")
    assert compose_config("evaluate", ["precision=fp16"]).precision == "16-mixed"


def test_usual_spellings_of_a_device_are_stored_as_one():
    assert compose_config("train", ["trainer.accelerator=CPU"]).trainer.accelerator == "cpu"
    assert [compose_config("evaluate", [f"device={name}"]).device for name in ("gpu", 1, "CPU")] == [
        "cuda",
        "cuda:1",
        "cpu",
    ]


def test_the_table_of_ranges_knows_the_precisions():
    assert RANGES["precision"].values == precision.PRECISIONS


def test_mixed_precision_rounds_weights_once_as_autocast_does_each_time(tmp_path):
    for run in ("ddpm", "gpt", "latent"):
        unpack(tmp_path, run)
        plain, ours = genai.load(tmp_path / run), genai.load(tmp_path / run, precision="bf16-mixed")
        with torch.autocast("cpu", torch.bfloat16):
            theirs = genai.sample(plain, n=2)
        assert all(torch.equal(value, theirs[name]) for name, value in genai.sample(ours, n=2).items())


def test_auto_is_float32_on_a_cpu():
    assert precision.precision_of("auto", "cpu") == "32-true"


@pytest.mark.parametrize(
    ("capability", "name", "says"),
    [((8, 0), "32-true", True), ((7, 5), "32-true", False), ((9, 0), "bf16-mixed", False)],
)
def test_tf32_is_allowed_for_float32_on_a_gpu_and_said(monkeypatch, flags, capability, name, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert precision.allow_tf32(torch.device("cpu"), name) is None
    sentence = precision.allow_tf32(torch.device("cuda"), name)
    assert (sentence is not None and "TF32 on a card" in sentence) == says
    assert flags.cuda.matmul.allow_tf32 == flags.cudnn.allow_tf32 == says


@pytest.mark.parametrize("run", ["ddpm", "gpt", "stylegan2", "gan", "vae"])
def test_compiled_networks_are_those_that_sampling_calls(tmp_path, monkeypatch, run):
    calls = []

    def compiled(function, **arguments):
        return lambda *given, **named: calls.append(function) or function(*given, **named)

    unpack(tmp_path, run)
    plain = genai.sample(genai.load(tmp_path / run), n=2)
    monkeypatch.setattr(torch, "compile", compiled)
    ours = genai.sample(genai.load(tmp_path / run, compile=True), n=2)
    assert calls
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())
