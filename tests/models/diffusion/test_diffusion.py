"""Diffusion against closed forms: moments, conversions, samplers on Gaussian data, the bound of a known Gaussian."""

import functools
import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from genai.checkpoint.build import build_stored, build_typed
from genai.cli import compose_config
from genai.core import stored
from genai.core.errors import UserError
from genai.data.captions import encode
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.edm import EDM
from genai.models.diffusion.flow import Flow
from genai.models.diffusion.likelihood import vlb
from genai.models.diffusion.likelihood.ode import probability_flow
from genai.models.diffusion.nets.levels import LevelPosterior
from genai.models.diffusion.nets.mlp import MLP
from genai.models.diffusion.nets.unet import UNet
from genai.models.diffusion.process import schedules, weightings
from genai.models.diffusion.process.paths import combination, to_x0
from genai.models.diffusion.sampling import samplers, tables
from genai.nn.embed import time_embedding
from genai.nn.text_encoder import TextEncoder

SCHEDULES = {
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "karras": schedules.karras,
    "log_snr": schedules.log_snr,
}
ddim = functools.partial(samplers.sample, solver=tables.ddim)
MEAN, VAR = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64), torch.tensor([0.25, 1.7, 0.04], dtype=torch.float64)


class GaussianNet(nn.Module):
    """The exact denoiser of N(MEAN, diag VAR) in any parameterisation: affine in x."""

    def __init__(self, kind, schedule):
        super().__init__()
        self.kind, self.schedule = kind, schedule
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def affine(self, t):
        """(slope, offset) of E[x0 | x_t], each (3,)."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        gain = alpha * VAR / (alpha**2 * VAR + sigma**2)
        return gain, MEAN - gain * alpha * MEAN

    def forward(self, x, time):
        times = [t * len(self.schedule) / 1000 for t in time.tolist()]
        at = [self.schedule.alpha_sigma(round(t) if abs(t - round(t)) < 1e-9 else t) for t in times]
        alpha, sigma = torch.tensor(at, dtype=torch.float64).T.unsqueeze(-1)
        gain = alpha * VAR / (alpha**2 * VAR + sigma**2)
        p, q = to_x0(self.kind, alpha, sigma)
        return (MEAN + gain * (x - alpha * MEAN) - p * x) / q


def gaussian_model(kind="eps", schedule=None, **arguments):
    schedule = schedule or schedules.cosine(50)
    return DDPM(GaussianNet(kind, schedule), schedule, [3], "vector", kind, clip=None, **arguments)


# The schedules and the path


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 200, 1000])
def test_schedules_are_variance_preserving_and_monotone(make, T):
    s = make(T)
    assert s.alpha.dtype == torch.float64
    assert len(s) == T
    assert torch.allclose(s.alpha**2 + s.sigma**2, torch.ones(T, dtype=torch.float64), atol=1e-14)
    assert (s.alpha.diff() < 0).all()
    assert (s.sigma > 0).all()


def test_linear_schedule_is_the_papers():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.stack([(1 - beta[: t + 1]).prod() for t in (0, 1, 500, 999)])
    assert torch.allclose(schedules.linear(1000).alpha[[0, 1, 500, 999]] ** 2, expected, rtol=1e-12)


def test_cosine_schedule_is_the_papers_and_clips_beta():
    T, s = 1000, schedules.cosine(1000)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 1, 300, 990)]
    assert torch.allclose(s.alpha[[0, 299, 989]] ** 2, torch.tensor([f[1], f[2], f[3]]).double() / f[0], rtol=1e-6)
    beta = 1 - (s.alpha[1:] / s.alpha[:-1]) ** 2
    assert beta[-1].item() == pytest.approx(0.999, abs=1e-12)


def test_karras_end_points():
    s = schedules.karras(10, sigma_min=0.01, sigma_max=50)
    ratio = s.sigma / s.alpha
    assert ratio[0].item() == pytest.approx(0.01)
    assert ratio[-1].item() == pytest.approx(50)
    assert torch.allclose((ratio ** (1 / 7)).diff(), (ratio ** (1 / 7)).diff()[0].expand(9))


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_every_parameterisation_returns_x0(kind):
    alpha = torch.rand(100, dtype=torch.float64) * 0.98 + 0.01
    sigma = (1 - alpha**2).sqrt()
    x0, eps = torch.randn(2, 100, dtype=torch.float64)
    u, v = combination(kind, alpha, sigma)
    p, q = to_x0(kind, alpha, sigma)
    assert torch.allclose(p * (alpha * x0 + sigma * eps) + q * (u * x0 + v * eps), x0, atol=1e-10)


def test_an_unknown_parameterisation_is_refused():
    with pytest.raises(UserError, match=r"model\.parameterization='w' must be one of eps, x0, v"):
        to_x0("w", 0.5, 0.5)


def test_min_snr_weights_are_those_of_each_parameterisation():
    s, gamma = schedules.cosine(100), 5.0
    snr = s.snr()
    expected = {
        "eps": snr.clamp_max(gamma) / snr,
        "x0": snr.clamp_max(gamma),
        "v": snr.clamp_max(gamma) / (snr + 1),
    }
    for kind, weight in expected.items():
        _, q = to_x0(kind, s.alpha, s.sigma)
        assert torch.allclose(weightings.min_snr(s, q, gamma), weight)
        assert torch.equal(weightings.simple(s, q), torch.ones(100, dtype=torch.float64))


def test_vlb_weight_is_the_sum_of_the_kl_terms():
    s = schedules.cosine(100)
    x0, x0_hat = torch.randn(2, 1, 5, dtype=torch.float64)
    for kind in ("eps", "x0", "v"):
        _, q = to_x0(kind, s.alpha, s.sigma)
        weight = weightings.vlb(s, q)
        for t in (1, 50, 99):
            kl = vlb.step_kl(s, t, x0, x0_hat, "small") / 5
            loss = weight[t] * ((x0 - x0_hat) ** 2).mean() / q[t] ** 2
            assert (loss / len(s)).item() == pytest.approx(kl.item(), rel=1e-9)


# The forward process


def test_forward_process_has_the_stated_moments():
    """x_t as the network sees it: mean alpha x0, standard deviation sigma, for x0 fixed."""
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, time):
            seen.append((x, time))
            return x * self.weight

    s = schedules.linear(4)
    model = DDPM(Spy(), s, [1], "vector").train()
    torch.manual_seed(0)
    model({"vector": torch.full((80_000, 1), 0.7)}, 0)
    x, time = seen[0]
    for t in range(4):
        at_t = x[(time * 4 / 1000).round() == t].double()
        assert 19_000 < len(at_t) < 21_000
        assert at_t.mean().item() == pytest.approx(s.alpha[t].item() * 0.7, abs=0.02)
        assert at_t.std().item() == pytest.approx(s.sigma[t].item(), rel=0.02)


def test_posterior_is_bayes_rule():
    """q(x_s | x_t, x0) from the product of q(x_t | x_s) and q(x_s | x0), written out independently."""
    s = schedules.cosine(50)
    for t in (1, 20, 49):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = s.alpha_sigma(t), s.alpha_sigma(t - 1)
        ratio = alpha_t / alpha_s
        noise = sigma_t**2 - ratio**2 * sigma_s**2
        precision = ratio**2 / noise + 1 / sigma_s**2
        a, b, var = vlb.posterior(s, t)
        assert var == pytest.approx(1 / precision, rel=1e-9)
        assert a == pytest.approx(ratio / noise / precision, rel=1e-9)
        assert b == pytest.approx(alpha_s / sigma_s**2 / precision, rel=1e-9)


def test_loss_of_the_exact_denoiser_is_the_posterior_variance():
    """In x0 the best possible squared error at t is the mean of VAR sigma^2 / (alpha^2 VAR + sigma^2)."""
    s = schedules.cosine(4)
    model = gaussian_model("x0", s).train()
    torch.manual_seed(0)
    x0 = MEAN + VAR.sqrt() * torch.randn(200_000, 3, dtype=torch.float64)
    loss = model({"vector": x0}, 0).total.item()
    best = [
        (VAR * sigma**2 / (alpha**2 * VAR + sigma**2)).mean().item() for alpha, sigma in map(s.alpha_sigma, range(4))
    ]
    assert loss == pytest.approx(sum(best) / 4, rel=0.01)


def test_evaluation_spreads_t_over_the_batch_and_logs_quartiles():
    model = gaussian_model().eval()
    assert model.draw_t(8).tolist() == [3, 9, 15, 21, 28, 34, 40, 46]
    losses = model({"vector": torch.randn(10, 3, dtype=torch.float64)}, 0)
    total = sum(value * weight for value, weight in losses.logs.values())
    assert (total / 10).item() == pytest.approx(losses.total.item(), rel=1e-6)
    assert losses.weight == 10


def test_labels_are_dropped_at_the_stated_rate_and_only_in_training():
    net = UNet([1, 8, 8], 8, [1], 1, [], classes=10)
    model = DDPM(net, schedules.cosine(10), [1, 8, 8], classes=10, label_dropout=0.3)
    label = torch.zeros(20_000, dtype=torch.int64)
    torch.manual_seed(0)
    dropped = (model.train().training_conditions({"label": label})["label"] == 10).double().mean().item()
    assert dropped == pytest.approx(0.3, abs=0.02)
    assert torch.equal(model.eval().training_conditions({"label": label})["label"], label)


# Continuous time


@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 80.0])
def test_preconditioning_is_table_1_of_edm(sigma):
    """Unit variance into and out of the network, and the least amplified error (their appendix B.6)."""
    data = 0.75
    c_skip, c_out, c_in = EDM(nn.Linear(1, 1), [1], data).preconditioning(sigma)
    assert c_in**2 * (sigma**2 + data**2) == pytest.approx(1)
    assert ((1 - c_skip) ** 2 * data**2 + c_skip**2 * sigma**2) / c_out**2 == pytest.approx(1)
    assert c_skip == pytest.approx(data**2 / (sigma**2 + data**2))
    assert c_out == pytest.approx(sigma * data / math.sqrt(sigma**2 + data**2))


class Zero(nn.Module):
    """A network that returns 0 and records the times it was called with."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x, time):
        self.time = time
        return torch.zeros_like(x)


