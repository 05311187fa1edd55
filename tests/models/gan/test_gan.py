"""The GAN family: networks against their formulae, the adversarial losses, statistics, truncation, the samplers."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn

from genai.checkpoint.build import check_target
from genai.core import rng
from genai.core.errors import UserError
from genai.losses import adversarial
from genai.models.gan import biggan, dcgan, nets, samplers, spectral
from genai.models.gan.gan import GAN, slerp, standing_statistics, truncate_normal
from genai.nn import latents

SPECTRAL = [
    (lambda: spectral.SpectralLinear(5, 8), torch.randn(3, 5)),
    (lambda: spectral.SpectralConv2d(3, 6, 3), torch.randn(2, 3, 5, 4)),
    (lambda: spectral.SpectralEmbedding(7, 4), torch.tensor([0, 6, 3])),
]


@pytest.mark.parametrize(("build", "x"), SPECTRAL)
def test_a_spectral_weight_has_largest_singular_value_1(build, x):
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        layer.weight *= 3
        for _ in range(300):
            layer(x)
    sigma = torch.linalg.svdvals(layer.weight.flatten(1))[0]
    weight = spectral.spectral_normalize(layer.weight, layer.u, keep=False)
    assert torch.allclose(weight, layer.weight / sigma, rtol=1e-4)
    plain = build()
    plain.load_state_dict({**layer.state_dict(), "weight": layer.weight / sigma})
    base = next(kind for kind in type(plain).__mro__ if kind.__module__.startswith("torch."))
    assert torch.allclose(layer.eval()(x), base.forward(plain, x), atol=1e-5)


def test_u_moves_once_with_each_training_forward_and_never_else():
    torch.manual_seed(0)
    layer, x = spectral.SpectralLinear(5, 8), torch.randn(3, 5)

    def moved(u, times):
        for _ in range(times):
            u = nn.functional.normalize(layer.weight @ nn.functional.normalize(layer.weight.T @ u, dim=0), dim=0)
        return u

    start = layer.u.clone()
    total = layer(x).sum() + layer(x + 1).sum()  # two passes, then back through both
    total.backward()
    assert torch.allclose(layer.u, moved(start, 2), atol=1e-6)
    now = layer.u.clone()
    layer.eval()(x)
    assert torch.equal(layer.u, now) and "u" in layer.state_dict()


def test_the_gradient_of_a_spectral_weight_is_that_of_w_over_sigma():
    torch.manual_seed(0)
    layer, x = spectral.SpectralLinear(5, 8, bias=False).double(), torch.randn(3, 5, dtype=torch.float64)
    for _ in range(500):
        layer(x)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    w = layer.weight.detach().clone().requires_grad_()
    y = nn.functional.linear(x, w / torch.linalg.matrix_norm(w, 2))
    assert torch.allclose(grad, torch.autograd.grad(y.square().sum(), w)[0], atol=1e-6)


def test_spectral_layers_compile_whole():
    torch.manual_seed(0)
    layer, x = spectral.SpectralConv2d(3, 6, 3), torch.randn(2, 3, 4, 4)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    y, u = layer(x), layer.u.clone()
    layer.load_state_dict(state)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), y, atol=1e-6) and torch.allclose(layer.u, u, atol=1e-6)


def test_conditional_batch_norm_is_its_formula():
    torch.manual_seed(0)
    layer, x, c = biggan.ConditionalBatchNorm(3, 5), torch.randn(6, 3, 4, 4), torch.randn(6, 5)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    for _ in range(200):
        y = layer(x, c)
    gain, bias = (m.weight / torch.linalg.matrix_norm(m.weight, 2) for m in (layer.gain, layer.bias))
    expected = (1 + c @ gain.T)[..., None, None] * (x - mean) / (variance + 1e-5).sqrt() + (c @ bias.T)[..., None, None]
    assert torch.allclose(y, expected, atol=1e-4)


def test_projection_is_its_formula():
    head, phi, label = nets.projection(6, 4), torch.randn(5, 6), torch.tensor([0, 3, 1, 1, 2])
    expected = [
        phi[k] @ head.linear.weight[0] + head.linear.bias[0] + phi[k] @ head.embed.weight[label[k]] for k in range(5)
    ]
    assert torch.allclose(head(phi, label), torch.stack(expected), atol=1e-6)
    assert nets.projection(6, None)(phi, None).shape == (5,)


def test_each_block_sees_its_chunk_of_z_and_the_label():
    torch.manual_seed(0)
    g = biggan.Generator([1, 8, 8], 6, 3, 4, [1, 2, 2], label_width=5)
    seen = []
    g.flat.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for block in g.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    z, label = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    g(z, label)
    y = g.embed(label)
    expected = [z[:, :2], torch.cat([y, z[:, 2:4]], 1), torch.cat([y, z[:, 4:]], 1)]
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    with pytest.raises(UserError, match=r"model.latents=7 must be a multiple of 3"):
        biggan.Generator([1, 8, 8], 7, 3, 4)


def test_attention_begins_as_the_identity_and_is_its_formula():
    torch.manual_seed(0)
    layer, x = biggan.SelfAttention(8).eval(), torch.randn(2, 8, 4, 6)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gamma, 0.7)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    k, v = (nn.functional.max_pool2d(t, 2).flatten(2) for t in (k, v))
    weights = torch.einsum("bchw,bcn->bhwn", q, k).softmax(-1)
    h = torch.einsum("bhwn,bcn->bchw", weights, v)
    assert torch.allclose(layer(x), x + 0.7 * layer.out(h), atol=1e-5)


def test_the_orthogonal_penalty_is_on_products_of_different_filters():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.Conv2d(2, 3, 3))
    expected = 0.0
    for weight in (net[1].weight, net[2].weight.reshape(3, -1)):
        gram = weight @ weight.T
        expected += sum(gram[i, j].item() ** 2 for i in range(len(gram)) for j in range(len(gram)) if i != j)
    assert biggan.orthogonal_penalty(net).item() == pytest.approx(expected, rel=1e-5)
    net.apply(biggan.initialise)
    assert biggan.orthogonal_penalty(net).item() == pytest.approx(0, abs=1e-8)


# Sizes


def pair(kind, shape, classes=None, latents=6):
    if kind == "mlp":
        return nets.MLPGenerator(shape, latents, classes, 16, 2), nets.MLPDiscriminator(shape, classes, 16, 2)
    if kind == "biggan":
        generator = biggan.Generator(shape, latents, classes, 4, [1, 2, 2], [shape[1]], 5)
        return generator, biggan.Discriminator(shape, classes, 4, [1, 2, 2], [shape[1] // 2])
    norms = {"dcgan": dcgan.batch_norm, "layer": dcgan.layer_norm, "instance": dcgan.instance_norm, "none": None}
    return dcgan.Generator(shape, latents, classes, 4), dcgan.Discriminator(shape, classes, 4, norm=norms[kind])


KINDS = ["mlp", "dcgan", "layer", "instance", "none", "biggan"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [[1, 8, 8], [3, 12, 12], [1, 20, 28], [1, 28, 28], [3, 32, 32]], ids=str)
@pytest.mark.parametrize("classes", [None, 3])
def test_networks_take_every_size_they_should(kind, shape, classes):
    generator, discriminator = pair(kind, shape, classes)
    label = None if classes is None else torch.tensor([0, 2])
    x = generator(torch.randn(2, 6), label)
    assert x.shape == (2, *shape) and x.abs().max() <= 1
    assert discriminator(x, label).shape == (2,)


@pytest.mark.parametrize(
    "build",
    [
        lambda shape: dcgan.Generator(shape, 6),
        dcgan.Discriminator,
        lambda shape: biggan.Generator(shape, 6),
        biggan.Discriminator,
    ],
)
def test_other_sizes_are_refused(build):
    with pytest.raises(UserError, match=r"halves images 2 times, .* multiples of 4, got 30x28: change data.size"):
        build([1, 30, 28])
    with pytest.raises(UserError, match=r"images of shape \[C, H, W\], got \[2\]"):
        build([2])


def test_convolutions_begin_as_in_the_paper():
    torch.manual_seed(0)
    d = dcgan.Discriminator([3, 32, 32], None, 32, [1, 2, 4])
    weights = torch.cat([m.weight.flatten() for m in d.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02) and abs(weights.mean().item()) < 1e-3


# Adversarial training


def make_gan(kind="mlp", loss=None, classes=3, model=GAN, **arguments):
    torch.manual_seed(0)
    generator, discriminator = pair(kind, [1, 8, 8], classes)
    loss = loss or adversarial.NonSaturating()
    return model("image", [1, 8, 8], 6, generator, discriminator, loss, classes, **arguments)


def batch(n=16):
    return {"image": rng.uniform(rng.seed_range(3, n), (1, 8, 8)) * 2 - 1, "label": torch.arange(n) % 3}


LOSSES = [
    adversarial.NonSaturating(),
    adversarial.Hinge(),
    adversarial.LeastSquares(),
    adversarial.Wasserstein(),
    adversarial.Relativistic(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda m: type(m).__name__)
def test_both_networks_minimise_their_losses(loss):
    model, data = make_gan(loss=loss, r1=3.0, r2=0.5, gradient_penalty=10.0), batch()
    fake = model.generate(data, 0)
    real, false = (model.discriminator(x, data["label"]) for x in (data["image"], fake["fake"]))
    torch.manual_seed(1)
    losses = model.discriminator_loss(data, fake, 0)
    torch.manual_seed(1)
    x, y = data["image"].clone().requires_grad_(), fake["fake"].detach().requires_grad_()
    r1, r2 = (adversarial.r1(model.discriminator(t, data["label"]), t).mean() for t in (x, y))
    penalty = adversarial.gradient_penalty(lambda t: model.discriminator(t, data["label"]), x, y, torch.rand(16)).mean()
    expected = loss.discriminator(real, false).mean() + 1.5 * r1 + 0.25 * r2 + 10 * penalty
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5) and losses.weight == 16
    logs = {name: value.item() for name, (value, _) in losses.logs.items()}
    assert not any(value.requires_grad for value, _ in losses.logs.values())
    assert logs["r1"] == pytest.approx(r1.item(), rel=1e-5) and logs["r2"] == pytest.approx(r2.item(), rel=1e-5)
    assert logs["logit_real"] == pytest.approx(real.mean().item(), abs=1e-6)
    assert logs["logit_fake"] == pytest.approx(false.mean().item(), abs=1e-6)
    if loss.boundary is None:
        assert logs["accuracy"] == pytest.approx((real > false).double().mean().item())
    else:
        assert logs["accuracy_real"] == pytest.approx((real > loss.boundary).double().mean().item())
        assert logs["accuracy_fake"] == pytest.approx((false < loss.boundary).double().mean().item())
    expected = loss.generator(real, false).mean()
    assert model.generator_loss(data, fake, 0).total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not data["image"].requires_grad


class Bare:
    """A user's pair of losses, without the attributes that are optional."""

    def discriminator(self, real, fake):
        return (1 - real).square() + (1 + fake).square()

    def generator(self, real, fake):
        assert real is None
        return (1 - fake).square()


