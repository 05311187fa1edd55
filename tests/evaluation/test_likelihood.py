"""One ruler: families that know a source alike give it one figure, and what is not a likelihood is refused."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import genai
from genai.cli import compose_config, prepare_training
from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Prediction
from genai.data.images import Digits
from genai.data.pixels import Pixels
from genai.evaluation.run import run as measure
from genai.metrics import likelihood
from genai.modalities import pixels as modalities
from genai.modalities.pixels import BEGIN
from genai.models.autoregressive.gpt import GPT
from genai.models.diffusion.base import Diffusion
from genai.models.diffusion.likelihood.ode import probability_flow
from genai.models.diffusion.process.paths import LinearPath, VarianceExploding
from genai.models.diffusion.process.schedules import cosine
from genai.nn.latent_space import Latent, SpaceToDepth
from genai.train.run import run

LEVELS, SHAPE = 5, (1, 3, 4)
PATHS = {"EDM": VarianceExploding(), "flow": LinearPath(), "DDPM": cosine(1000)}
FACTS = {"batch_size": 4, "num_workers": 0}


def source(n):
    """Independent pixels, each with probabilities of its own: p (5, 3, 4), n images, and the entropy in bits a pixel."""
    torch.manual_seed(0)
    p = torch.randn(LEVELS, *SHAPE[1:]).mul(1.5).softmax(0)
    index = torch.distributions.Categorical(p.movedim(0, -1)).sample((n,))[:, None]
    return p, index / 2 - 1, -(p * p.log2()).sum(0).mean().item()


class Exact(Diffusion):
    """The denoiser of a source that is known: `x0(x, level)`."""

    def __init__(self, path, x0, shape=SHAPE):
        super().__init__(nn.Linear(1, 1), shape)
        self.path, self.best, self.clip = path, x0, None

    def denoise(self, x, t, cond=None):
        return Prediction(self.best(x, self.path.marginal(t)), p=0.0, q=1.0)


def of_pixels(p):
    values = torch.linspace(-1, 1, LEVELS).view(-1, 1, 1)

    def x0(x, level):  # (B, 1, H, W)
        logits = p.log() - 0.5 * ((x - level.alpha * values) / level.sigma) ** 2
        return (logits.softmax(1) * values).sum(1, keepdim=True)

    return x0


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_probability_flow_of_a_known_source_gives_its_entropy(path):
    p, x, entropy = source(1500)
    model = Exact(path, of_pixels(p)).eval()
    nats = -probability_flow(model, {"image": x}, 0, LEVELS, steps=100, probes=1)
    result = likelihood.per_dimension(nats.double(), 12, LEVELS)
    assert result["bits_per_dim"] == pytest.approx(entropy, abs=0.01 + 2 * result["standard_error"])
    exact = -(p.log() * (torch.linspace(-1, 1, LEVELS).view(-1, 1, 1) == x).float()).sum((1, 2, 3))
    assert (nats - exact).mean().item() == pytest.approx(
        0, abs=0.02 * 12
    )  # the same images: no sampling error of theirs


def gaussian(path):
    """Correlated normal numbers: the exact denoiser is linear with a full Jacobian."""
    torch.manual_seed(1)
    root = torch.randn(4, 4) * 0.5
    covariance = root @ root.T + 0.05 * torch.eye(4)

    def x0(x, level):
        return x @ torch.linalg.solve(
            level.alpha**2 * covariance + level.sigma**2 * torch.eye(4), level.alpha * covariance
        )

    return Exact(path, x0, (4,)).eval(), covariance


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=name, marks=[pytest.mark.slow] * (name != "DDPM")) for name, p in PATHS.items()]
)
def test_the_density_of_a_gaussian_is_found(path):
    """Against the closed form at the ODE's end: the mean over the noise of ln N(y; 0, C) less that of the noise."""
    model, covariance = gaussian(path)
    x = torch.randint(0, LEVELS, (64, 4)) / 2 - 1
    found = probability_flow(model, {"image": x}, 3, LEVELS, steps=100, probes=None, noise=0.1)
    u = 0.1 / 1.1
    eps = rng.normal(rng.seed_range(3, 64), (4,), row=0, stream=rng.MODEL)
    y = (1 - u) * x + u * eps
    density = torch.distributions.MultivariateNormal(torch.zeros(4), (1 - u) ** 2 * covariance + u**2 * torch.eye(4))
    noise = torch.distributions.Normal(0.0, 1.0).log_prob(eps).sum(1) - 4 * math.log(u)
    bins = torch.softmax(-0.5 * ((y[..., None] - (1 - u) * torch.linspace(-1, 1, LEVELS)) / u) ** 2, -1)
    decoder = bins.gather(-1, ((x + 1) * 2).long()[..., None]).log().sum((1, 2))
    expected = density.log_prob(y) - noise + decoder
    assert (found - expected).abs().max() < 0.02
    estimate = probability_flow(model, {"image": x}, 3, LEVELS, steps=100, probes=64, noise=0.1)
    assert (estimate - expected).mean().abs() < 0.02