def test_edms_loss_of_a_silent_network_on_gaussian_data_is_1():
    """Its target has unit variance at every sigma; ln(sigma) has the stated mean and deviation."""
    torch.manual_seed(0)
    model = EDM(Zero(), [64], 0.75, "vector", log_sigma_mean=-1.2, log_sigma_std=1.2)
    losses = model({"vector": 0.75 * torch.randn(4096, 64)}, 0)
    assert losses.total.item() == pytest.approx(1, abs=0.02)
    log_sigma = math.log(0.002) + model.net.time / 1000 * math.log(80 / 0.002)
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (0.0, 0.0)])
def test_flows_target_is_the_velocity_and_its_times_are_logit_normal(mean, std):
    torch.manual_seed(0)
    model = Flow(Zero(), [64], "vector", logit_mean=mean, logit_std=std)
    losses = model({"vector": torch.full((4096, 64), 2.0)}, 0)
    assert losses.total.item() == pytest.approx(1 + 2.0**2, abs=0.05)  # E (eps - x0)^2
    t = model.net.time / 1000
    logit = torch.logit(t.double()) if std else t
    assert logit.mean().item() == pytest.approx(mean if std else 0.5, abs=0.02)
    assert logit.std().item() == pytest.approx(std or 12**-0.5, abs=0.02)