def test_a_loss_of_ones_own_is_two_functions_alone():
    model, data = make_gan(loss=Bare()), batch()
    fake = model.generate(data, 0)
    assert "accuracy" in model.discriminator_loss(data, fake, 0).logs
    assert model.generator_loss(data, fake, 0).total.isfinite()


def test_each_update_moves_its_own_parameters():
    model, data = make_gan(r1=1.0), batch()
    fake = model.generate(data, 0)
    model.discriminator_loss(data, fake, 0).total.backward()
    assert all(p.grad is None for _, p in model.generator_parameters())
    assert all(p.grad is not None for _, p in model.discriminator_parameters())
    model.generator_loss(data, fake, 0).total.backward()
    assert all(p.grad is not None for _, p in model.generator_parameters())
    names = [name for name, _ in model.generator_parameters() + model.discriminator_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_evaluation_has_no_penalties():
    model, data = make_gan(r1=1.0, gradient_penalty=10.0).eval(), batch()
    with torch.no_grad():
        losses = model.discriminator_loss(data, model.generate(data, 0), 0)
    assert "r1" not in losses.logs and torch.isfinite(losses.total)


def test_what_cannot_be_compiled_is_not_a_net_of_the_model():
    assert set(make_gan().nets()) == {"generator", "discriminator"}
    assert set(make_gan(r1=1.0).nets()) == {"generator"}


def test_big_gans_pay_for_filters_that_are_alike():
    model, data = make_gan("biggan", model=biggan.BigGAN, orthogonal=0.3).eval(), batch()
    with torch.no_grad():
        for p in model.generator.parameters():
            p += 0.1
    fake = model.generate(data, 0)
    expected = adversarial.non_saturating(model.discriminator(fake["fake"], data["label"])).mean()
    expected = expected + 0.3 * biggan.orthogonal_penalty(model.generator)
    losses = model.generator_loss(data, fake, 0)
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5) and losses.logs["orthogonal"][0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_rounds_teach_the_discriminator(kind):
    norm = kind == "dcgan"
    model, data = make_gan(kind, r1=0.0 if norm else 0.1), batch()
    groups = [model.discriminator_parameters(), model.generator_parameters()]
    optimizers = [torch.optim.Adam([p for _, p in group], 1e-2, betas=(0.5, 0.99)) for group in groups]
    for step in range(12):
        fake = model.generate(data, step)
        detached = {"fake": fake["fake"].detach()}
        for optimizer, loss, given in zip(
            optimizers, (model.discriminator_loss, model.generator_loss), (detached, fake), strict=True
        ):
            optimizer.zero_grad()
            losses = loss(data, given, step)
            losses.total.backward()
            optimizer.step()
    logs = model.discriminator_loss(data, model.generate(data, 0), 0).logs
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert logs["logit_real"][0] > logs["logit_fake"][0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_gan("dcgan", r1=1.0), "batch norm in model.discriminator mixes samples"),
        (lambda: make_gan("dcgan", gradient_penalty=10.0), "batch norm in model.discriminator mixes samples"),
        (lambda: make_gan(r1=-1.0), "model.r1=-1.0 must be a number at least 0"),
        (lambda: make_gan("biggan", model=biggan.BigGAN, orthogonal=-1), "model.orthogonal=-1"),
        (lambda: samplers.gan(make_gan(), torch.arange(2), batch(2), truncation=0), "sampler.truncation=0 must be"),
        (
            lambda: samplers.gan(make_gan(), torch.arange(2), batch(2), standing_batches=-1),
            "sampler.standing_batches=-1",
        ),
        (lambda: samplers.gan(make_gan(), torch.arange(2), batch(2), standing_batches=2), "has no batch norm"),
        (lambda: latents.interpolate(make_gan(), torch.arange(2), batch(2), columns=1), "sampler.columns=1"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_a_config_may_name_all_of_it():
    parts = [*(type(loss) for loss in LOSSES), GAN, biggan.BigGAN, biggan.Generator, dcgan.Discriminator]
    parts += [dcgan.layer_norm, dcgan.batch_norm, nets.MLPGenerator, samplers.gan, latents.interpolate]
    for part in parts:
        check_target(f"{part.__module__}.{part.__qualname__}")


# Statistics, truncation, sampling


class Normed(nn.Module):
    """Batch norm of what it is given."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, z, label):
        return self.norm(z)


def test_standing_statistics_leave_the_mode_of_norms_as_it_was_where_the_generator_raises():
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()
    with pytest.raises(TypeError):  # it takes no label
        standing_statistics(net, [(torch.randn(8, 3), None)])
    assert not net[0].training and net[0].momentum == 0.1


def test_standing_statistics_are_the_means_over_batches():
    net, batches = Normed().eval(), [2 * torch.randn(4, 3, 5, 5) + k for k in range(6)]
    net.norm.running_mean += 9
    standing_statistics(net, [(z, None) for z in batches])
    mean = torch.stack([z.mean((0, 2, 3)) for z in batches]).mean(0)
    variance = torch.stack([z.var((0, 2, 3)) for z in batches]).mean(0)
    assert torch.allclose(net.norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(net.norm.running_var, variance, rtol=1e-5)
    assert not net.norm.training and net.norm.momentum == 0.1


@pytest.mark.parametrize("kind", ["dcgan", "biggan"])
def test_a_sampler_may_measure_statistics_first_always_the_same(kind):
    model, seeds, cond = make_gan(kind).eval(), torch.arange(8), batch(8)
    before = samplers.gan(model, seeds, cond)["image"]
    after = samplers.gan(model, seeds, cond, standing_batches=3)["image"]
    assert (before - after).abs().max() > 1e-3
    assert torch.equal(samplers.gan(model, seeds, cond)["image"], before)  # nothing of it stays
    u = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(".u")}
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean += 1
    again = samplers.gan(model, seeds, cond, standing_batches=3)["image"]
    assert torch.equal(after, again)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in u.items())
    calls = []
    model.generator.register_forward_pre_hook(lambda *_: calls.append(1))
    samplers.gan(model, seeds, cond, standing_batches=3)
    assert len(calls) == 1  # measured already
    samplers.gan(model, seeds, cond, standing_batches=3, truncation=0.5)
    assert len(calls) == 1 + 4


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.5])
def test_truncated_normals_are_distributed_as_resampled_ones(threshold):
    z = truncate_normal(rng.normal(torch.arange(1), (100_000,)), threshold)[0].double()
    assert z.abs().max() <= threshold
    phi = lambda x: 0.5 * (1 + torch.erf(torch.as_tensor(x, dtype=torch.float64) / math.sqrt(2)))  # noqa: E731
    cdf = (phi(z.sort().values) - phi(-threshold)) / (phi(threshold) - phi(-threshold))
    empirical = (torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)
    assert (cdf - empirical).abs().max() * math.sqrt(len(z)) < 1.63  # Kolmogorov and Smirnov, 1 % level
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * threshold * density / math.erf(threshold / math.sqrt(2))
    assert z.var().item() == pytest.approx(variance, rel=0.02)


def test_no_truncation_is_its_limit():
    z = rng.normal(torch.arange(50), (7,))
    assert torch.allclose(truncate_normal(z, 12.0), z, atol=1e-5)
    assert torch.isfinite(truncate_normal(torch.tensor([-40.0, 40.0]), 3.0)).all()
    assert torch.equal(truncate_normal(z, 0.5).sign(), z.sign())


@pytest.mark.parametrize("kind", KINDS)
def test_sample_i_depends_on_seed_i_alone(kind):
    model, seeds, cond = make_gan(kind).eval(), torch.arange(30), batch(30)
    assert isinstance(model, latents.LatentGenerator)
    for sampler in (samplers.gan, functools.partial(latents.interpolate, columns=6)):
        whole = sampler(model, seeds, cond, truncation=1.0)["image"]
        part = sampler(model, seeds[7:9], {name: t[7:9] for name, t in cond.items()}, truncation=1.0)["image"]
        assert whole.shape == (30, 1, 8, 8) and (whole[7:9] - part).abs().max() < 1e-5


def test_rows_go_from_sample_to_sample():
    model, seeds = make_gan(classes=None).eval(), torch.arange(20)
    plain, rows = samplers.gan(model, seeds)["image"], latents.interpolate(model, seeds, columns=5)["image"]
    assert torch.allclose(rows[[0, 4, 10, 14]], plain[[0, 4, 10, 14]], atol=1e-5)
    z = model.latent(torch.tensor([5, 9]), None)
    middle = model.decode(slerp(z[:1], z[1:], torch.tensor([[0.5]])), None, seeds[:1])
    assert torch.allclose(rows[7], middle[0], atol=1e-5)


def test_the_great_circle_keeps_length_and_angle():
    a, b = nn.functional.normalize(torch.randn(2, 50, 4), dim=-1).double()
    way = [slerp(a, b, k / 5) for k in range(6)]
    angles = [(p * q).sum(-1).clamp(-1, 1).acos() for p, q in itertools.pairwise(way)]
    assert all(torch.allclose(p.norm(dim=-1), torch.ones(50).double(), atol=1e-5) for p in way)
    assert all(torch.allclose(angle, angles[0], atol=1e-5) for angle in angles)
    assert torch.allclose(slerp(a, 2 * a, 0.25), 1.25 * a, atol=1e-4)


def test_a_misspelt_label_is_refused():
    with pytest.raises(UserError, match="this model takes label, one of 3 classes, and was given lable"):
        samplers.gan(make_gan(), torch.arange(2), {"lable": torch.tensor([1, 2])})
