"""The VAE family: likelihoods that are likelihoods, the bound against closed forms, the samplers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import genai
from genai.checkpoint.build import build_typed
from genai.cli import compose_config
from genai.core.errors import UserError
from genai.evaluation.run import run as evaluate
from genai.modalities.image import to_uint8
from genai.models.vae import likelihoods, nets, samplers
from genai.models.vae.vae import VAE, gaussian_kl
from genai.nn import latents

COUNTED = [likelihoods.Categorical(5), likelihoods.DiscretizedLogistic(5), likelihoods.Bernoulli("threshold")]


@pytest.mark.parametrize("likelihood", COUNTED, ids=lambda m: type(m).__name__)
def test_a_likelihood_sums_to_one_and_draws_what_it_says(likelihood):
    torch.manual_seed(0)
    out = 2 * torch.randn(1, likelihood.outputs, 1, 1)
    values = torch.linspace(-1, 1, likelihood.levels).view(-1, 1, 1, 1)
    p = likelihood.log_prob(out.expand(len(values), -1, -1, -1), values).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    u = (torch.arange(20_000).view(-1, 1, 1, 1) + 0.5) / 20_000
    drawn = likelihood.draw(out.expand(len(u), -1, -1, -1), u)
    seen = torch.stack([(drawn - v).abs().lt(1e-4).float().mean() for v in values.flatten()])
    assert torch.allclose(seen, p, atol=2e-4)
    if not isinstance(likelihood, likelihoods.DiscretizedLogistic):  # whose mean is its location
        assert likelihood.mean(out).item() == pytest.approx((p * values.flatten()).sum().item(), abs=1e-5)


def test_a_logistic_far_away_costs_what_it_must():
    """Mass of a bin 60 scales from the location, against the logarithm in closed form."""
    likelihood, x = likelihoods.DiscretizedLogistic(17), torch.tensor([[[[0.5]]]])
    out = torch.tensor([-1.0, math.log(0.02)]).view(1, 2, 1, 1)
    lower, upper = (0.5 - 1 / 16 + 1) / 0.02, (0.5 + 1 / 16 + 1) / 0.02
    expected = -lower + math.log1p(-math.exp(lower - upper))  # both sigmoids are 1 - exp(-x)
    assert likelihood.log_prob(out, x).item() == pytest.approx(expected, rel=1e-4)


def test_parts_of_a_sample_add_up():
    likelihood = likelihoods.DiscretizedLogistic(17)
    out, x = torch.randn(3, 2 * 3, 4, 5), torch.randint(0, 17, (3, 3, 4, 5)) / 8 - 1
    total = sum(
        likelihood.log_prob(
            torch.stack([out[:, c, i, j], out[:, 3 + c, i, j]], 1)[..., None, None], x[:, c, i, j, None, None, None]
        )
        for c in range(3)
        for i in range(4)
        for j in range(5)
    )
    assert torch.allclose(likelihood.log_prob(out, x), total, atol=1e-3)


class Linear(nn.Module):
    """z -> W z + b, of which the posterior is known."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, z):
        return z @ self.weight.T + self.bias


class Posterior(nn.Module):
    """q(z | x) of a linear Gaussian model whose columns are orthogonal, off by `wrong`."""

    def __init__(self, weight, bias, sigma, wrong=0.0):
        super().__init__()
        self.bias, self.weight = bias, weight
        self.variance = 1 / (1 + weight.square().sum(0) / sigma**2)
        self.sigma, self.wrong = sigma, wrong

    def forward(self, x):
        mean = self.variance * ((x - self.bias) @ self.weight) / self.sigma**2 + self.wrong
        return torch.cat([mean, (self.variance * (1 + self.wrong)).log().expand_as(mean)], 1)


def linear_gaussian(k, wrong=0.0, sigma=0.4):
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(6, 2))[0] * torch.tensor([1.5, 0.7])
    bias = torch.randn(6)
    model = VAE(
        "vector",
        [6],
        None,
        2,
        Posterior(weight, bias, sigma, wrong),
        Linear(weight, bias),
        likelihoods.Gaussian(sigma),
        importance_samples=k,
    )
    exact = torch.distributions.MultivariateNormal(bias, weight @ weight.T + sigma**2 * torch.eye(6))
    return model, exact