@pytest.mark.parametrize("make", [lambda: EDM(Zero(), [2], 0.5, "vector"), lambda: Flow(Zero(), [2], "vector")])
def test_continuous_models_log_quartiles_in_evaluation_on_fixed_times(make):
    model = make().eval()
    logs = model({"vector": torch.randn(8, 2)}, 0).logs
    first = model.net.time
    model({"vector": torch.randn(8, 2)}, 0)
    assert torch.equal(first, model.net.time)
    assert [logs[f"loss_q{i}"][1].item() for i in (1, 2, 3, 4)] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sigma_data": 0.0}, "model.sigma_data=0.0 must be the standard deviation"),
        ({"sigma_data": 0.5, "sigma_min": 3.0, "sigma_max": 2.0}, "model.sigma_min=3.0 must lie above 0 and below"),
    ],
)
def test_impossible_edms_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        EDM(Zero(), [2], **arguments)


def test_an_edm_measures_the_deviation_of_its_data_before_the_first_step():
    batches = [{"vector": 3 + 0.4 * torch.randn(n, 2)} for n in (5, 7, 2)]
    model = EDM(Zero(), [2], None, "vector")
    with pytest.raises(UserError, match=r"model.sigma_data=null is measured by prepare"):
        model(batches[0], 0)
    whole = torch.cat([batch["vector"] for batch in batches]).double()
    assert model.prepare(iter(batches)) == {"sigma_data": round(whole.std(correction=0).item(), 4)}
    assert model.prepare(iter(batches)) == {} == EDM(Zero(), [2], 0.5, "vector").prepare(batches)
    with pytest.raises(UserError, match=r"model.sigma_data=0.0 must be the standard deviation"):
        EDM(Zero(), [2], None, "vector").prepare([{"vector": torch.ones(4, 2)}])