def test_an_autoregressive_model_of_the_source_gives_its_entropy():
    p, x, entropy = source(3000)

    class Net(nn.Module):
        transformer = type("Any", (), {"positions": None})

        def forward(self, tokens, documents=None):
            logits = torch.cat([torch.full((1, 12), -99.0), p.flatten(1).log()]).T  # BEGIN never again
            return logits.expand(len(tokens), -1, -1)

    tokens = torch.nn.functional.pad((x * 2 + 2).round().long().flatten(1) + 1, (1, 0), value=BEGIN)
    nats = -GPT("tokens", LEVELS + 1, 12, Net()).log_prob({"tokens": tokens}, 0)
    assert likelihood.per_dimension(nats.double(), 12, LEVELS)["bits_per_dim"] == pytest.approx(entropy, abs=0.01)


def test_images_become_tokens_and_back():
    data = Pixels(Digits("image", [1, 8, 8], 10, 17, **FACTS), "tokens", [64], None, 18, **FACTS)
    index = torch.arange(7)
    tokens = data.splits["val"].batch(index, None)["tokens"]
    images = data.images.splits["val"].batch(index, None)["image"]
    assert tokens.shape == (7, 65) and (tokens[:, 0] == BEGIN).all() and tokens[:, 1:].min() >= 1
    assert torch.allclose(data.modality.decode({"tokens": tokens[:, 1:]})["image"], images)
    assert data.values == 17 and data.levels == 18
    colours = torch.arange(24).view(1, 24) % 5 + 1  # channels of one pixel stand together
    assert (modalities.Pixels([3, 2, 4], 5).decode({"tokens": colours})["image"][0, :, 0, 1] * 2 + 2).tolist() == [
        3,
        4,
        0,
    ]
    with pytest.raises(UserError, match="give images on grey levels"):
        Pixels(data, "tokens", None, None, None, **FACTS)


def test_perplexity_counts_what_is_in_use():
    assert likelihood.perplexity(torch.tensor([3, 3, 0, 3])) == pytest.approx(3)
    assert likelihood.perplexity(torch.tensor([0, 9])) == pytest.approx(1)


def test_what_is_no_likelihood_is_refused():
    latent = Exact(PATHS["flow"], lambda x, level: x, (4, 4, 4))
    latent.latent = Latent(SpaceToDepth("image", [1, 8, 8], 2))
    x = {"image": torch.zeros(2, 1, 8, 8)}
    with pytest.raises(
        UserError, match=r"works in the latents of a first stage, whose density is not a likelihood of image"
    ):
        probability_flow(latent, x, 0, 17)
    with pytest.raises(UserError, match="needs data on grey levels"):
        probability_flow(Exact(PATHS["flow"], lambda x, level: x), x, 0, None)
    for wrong in ({"steps": 0}, {"probes": 0}, {"noise": -1}):
        with pytest.raises(UserError, match=f"likelihood.{next(iter(wrong))}="):
            probability_flow(Exact(PATHS["flow"], lambda x, level: x), x, 0, 17, **wrong)


# From the command line

SMALL = [
    "data=digits",
    "logger=none",
    "max_steps=2",
    "data.batch_size=8",
    "callbacks.evaluate.n=16",
    "callbacks.samples.n=2",
]


def test_one_command_for_every_family(tmp_path, refused):
    evaluate = lambda *given: measure(compose_config("evaluate", list(given)))  # noqa: E731
    for name, given in {
        "flow": ["model=flow", "sampler.steps=2", "model.net.channels=8"],
        "gpt": ["experiment=gpt_digits", "model.net.transformer.width=16"],
        "vq": ["model=vqvae"],
    }.items():
        run(compose_config("train", [*SMALL[name == "gpt" :], *given, f"run_dir={tmp_path / name}"], prepare_training))
    result = evaluate(f"ckpt={tmp_path / 'flow'}", "likelihood=probability_flow", "likelihood.steps=3", "n=8")
    assert result["levels"] == 17 and result["likelihood"]["steps"] == 3
    assert result["bound"].startswith("upper bound up to the error")
    assert (
        json.loads((tmp_path / "flow/checkpoints/last.test.probability_flow.json").read_text()).items() < result.items()
    )
    result = evaluate(f"ckpt={tmp_path / 'gpt'}", "n=8")
    assert result["bound"] == "exact" and result["levels"] == 17
    assert result["nats"] == pytest.approx(result["bits_per_dim"] * 64 * math.log(2), abs=0.01)
    result = evaluate(f"ckpt={tmp_path / 'vq'}", "n=8")
    assert "bits_per_dim" not in result and result["bits_per_image"] <= 32 and result["codes"] == 256
    assert "has no likelihood of its own: Flow has no log_prob" in refused("evaluate.py", f"ckpt={tmp_path / 'flow'}")
    assert "is for a Diffusion, and this model is a VQVAE: choose another with likelihood=" in refused(
        "evaluate.py", f"ckpt={tmp_path / 'vq'}", "likelihood=probability_flow"
    )
    x = genai.sample(genai.load(tmp_path / "gpt"), n=3)
    assert x["image"].shape == (3, 1, 8, 8) and x["image"].abs().max() <= 1
    assert np.allclose(x["image"].flatten(1), (x["tokens"] - 1).clamp_min(0) / 8 - 1)