def test_importance_weights_of_a_linear_gaussian_give_its_likelihood():
    model, exact = linear_gaussian(1)
    x = exact.sample((50,))
    assert torch.allclose(model.log_prob({"vector": x}, 0), exact.log_prob(x), atol=1e-4)  # every weight is p(x)
    for k, error in ((1, 0.5), (2000, 0.02)):
        model, _ = linear_gaussian(k, wrong=0.2)
        gap = (exact.log_prob(x) - model.log_prob({"vector": x}, 0)).mean().item()
        assert 0 < gap < error or (k > 1 and abs(gap) < error)


def test_the_loss_is_its_terms_by_monte_carlo():
    model, exact = linear_gaussian(1, wrong=0.2)
    x = exact.sample((1,)).expand(200_000, 6)
    losses = model({"vector": x}, 0)
    mean, log_variance = model.encode(x)
    q, p = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    z = q.sample()
    kl = (q.log_prob(z) - p.log_prob(z)).sum(1).mean()
    assert losses.logs["rate"][0].item() == pytest.approx(kl.item(), abs=0.02)
    assert losses.logs["elbo"][0].item() == pytest.approx(model.log_prob({"vector": x}, 0).mean().item(), abs=0.02)
    assert losses.total.item() == pytest.approx(-losses.logs["elbo"][0].item(), rel=1e-5)


def test_gaussian_kl_is_torchs():
    mean, log_variance = torch.randn(2, 4, 3)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(gaussian_kl(mean, log_variance), expected, atol=1e-5)


class Constant(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, z):
        return self.out.expand(len(z), *self.out.shape[1:])


def test_a_known_source_scores_its_entropy():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 4, 4)
    p = logits.softmax(1)
    model = VAE("image", [1, 4, 4], 5, 3, Constant(torch.zeros(1, 6)), Constant(logits), likelihoods.Categorical(5))
    index = torch.distributions.Categorical(p[0].permute(1, 2, 0)).sample((20_000,))
    bits = -model.log_prob({"image": index[:, None] / 2 - 1}, 0).mean() / math.log(2) / 16
    entropy = -(p * p.log2()).sum() / 16
    assert bits.item() == pytest.approx(entropy.item(), abs=0.01)


def tiny(**arguments):
    torch.manual_seed(0)
    shape = [1, 8, 8]
    return VAE(
        "image",
        shape,
        17,
        4,
        nets.MLPEncoder(shape, 4, 16),
        nets.MLPDecoder(shape, 4, 17, 16),
        likelihoods.Categorical(17),
        **arguments,
    )


def test_beta_warms_up_and_free_bits_cost_nothing():
    x = {"image": torch.randint(0, 17, (64, 1, 8, 8)) / 8 - 1}

    def loss(model, step=0):
        torch.manual_seed(1)
        losses = model(x, step)
        rate, distortion = (losses.logs[name][0] for name in ("rate", "distortion"))
        return ((losses.total - distortion) / rate).item()

    assert loss(tiny(beta=4.0)) == pytest.approx(4, rel=1e-3)
    model = tiny(kl_warmup_steps=10)
    assert loss(model.eval()) == pytest.approx(1, rel=1e-3)  # what is evaluated compares between steps
    model.train()
    assert [loss(model, step) for step in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1, 1], rel=1e-3)
    model = tiny(free_bits=2.0)
    rate = model(x, 0).logs["rate"][0].item()
    assert loss(model) == pytest.approx(8 / rate, rel=1e-2)  # below 2 nats each, so that 4 latents pay 8
    model(x, 0).total.backward()
    assert all(p.grad.abs().max() > 0 for p in model.decoder.parameters())


def test_binary_data_is_drawn_anew_in_training_and_by_seed_in_evaluation():
    shape = [1, 4, 4]
    model = VAE(
        "image", shape, 256, 2, nets.MLPEncoder(shape, 2, 8), nets.MLPDecoder(shape, 2, 1, 8), likelihoods.Bernoulli()
    )
    batch = {"image": torch.zeros(3, *shape)}
    assert model.levels == 2
    assert torch.equal(model.log_prob(batch, 5), model.log_prob(batch, 5))
    assert not torch.equal(model.log_prob(batch, 5), model.log_prob(batch, 6))
    x = model.likelihood.prepare(batch["image"], torch.linspace(0, 1, 48).view(3, *shape))
    assert set(x.unique().tolist()) == {-1, 1}