# The bound


def test_bound_of_a_gaussian_with_the_exact_denoiser():
    """With data N(MEAN, VAR) and the exact denoiser, the expected KL at t is b^2 / (2 var) times the posterior variance
    of x0, and the prior's KL is that of N(alpha x0, sigma^2)."""
    s = schedules.cosine(20)
    model = gaussian_model("eps", s, levels=17)
    torch.manual_seed(0)
    x0 = MEAN + VAR.sqrt() * torch.randn(20_000, 3, dtype=torch.float64)
    terms = model.bound_terms({"vector": x0}, seed=0)
    for k, t in enumerate(range(19, 0, -1)):
        alpha, sigma = s.alpha_sigma(t)
        _, b, var = vlb.posterior(s, t)
        expected = (0.5 * b**2 / var * VAR * sigma**2 / (alpha**2 * VAR + sigma**2)).sum().item()
        assert terms.kl[:, k].mean().item() == pytest.approx(expected, rel=0.04)
    alpha, sigma = s.alpha_sigma(19)
    prior = 0.5 * ((alpha**2 * (VAR + MEAN**2)) + sigma**2 - 1 - math.log(sigma**2)).sum().item()
    assert terms.prior.mean().item() == pytest.approx(prior, rel=0.02)
    assert torch.equal(model.log_prob({"vector": x0[:5]}, 0), -model.bound_terms({"vector": x0[:5]}, 0).total())


def test_bound_approaches_the_entropy_of_a_known_discrete_source():
    """Independent pixels of two levels with the exact denoiser: the bound is the entropy, from above, within 0.01 bits."""
    p1, T = 0.3, 1500

    class TwoLevels(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x, time):
            alpha, sigma = s.alpha_sigma(round(float(time[0]) * T / 1000))
            logit = math.log(p1 / (1 - p1)) + 2 * alpha * x / sigma**2
            return torch.tanh(logit / 2)

    s = schedules.log_snr(T, 5.5, -7.0)
    model = DDPM(TwoLevels(), s, [4], "vector", "x0", levels=2).double()
    torch.manual_seed(0)
    x0 = (torch.rand(2000, 4) < p1).double() * 2 - 1
    bits = model.bound_terms({"vector": x0}, 0).total() / (4 * math.log(2))
    frequency = (x0 > 0).double().mean().item()
    entropy = -(frequency * math.log2(p1) + (1 - frequency) * math.log2(1 - p1))
    assert entropy < bits.mean().item() < entropy + 0.01


def test_kl_of_gaussians_matches_torch():
    s = schedules.linear(30)
    x0, x0_hat, x_t = torch.randn(3, 2, 5, dtype=torch.float64)
    for variance in ("small", "large"):
        for t in (1, 12, 29):
            a, b, var = vlb.posterior(s, t)
            var_p = vlb.reverse_variance(s, t, variance)
            q = torch.distributions.Normal(a * x_t + b * x0, var**0.5)
            p = torch.distributions.Normal(a * x_t + b * x0_hat, var_p**0.5)
            expected = torch.distributions.kl_divergence(q, p).sum(1)
            assert torch.allclose(vlb.step_kl(s, t, x0, x0_hat, variance), expected)
    assert vlb.reverse_variance(s, 0, "small") == vlb.posterior(s, 1)[2]
    assert vlb.reverse_variance(s, 0, "large") == pytest.approx((s.sigma[0] ** 2).item())


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("std", [0.001, 0.05, 1.0])
def test_decoder_bins_are_a_distribution(levels, std):
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64)[:, None]
    mean = torch.full_like(grid, 0.1234)
    mass = (-vlb.discretized_gaussian(grid, mean, std, levels)).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    half = 1 / (levels - 1)
    middle = levels // 2
    normal = torch.distributions.Normal(mean[0, 0], std)
    upper = normal.cdf(grid[middle, 0] + half) if middle < levels - 1 else 1.0
    expected = upper - normal.cdf(grid[middle, 0] - half)
    assert mass[middle].item() == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("mean", [-1.0, 0.3, 1.0])
def test_decoder_charges_the_full_price_of_a_level_missed(mean):
    """Many standard deviations off, the cost is that of the density at the bin's nearer edge, not of a floor."""
    x0 = torch.tensor([[mean - 0.25 if mean > 0 else mean + 0.25]], dtype=torch.float64)
    nats = vlb.discretized_gaussian(x0, torch.full_like(x0, mean), 0.002, 17).item()
    z = (0.25 - 1 / 16) / 0.002
    assert nats == pytest.approx(z**2 / 2 + math.log(z * math.sqrt(2 * math.pi)), rel=1e-3)


# The network


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 24), (2, 12, 4)])
def test_unet_takes_any_size_and_channels(shape):
    net = UNet(shape, 8, [1, 2], 1, [shape[1], shape[1] // 2], classes=3)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.1)
    x = torch.randn(2, *shape)
    out = net(x, torch.tensor([1.0, 500.0]), torch.tensor([0, 3]))
    assert out.shape == x.shape
    assert not torch.allclose(out[0], net(x, torch.tensor([900.0, 500.0]), torch.tensor([0, 3]))[0])
    assert not torch.allclose(out[0], net(x, torch.tensor([1.0, 500.0]), torch.tensor([1, 3]))[0])


def test_unet_says_which_multiple_it_needs():
    with pytest.raises(UserError, match="multiples of 4, got 8x10"):
        UNet([1, 8, 10], 8, [1, 2, 2])
    with pytest.raises(UserError, match=r"images of shape \[C, H, W\]"):
        UNet([2], 8)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        torch.manual_seed(0)
        net = UNet([1, 8, 8], 8, [1, 2], 1, [4], None, 0.0, flag).train()
        for p in net.parameters():
            nn.init.normal_(p, 0, 0.1)
        net(torch.ones(2, 1, 8, 8), torch.tensor([3.0, 4.0])).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


def test_dropout_acts_in_training_only():
    net = UNet([1, 8, 8], 8, [1], 1, [], None, dropout=0.5)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.1)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 4.0])
    assert not torch.equal(net.train()(x, t), net(x, t))
    assert torch.equal(net.eval()(x, t), net(x, t))


# Grey levels in colour