def test_samplers_show_what_they_say():
    model = tiny()
    data = torch.randint(0, 17, (30, 1, 8, 8)) / 8 - 1
    items = lambda split, index: data[index]  # noqa: E731
    seeds = torch.arange(40)
    means = model.encode(data)[0]
    pixels = lambda z: model.likelihood.mean(model.decoder(z)).detach()  # noqa: E731
    x = samplers.reconstruct(model, seeds, items=items)["image"]
    assert torch.equal(x[:10], data[:10]) and torch.equal(x[20:30], data[10:20])
    assert torch.allclose(x[13], pixels(means[3:4])[0], atol=1e-5)
    x = latents.interpolate(model, seeds, items=items)["image"]
    assert torch.allclose(x[[10, 19]], pixels(means[[2, 3]]), atol=1e-5)
    x = samplers.traverse(model, seeds, items=items, extent=2.0)["image"]
    z = means[0].clone()
    z[1] = 2.0
    assert torch.allclose(x[19], pixels(z[None])[0], atol=1e-5)
    for sampler in (samplers.prior, samplers.reconstruct, latents.interpolate, samplers.traverse):
        given = {} if sampler is samplers.prior else {"items": items}
        given |= {"pixels": "draw"} if sampler in (samplers.prior, samplers.traverse) else {}
        whole = sampler(model, seeds, **given)["image"]
        part = sampler(model, seeds[7:9], **given)["image"]
        assert (whole[7:9] - part).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VAE("image", [1, 8, 8], 17, 4, nn.Identity(), nn.Identity(), likelihoods.Gaussian()), "is a density"),
        (
            lambda: VAE("vector", [2], None, 4, nn.Identity(), nn.Identity(), likelihoods.Categorical(17)),
            "is continuous",
        ),
        (lambda: VAE("image", [1, 8, 8], 17, 4, nn.Identity(), nn.Identity(), likelihoods.Categorical(5)), "counts 5"),
        (lambda: tiny(beta=-1), "model.beta=-1"),
        (lambda: likelihoods.Bernoulli("sometimes"), "binarize=sometimes"),
        (lambda: samplers.prior(tiny(), torch.arange(2), pixels="best"), "sampler.pixels=best"),
        (lambda: samplers.reconstruct(tiny(), torch.arange(2)), "starts from data"),
        (lambda: latents.interpolate(tiny(), torch.arange(2), truncation=0.5), "is of drawn latents"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


# From the command line


@pytest.mark.slow
def test_a_run_shows_itself_from_the_command_line(tmp_path, command, refused):
    run = tmp_path / "run"
    from genai.train.run import run as train

    train(
        compose_config(
            "train",
            [
                "model=vae",
                "data=digits",
                "max_steps=4",
                "optim.warmup_steps=2",
                "logger=none",
                f"run_dir={run}",
                "callbacks.samples.n=4",
                "callbacks.evaluate.n=8",
                "model.encoder.width=16",
                "model.decoder.width=16",
            ],
        )
    )
    for sampler in ("reconstruct", "traverse"):
        out = command(
            "sample.py", f"ckpt={run}", f"sampler={sampler}", "n=12", "columns=6", f"out={tmp_path / sampler}"
        )
        assert out.returncode == 0, out.stderr
        samples = np.load(tmp_path / sampler / "samples.npz")["samples"]
        assert samples.shape == (12, 1, 8, 8)
    data = genai.load(run).config["data"]
    first = build_typed(data).splits["val"].batch(torch.arange(6), None)["image"]
    assert np.array_equal(np.load(tmp_path / "reconstruct" / "samples.npz")["samples"][:6], to_uint8(first).numpy())
    result = evaluate(compose_config("evaluate", [f"ckpt={run}", "split=val", "n=20"]))
    assert (
        result["nats"] == pytest.approx(result["bits_per_dim"] * 64 * math.log(2), abs=0.02) and result["levels"] == 17
    )
    assert (
        3 < result["bits_per_dim"] < 7
        and 0 < result["reconstruction_psnr_db"] < 20
        and result["bound"] == "upper bound"
    )
    assert "sampler.split=none must be one of train, val, test" in refused(
        "sample.py", f"ckpt={run}", "sampler=reconstruct", "split=none"
    )
    assert "this model is unconditional" in refused("sample.py", f"ckpt={run}", "label=3")
    assert "is for a Diffusion, and this model is a VAE" in refused("sample.py", f"ckpt={run}", "sampler=ddim")