def level_posterior(*overrides):
    """The config of model=ddpm_levels over CIFAR-10."""
    given = ["model=ddpm_levels", "data=cifar10", "model.net.net.channels=8", *overrides]
    return OmegaConf.to_container(compose_config("train", given), resolve=True)["model"]


def test_the_bound_of_a_colour_source_is_its_entropy():
    """Pixels whose channels have distributions of their own, which the network's last biases say: from above, within 0.1."""
    torch.manual_seed(0)
    p = (2 * torch.randn(3, 4)).softmax(1)
    index = torch.distributions.Categorical(p).sample((64, 2, 2)).movedim(-1, 1)  # (B, C, H, W)
    given = [
        "model.net.net.multipliers=[1]",
        "data.shape=[3,2,2]",
        "data.levels=4",
        "data.classes=null",
        "model.schedule.steps=150",
    ]
    model = build_typed(level_posterior(*given, "model.schedule.log_snr_max=9", "model.schedule.log_snr_min=-7")).eval()
    with torch.no_grad():  # its weights are zero
        model.net.net.head[-1].bias.copy_(p.log().flatten())
    bits = -model.log_prob({"image": index / 1.5 - 1}, 0).mean() / (12 * math.log(2))

    def entropy(p):
        return -p.log2()[torch.arange(3)[:, None, None], index].mean()

    assert entropy(p) - 0.002 < bits < entropy(p) + 0.1  # of the same images
    assert entropy(p.mean(0).expand(3, 4)) > entropy(p) + 0.3  # as one distribution for all channels would have it


def test_a_level_posterior_of_colour_has_a_distribution_for_each_channel():
    model = build_typed(level_posterior())
    x, time, label = torch.zeros(2, 3, 32, 32), torch.full((2,), 300.0), torch.zeros(2, dtype=torch.int64)
    assert model.net.net(x, time, label).shape == (2, 3 * 256, 32, 32)
    head = model.net.net.head[-1]
    with torch.no_grad():  # red alone is moved
        head.bias[:256] += torch.arange(256)
    moved = model.net(x, time, label)
    assert (moved[:, 0] > moved[:, 1] + 0.01).all() and torch.equal(moved[:, 1], moved[:, 2])
    head.out_channels, head.bias = 256, nn.Parameter(head.bias[:256])
    head.weight = nn.Parameter(head.weight[:256])
    with pytest.raises(UserError, match=r"256 logits a pixel, but 3 channels of 256 grey levels take 768"):
        model.net(x, time, label)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_level_posterior_predicts_the_data_alone(kind):
    with pytest.raises(UserError, match=f"parameterization={kind}, but a LevelPosterior .* predicts the data: give x0"):
        build_typed(level_posterior(f"model.parameterization={kind}"))


@pytest.mark.parametrize("make", [lambda net: Flow(net, [1, 4, 4]), lambda net: EDM(net, [1, 4, 4], 0.5)])
def test_a_level_posterior_is_of_a_ddpm_alone(make):
    """The target of a flow or EDM is not a mean of grey levels."""
    unet = UNet([1, 4, 4], 8, [1], 1, attention_depths=[], out_per_channel=4)
    net = LevelPosterior(unet, 4, schedules.cosine(4))
    with pytest.raises(UserError, match=r"predicts the data of a DDPM, and this model is of type (Flow|EDM): choose"):
        make(net)
    with stored.build_context():
        assert make(net).net is net


def test_a_stored_level_posterior_means_what_it_meant():
    node = level_posterior()
    del node["net"]["net"]["out_per_channel"], node["net"]["net"]["attention_depths"]
    node["net"]["net"] |= {"out_channels": 256, "attention": [4]}
    old = build_stored({**node, "parameterization": "eps"}).eval()
    x, time, label = torch.randn(1, 3, 32, 32), torch.full((1,), 300.0), torch.zeros(1, dtype=torch.int64)
    assert old.net.net(x, time, label).shape == (1, 256, 32, 32)
    assert old.net(x, time, label).shape == x.shape


@pytest.mark.parametrize("make", [*SCHEDULES.values(), lambda T: schedules.zero_terminal_snr(schedules.linear(T))])
@pytest.mark.parametrize("T", [2, 200, 1000])
def test_times_between_whole_ones_are_levels_of_their_own(make, T):
    """A time's level is one level's time, in the schedule and where a LevelPosterior looks it up."""
    s = make(T)
    net = LevelPosterior(nn.Linear(1, 1), 4, s)
    times = [0.0, 0.3, T - 1.75, T - 1.25, T - 1.0]
    for t in times:
        alpha, sigma = s.alpha_sigma(t)
        level = s.marginal_of_ratio(sigma / alpha) if alpha else s.marginal(t)
        assert level.t == pytest.approx(t, abs=1e-6 * T)
        assert (level.alpha, level.sigma) == pytest.approx((alpha, sigma))
    alpha, precision = net.alpha_precision(torch.tensor(times))
    expected = torch.tensor([s.alpha_sigma(t) for t in times])
    assert torch.allclose(alpha, expected[:, 0], atol=1e-5, rtol=1e-3)
    assert torch.allclose(precision, expected[:, 1] ** -2, rtol=2e-3)
    whole = torch.arange(T)
    alpha, precision = net.alpha_precision((whole * (1000 / T)).float() * (T / 1000))
    assert torch.equal(alpha, net.alpha) and torch.equal(precision, net.precision)


# Answers of another shape


@pytest.mark.parametrize("outputs", [1, 6])
def test_a_network_of_other_channels_is_refused_before_it_is_trained(outputs):
    """One channel for three would be broadcast by the loss, and only sampling would notice."""
    net = UNet([3, 4, 4], 8, [1], 1, attention_depths=[], out_channels=outputs)
    kinds = (DDPM(net, schedules.cosine(4), [3, 4, 4]), EDM(net, [3, 4, 4], 0.5), Flow(net, [3, 4, 4]))
    for model in kinds:
        with pytest.raises(UserError, match=rf"model.net makes \[{outputs}, 4, 4\] of an item, .* needs \[3, 4, 4\]"):
            model({"image": torch.zeros(2, 3, 4, 4)}, 0)


# One step, odd widths, conditions


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_bound_of_one_step_is_a_bound(variance):
    s = schedules.cosine(1)
    model = gaussian_model("x0", s, levels=3, variance=variance)
    x0 = torch.randint(0, 3, (500, 3)).double() - 1
    terms = model.bound_terms({"vector": x0}, 0)
    assert terms.kl.shape == (500, 0)
    assert terms.total().mean() > 3 * math.log(3)
    assert vlb.reverse_variance(s, 0, variance) == pytest.approx(s.sigma[0].item() ** 2)


def test_what_one_step_cannot_be_is_refused():
    with pytest.raises(UserError, match="ends in pure noise needs at least 2 steps, got 1"):
        schedules.zero_terminal_snr(schedules.linear(1))
    with pytest.raises(UserError, match=r"model.weighting=vlb .* model.schedule.steps=1 must be at least 2"):
        gaussian_model("x0", schedules.linear(1), weighting=weightings.vlb)


@pytest.mark.parametrize("width", [1, 2, 7, 33])
def test_a_network_of_any_width_reads_the_time(width):
    times = torch.tensor([0.0, 1.0, 30.0, 999.0])
    emb = time_embedding(times, width)
    assert emb.shape == (4, width)
    assert len(emb.unique(dim=0)) == 4
    if width % 2 == 0:
        frequency = torch.exp(torch.arange(width // 2) * (-math.log(1e4) / (width // 2)))
        assert torch.equal(emb, torch.cat([(times[:, None] * frequency).cos(), (times[:, None] * frequency).sin()], 1))
    nets = [MLP(2, width), UNet([1, 4, 4], width, [1], 1, attention_depths=[0])]
    for net, x in zip(nets, (torch.randn(4, 2), torch.randn(4, 1, 4, 4)), strict=True):
        assert net(x, times).shape == x.shape


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_guidance_needs_both_of_its_answers_trained(rate):
    net = UNet([1, 8, 8], 8, [1], 1, attention_depths=[], classes=10)
    node = {"label_dropout": rate, "schedule": schedules.cosine(10), "shape": [1, 8, 8], "classes": 10}
    with pytest.raises(
        UserError, match=rf"model.guidance=1.1 extrapolates .* model.label_dropout={rate} .* model.guidance=1,"
    ):
        DDPM(net, guidance=1.1, **node)
    with stored.build_context():  # as it was trained and sampled
        assert DDPM(net, guidance=1.1, **node).guidance == 1.1
    model = DDPM(net, **node).eval()
    cond = {"label": torch.tensor([3])}
    for plain in (None, 1.0):
        ddim(model, torch.arange(1), cond, steps=1, guidance=plain)
    with pytest.raises(UserError, match=r"^guidance=2.0 extrapolates from .*: give guidance=1"):
        ddim(model, torch.arange(1), cond, steps=1, guidance=2.0)
    assert DDPM(UNet([1, 8, 8], 8, [1], 1, attention_depths=[]), guidance=2.0, **{**node, "classes": None}).null() == {}


def captioned(**arguments):
    torch.manual_seed(0)
    net = UNet([1, 4, 4], 8, [1], 1, attention_depths=[0], text=TextEncoder(6, 8, 1, 2), classes=3)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    s = schedules.cosine(4)
    return DDPM(net, s, [1, 4, 4], classes=3, levels=3, clip=None, **arguments).eval()


@pytest.mark.parametrize("score", ["bound", "flow"])
def test_likelihoods_are_given_what_the_batch_says_and_null_for_the_rest(score):
    model, n = captioned(), 3
    batch = {"image": torch.randint(0, 3, (n, 1, 4, 4)).float() - 1}
    batch |= {"caption": encode(["one", "two", "six"], 6, "length"), "label": torch.arange(n)}
    null = model.null_conditions(n)

    def nats(**given):
        given = {"image": batch["image"], **given}
        return model.log_prob(given, 0) if score == "bound" else probability_flow(model, given, 0, 3, steps=2)

    alone, caption, both = nats(), nats(caption=batch["caption"]), nats(caption=batch["caption"], label=batch["label"])
    assert torch.allclose(alone, nats(**null)) and torch.allclose(
        caption, nats(caption=batch["caption"], label=null["label"])
    )
    assert not torch.allclose(alone, caption, atol=1e-3) and not torch.allclose(caption, both, atol=1e-3)
    with pytest.raises(UserError, match=r"label is int64 \[1\], but 3 samples of this model take int64 \[3\]"):
        nats(label=batch["label"][:1])


READERS = {
    "sampler": lambda model, cond: ddim(model, torch.arange(2), cond, steps=3),
    "inversion": lambda model, cond: ddim(model, torch.arange(2), image=cond["image"], invert=True, steps=3),
    "bound": lambda model, cond: model.log_prob({"image": cond["image"]}, 0),
    "flow": lambda model, cond: probability_flow(model, {"image": cond["image"]}, 0, 3, steps=3),
}


@pytest.mark.parametrize("reader", READERS)
def test_captions_are_encoded_once_for_all_steps(reader):
    """No caption too, which is one of padding."""
    model, read = captioned(), []
    model.text.register_forward_hook(lambda module, inputs, output: read.append(output.states))
    batch = {"image": torch.zeros(2, 1, 4, 4), "caption": encode(["one", "two"], 6, "length")}
    if reader == "sampler":
        exact = ddim(model, torch.arange(2), model.null_conditions(2), steps=3)["image"]
        read.clear()
        assert torch.equal(READERS[reader](model, None)["image"], exact)
    else:
        READERS[reader](model, batch)
    assert len(read) == (2 if reader == "inversion" else 1)  # on the way up, and down
