"""StyleGAN2: every formula against loops, finite differences or numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.signal import upfirdn
from torch.nn import functional as F

from genai.checkpoint.build import build_typed
from genai.cli import compose_config
from genai.core import rng
from genai.core.errors import UserError
from genai.models.gan import samplers
from genai.models.gan.ada import ADA, Augment
from genai.models.gan.equalized import GAIN, EqualizedConv, EqualizedLinear
from genai.models.gan.resample import FIR, downsample, upsample
from genai.models.gan.stylegan2 import StyleGAN2
from genai.models.gan.stylegan2_nets import (
    Discriminator,
    Generator,
    StyledConv,
    StyledUpConv,
    minibatch_std,
    seeded_noise,
)

NAMES = [
    "flip",
    "quarter_turns",
    "shift",
    "scale",
    "rotate",
    "stretch",
    "fraction",
    "brightness",
    "contrast",
    "luma_flip",
    "hue",
    "saturation",
]


def build(shape=(1, 8, 8), classes=None, widths=(6, 4), augment=None, **options):
    torch.manual_seed(0)
    generator = Generator(shape, 5, widths, style=6, layers=2, classes=classes)
    discriminator = Discriminator(shape, widths, classes)
    options = {"gamma": 0.5, **options}
    model = StyleGAN2("image", shape, classes, 5, generator, discriminator, augment=augment, **options)
    for module in model.modules():
        if isinstance(module, StyledConv):
            torch.nn.init.constant_(module.strength, 0.3)
    return model.train()


def only(**factors):
    return Augment(**{name: factors.get(name, 0.0) for name in NAMES})


def example(shape=(1, 8, 8), n=4, classes=None, dtype=torch.float32):
    torch.manual_seed(1)
    batch = {"image": torch.rand(n, *shape, dtype=dtype) * 2 - 1}
    return batch if classes is None else {**batch, "label": torch.arange(n) % classes}


# Networks


def by_loops(x, weight, style, up):
    """Equations 1 and 3, sample by sample, tap by tap."""
    n, outputs, (h, w) = len(x), len(weight), x.shape[2:]
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 16  # sums to 4
    out = []
    for b in range(n):
        modulated = weight * style[b][None, :, None, None]
        for o in range(outputs):
            modulated[o] /= np.sqrt((modulated[o] ** 2).sum() + 1e-8)
        maps = np.zeros((outputs, 2 * h + 1, 2 * w + 1) if up else (outputs, h + 2, w + 2))
        for o, i, row, column, a, c in np.ndindex(outputs, weight.shape[1], h, w, 3, 3):
            if up:  # every pixel is spread over 3x3 of a grid of twice as many
                maps[o, 2 * row + a, 2 * column + c] += modulated[o, i, a, c] * x[b, i, row, column]
            else:  # to where this pixel is the one at (a, c) of the window
                maps[o, row + 2 - a, column + 2 - c] += modulated[o, i, a, c] * x[b, i, row, column]
        maps = maps if up else maps[:, 1:-1, 1:-1]
        if up:
            padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
            maps = sum(taps[a, c] * padded[:, a : a + 2 * h, c : c + 2 * w] for a in range(4) for c in range(4))
        out.append(maps)
    return np.stack(out)


@pytest.mark.parametrize("up", [False, True])
def test_a_styled_convolution_is_the_papers_formula(up):
    torch.manual_seed(0)
    layer = (StyledUpConv if up else StyledConv)(3, 4, 5).double()
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.constant_(layer.strength, 0.7)
    x, w = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 5).double()
    size = (8, 12) if up else (4, 6)
    noise = torch.randn(2, 1, *size).double()
    found = layer(x, w, noise)
    style = (w @ layer.affine.weight.T / math.sqrt(5) + layer.affine.bias).detach().numpy()
    y = by_loops(x.numpy(), layer.weight.detach().numpy(), style, up)
    y = y + 0.7 * noise.numpy() + layer.bias.detach().numpy()[:, None, None]
    assert np.allclose(found.detach().numpy(), np.where(y > 0, y, 0.2 * y) * math.sqrt(2), atol=1e-10)


def test_the_filter_is_upfirdn():
    torch.manual_seed(0)
    x, taps = torch.randn(2, 3, 6, 8).double(), np.array([1, 3, 3, 1]) / 8

    def both(up, down, taps, pad):
        y = np.pad(x.numpy(), ((0, 0), (0, 0), pad, pad))
        return upfirdn(taps, upfirdn(taps, y, up, down, axis=2), up, down, axis=3)

    full = both(1, 1, taps, (0, 0))  # "full": three more than x on each axis
    assert np.allclose(FIR(padding=2).double()(x), full[:, :, 1:-1, 1:-1])
    assert np.allclose(downsample().double()(x), full[:, :, 2:-2:2, 2:-2:2])
    spread = both(2, 1, 2 * taps, (0, 0))  # twice as many, minus the last zero, plus three
    assert np.allclose(upsample().double()(x), spread[:, :, 1:-1, 1:-1])
    middle = upsample()(torch.ones(1, 1, 4, 4))[:, :, 1:-1, 1:-1]
    assert torch.allclose(middle, torch.ones_like(middle))


@pytest.mark.parametrize("fir", [FIR(padding=1), FIR(padding=2), downsample(), upsample()])
def test_the_filters_gradients_are_its_own(fir):
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fir.double(), x) and torch.autograd.gradgradcheck(fir, x)


def test_weights_are_scaled_as_they_are_used():
    torch.manual_seed(0)
    x = torch.randn(512, 400)
    for rate in (1.0, 0.01):
        layer = EqualizedLinear(400, 300, bias=0.5, rate=rate, gain=2.0)
        assert torch.allclose(layer.weight.std(), torch.tensor(1 / rate), rtol=0.02)
        y = layer(x)
        assert torch.allclose((y - 1).std(), torch.tensor(2.0), rtol=0.02) and abs(y.mean() - 1) < 0.05
        with torch.no_grad():  # a step of the same length counts `rate` times
            layer.weight += 1
            layer.bias += 1
        assert torch.allclose(layer(x) - y, rate * 2 * (x.sum(1, keepdim=True) / 20 + 1), atol=1e-3)
    conv, maps = EqualizedConv(64, 32, 3, padding=1, gain=GAIN), torch.randn(8, 64, 8, 8)
    torch.nn.init.normal_(conv.bias)
    expected = F.conv2d(maps, conv.weight / 24, conv.bias, padding=1) * math.sqrt(2)
    assert torch.allclose(conv(maps), expected, atol=1e-5)


def test_minibatch_deviation_is_that_of_loops():
    x = torch.randn(8, 3, 2, 5)
    y = minibatch_std(x, 4)
    assert torch.equal(y[:, :3], x)
    for group in range(2):
        values = [
            math.sqrt(np.var([x[4 * group + k, c, h, w].item() for k in range(4)]) + 1e-8)
            for c, h, w in np.ndindex(3, 2, 5)
        ]
        assert torch.allclose(y[4 * group : 4 * group + 4, 3], torch.tensor(np.mean(values)).float(), atol=1e-6)


@pytest.mark.parametrize(
    "shape, widths", [((3, 8, 8), (8, 4)), ((1, 28, 28), (8, 6, 4)), ((3, 12, 20), (4, 4, 4)), ((1, 5, 7), (4,))]
)
def test_any_size_that_halves(shape, widths):
    model, batch = build(shape, widths=widths), example(shape)
    fake = model.generate(batch, 0)
    assert fake["fake"].shape == batch["image"].shape and fake["w"].shape == (4, 2 * len(widths), 6)
    assert model.discriminator(fake["fake"]).shape == (4,)


def test_a_plain_discriminator_is_that_of_stylegan():
    """Two activated convolutions a block, the second after the filter at every other pixel, nothing around them."""
    torch.manual_seed(0)
    net, x = Discriminator((3, 8, 8), (6, 4), residual=False).double(), torch.randn(4, 3, 8, 8).double()
    for _, p in net.named_parameters():
        torch.nn.init.normal_(p)
    taps = torch.from_numpy(np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64).expand(4, 1, 4, 4)

    def activated(x, layer, **options):
        scaled = layer.weight / math.sqrt(layer.weight[0].numel())
        y = F.linear(x, scaled) if x.ndim == 2 else F.conv2d(x, scaled, **options)
        return math.sqrt(2) * F.leaky_relu(y + layer.bias.view(1, -1, *[1] * (y.ndim - 2)), 0.2)

    (block,) = net.blocks
    assert sum(p.numel() for p in block.parameters()) == 4 * 4 * 9 + 4 + 6 * 4 * 9 + 6
    y = activated(activated(x, net.image), block.conv, padding=1)
    y = activated(F.conv2d(y, taps, padding=2, groups=4), block.down, stride=2)
    y = activated(activated(minibatch_std(y, 4), net.conv, padding=1).flatten(1), net.linear)
    assert torch.allclose(net(x), (y @ net.logit.weight.T / math.sqrt(6) + net.logit.bias)[:, 0])


def test_the_recipe_of_cifar10_is_the_published_one():
    """Karras et al., "Training Generative Adversarial Networks with Limited Data", 2020, appendix D, and, in
    NVlabs/stylegan2-ada-pytorch, `cifar` of train.py, the defaults of training/training_loop.py and `bgc` of augmentations."""
    cfg = OmegaConf.to_container(compose_config("train", ["experiment=stylegan2_cifar10"]), resolve=True)
    model, ema, data = cfg["model"], cfg["ema"], cfg["data"]
    ada, generator, discriminator = model["augment"], model["generator"], model["discriminator"]
    assert data["batch_size"] * cfg["accumulate"] * cfg["trainer"]["devices"] == 64 and data["flip"] is False
    half_life = 64 * math.log(0.5) / math.log(ema["decay"])
    assert half_life == pytest.approx(500_000, rel=1e-4) and (ema["power"], ema["ramp"]) == (None, 0.05)
    widths = [min(32768 // side, 512) for side in (4, 8, 16, 32)]
    assert generator["widths"] == discriminator["widths"] == widths
    assert (model["latents"], generator["style"], generator["layers"]) == (512, 512, 2)
    assert (discriminator["residual"], discriminator["group"]) == (False, 32)
    assert (model["classes"], model["gamma"], model["path_weight"], model["mixing"]) == (None, 0.01, 0, 0)
    assert (model["r1_every_steps"], model["path_every_steps"], model["share_fake"]) == (16, 4, False)
    assert cfg["clip_norm"] is None

    built = build_typed(model)
    assert built.augment.augment.factors == dict.fromkeys(NAMES, 1.0)
    assert (built.augment.p, ada["target"], built.augment.interval_steps, built.augment.ramp_images) == (
        0,
        0.6,
        4,
        500_000,
    )
    squares = 512 * 512
    sizes = {
        "from RGB": 3 * 512,
        "convolutions": 9 * 7 * squares,
        "deviation": 9 * 512,
        "full": 16 * squares,
        "logit": 512,
    }
    assert (
        sum(p.numel() for _, p in built.discriminator_parameters()) == sum(sizes.values()) + 9 * 512 + 1
    )  # and biases
    for key, every in (("optim", 4), ("discriminator_optim", 16)):
        group, c = (
            build_typed(cfg[key])([("w", torch.nn.Parameter(torch.zeros(2, 2)))]).param_groups[0],
            every / (every + 1),
        )
        assert group["lr_max"] == pytest.approx(0.0025 * c) and group["decay_steps"] is None and group["eps"] == 1e-8
        assert group["betas"] == pytest.approx((0, 0.99**c)) and group["weight_decay"] == group["warmup_steps"] == 0


# Adversarial training


def numeric(function, x, index, eps=1e-6):
    """Central difference of a scalar by one number of x, a leaf without gradient that is changed and restored."""
    kept = x[index].item()
    x[index] = kept + eps
    above = function().item()
    x[index] = kept - eps
    below = function().item()
    x[index] = kept
    return (above - below) / (2 * eps)


def again(function, seed=3):
    """function with the same random draws each time."""

    def call():
        torch.manual_seed(seed)
        return function()

    return call


def few(parameters, n=2):
    """Some numbers of every parameter."""
    for name, p in parameters:
        for index in np.linspace(0, p.numel() - 1, min(n, p.numel())).astype(int):
            yield name, p, np.unravel_index(index, p.shape) if p.ndim else ()


@pytest.mark.parametrize("augment", [None, ADA(Augment(), p=1.0)])
def test_r1_is_the_gradients_square_and_has_a_gradient(augment):
    """Against finite differences, through the augmentation, whose draws repeat."""
    model, batch = build(augment=augment).double(), example(dtype=torch.float64)
    x, p = batch["image"], torch.tensor(0.0 if augment is None else 1.0)
    fake = {"fake": x.flip(2) / 2}

    def scores():
        if augment is not None:
            augment.p.copy_(p)  # update moves it
        return model.discriminate(x, None).sum()

    slopes = [numeric(again(scores), x, i) for i in np.ndindex(*x.shape)]
    expected = np.square(slopes).reshape(4, -1).sum(1).mean()

    def loss(step):
        if augment is not None:
            augment.p.copy_(p)
        return model.discriminator_loss(batch, fake, step)

    lazy, plain = again(lambda: loss(16))(), again(lambda: loss(1))()
    assert np.isclose(lazy.logs["r1"][0].item(), expected, rtol=1e-5)
    assert np.isclose((lazy.total - plain.total).item(), 16 * 0.5 / 2 * expected, rtol=1e-5)

    parameters = list(model.discriminator_parameters())
    torch.autograd.backward(lazy.total, inputs=[p for _, p in parameters])
    for name, parameter, index in few(parameters):
        slope = numeric(again(lambda: loss(16).total), parameter.detach(), index)
        assert np.isclose(parameter.grad[index].item(), slope, rtol=1e-4, atol=1e-6), name


def test_path_lengths_are_those_of_the_jacobian_and_have_gradients():
    model = build().double().eval()
    model.path_mean.fill_(0.3)
    z, noise = torch.randn(2, 5).double(), seeded_noise(torch.tensor([4, 9]))
    w = model.generator(z, noise=noise)[1].detach().contiguous().requires_grad_()
    lengths, penalty = again(lambda: model.path_penalty(model.generator.synthesis(w, noise), w))()

    y = again(lambda: torch.randn(2, 1, 8, 8, dtype=torch.float64))() / 8  # sqrt(H W) = 8
    flat = w.detach()
    slopes = [
        numeric(lambda: (model.generator.synthesis(flat, noise) * y).sum(), flat, i) for i in np.ndindex(*w.shape)
    ]
    expected = np.sqrt(np.square(slopes).reshape(2, 4, 6).sum(2).mean(1))  # over layers
    assert np.allclose(lengths.detach(), expected, rtol=1e-6)
    mean = 0.99 * 0.3 + 0.01 * expected.mean()
    assert np.allclose(penalty.detach(), (expected - mean) ** 2, rtol=1e-5) and model.path_mean == 0.3

    def total():
        images, w = model.generator(z, noise=noise)
        return model.path_penalty(images, w)[1].sum()

    parameters = list(model.generator_parameters())
    again(total)().backward()
    for name, parameter, index in few(parameters):
        slope = numeric(again(total), parameter.detach(), index)
        found = 0.0 if parameter.grad is None else parameter.grad[index].item()
        assert np.isclose(found, slope, rtol=1e-4, atol=1e-7), name


def test_regularisation_is_lazy_and_the_path_mean_follows():
    model, batch = build(gamma=0.5, r1_every_steps=3, path_every_steps=2), example()
    assert model.lazy == {"generator": 2, "discriminator": 3}
    for step in range(7):
        before = model.path_mean.clone()
        fake = model.generate(batch, step)
        critic, generator = model.discriminator_loss(batch, fake, step), model.generator_loss(batch, fake, step)
        assert (critic.logs["r1"][1] > 0) == (step % 3 == 0)
        assert (generator.logs["path_length"][1] > 0) == (step % 2 == 0)
        lengths, weight = generator.logs["path_length"]
        if step % 2 == 0:
            assert weight == 2 and torch.allclose(model.path_mean, 0.99 * before + 0.01 * lengths)
        else:
            assert torch.equal(model.path_mean, before) and torch.equal(generator.total, generator.logs["g_loss"][0])
    with torch.no_grad():  # an evaluation has no gradients to penalise
        assert model.discriminator_loss(batch, model.generate(batch, 0), 0).logs["r1"][1] == 0
    assert {"path_mean", "generator.mapping.average"} <= set(model.state_dict())


def test_generator_and_discriminator_share_no_parameters():
    model, batch = build(classes=3), example(classes=3)
    fake = model.generate(batch, 0)
    loss = model.discriminator_loss(batch, fake, 0)
    assert all(
        g is None
        for g in torch.autograd.grad(
            loss.total, [p for _, p in model.generator_parameters()], allow_unused=True, retain_graph=True
        )
    )
    loss.total.backward()
    assert all(p.grad is not None for _, p in model.discriminator_parameters())
    model.generator_loss(batch, fake, 0).total.backward()
    assert all(p.grad is not None for _, p in model.generator_parameters())
    both = [*model.generator_parameters(), *model.discriminator_parameters()]
    assert dict(both).keys() == dict(model.named_parameters()).keys()


def test_the_mean_style_moves_in_training_only_and_truncation_leads_to_it():
    model, batch = build(), example()
    average = model.generator.mapping.average
    with torch.no_grad():
        model.eval().generate(batch, 0)
        assert not average.any()
        w = model.train().generate(batch, 0)["w"]
        assert torch.allclose(average, 0.005 * w[:, 0].mean(0))
        seeds = torch.arange(3)
        whole, half, none = (model.eval().latent(seeds, truncation=psi) for psi in (None, 0.5, 0.0))
        assert torch.allclose(half, 0.5 * (whole + average)) and not torch.allclose(whole[0], whole[1])
        assert torch.equal(whole[:, 0], model.generator.mapping(rng.normal(seeds, (5,), stream=rng.INITIAL)))
        images = model.decode(none, None, torch.zeros(3, dtype=torch.int64))
        assert torch.allclose(images[:1].expand_as(images), images, atol=1e-5)
        synthesis = model.generator.synthesis
        assert not torch.equal(synthesis(none[:1]), synthesis(none[:1]))  # noise anew
        maps = [torch.zeros(1, 1, *size) for size in synthesis.sizes]
        assert torch.equal(synthesis(whole, maps), synthesis(whole, maps))


def test_a_sample_depends_on_its_seed_alone():
    model, seeds = build(shape=(3, 8, 8), classes=4).eval(), torch.arange(5, 11)

    def sample(seeds):
        return samplers.gan(model, seeds, {"label": seeds % 4}, truncation=0.7)["image"]

    images = sample(seeds)
    assert torch.allclose(sample(seeds[3:4]), images[3:4], atol=1e-5) and images.abs().max() <= 1
    assert not torch.allclose(images[0], images[1])


def test_a_table_of_styles_shows_its_sources_and_their_mixtures():
    model, seeds = build().eval(), torch.arange(12)
    x = samplers.style_mix(model, seeds, columns=4, cut=1)["image"]
    alone = lambda seed, noise: model.decode(model.latent(torch.tensor([seed])), None, torch.tensor([noise]))[0]  # noqa: E731
    assert torch.allclose(x[2], alone(2, 0), atol=1e-5) and torch.allclose(x[8], alone(8, 8), atol=1e-5)
    coarse, fine = (model.latent(torch.tensor([seed])) for seed in (8, 2))
    mixed = model.decode(torch.cat([coarse[:, :1], fine[:, 1:]], 1), None, torch.tensor([8]))[0]
    assert torch.allclose(x[10], mixed, atol=1e-5)
    assert torch.allclose(samplers.style_mix(model, seeds[10:11], columns=4, cut=1)["image"][0], x[10], atol=1e-5)
    with pytest.raises(UserError, match=r"sampler.cut=9 must be below \d+"):
        samplers.style_mix(model, seeds, cut=9)
    with pytest.raises(UserError, match=r"sampler.standing_batches"):
        samplers.gan(model, seeds, standing_batches=2)
    with pytest.raises(UserError, match=r"sampler.truncation=1.5"):
        samplers.gan(model, seeds, truncation=1.5)


def test_styles_mix_from_a_layer_on():
    model, batch = build(mixing=1.0), example(n=64)
    w = model.generate(batch, 0)["w"]
    changes = (w[:, 1:] != w[:, :-1]).any(2)
    assert (changes.sum(1) == 1).all() and changes.any(0).all()
    model.mixing = 0.0
    w = model.generate(batch, 0)["w"]
    assert torch.equal(w, w[:, :1].expand_as(w))


def test_labels_reach_generator_and_discriminator():
    model, batch = build(classes=3), example(classes=3)
    z, noise = torch.randn(4, 5), seeded_noise(torch.arange(4))
    other = (batch["label"] + 1) % 3
    images = [model.generator(z, label, noise=noise)[0] for label in (batch["label"], other)]
    assert not torch.allclose(*images)
    logits = [model.discriminator(batch["image"], label) for label in (batch["label"], other)]
    assert not torch.allclose(*logits)
    embedding = model.discriminator.label.weight
    (gradient,) = torch.autograd.grad(logits[0].sum(), embedding)
    assert gradient.abs().sum(1).gt(0).all()


def test_compiled_networks_train_the_same():
    from torch._dynamo.backends.registry import lookup_backend

    graphs, aot = [], lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return aot(graph, inputs)

    def play(model):
        torch.manual_seed(5)
        totals = []
        for step in (0, 1):
            fake = model.generate(batch, step)
            for loss in (model.discriminator_loss(batch, fake, step), model.generator_loss(batch, fake, step)):
                loss.total.backward()
                totals.append(loss.total.detach())
        return torch.stack(totals), [p.grad for p in model.parameters()]

    batch = example()
    plain, compiled = build(), build()
    for net in compiled.nets().values():
        net.compile(backend=backend, fullgraph=True)
    (a, grads), (b, others) = play(plain), play(compiled)
    assert len(graphs) >= 2 and torch.allclose(a, b, atol=1e-5)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(grads, others, strict=True))


def test_mixed_precision_trains_nearly_the_same():
    """Augmentation, whose coordinates bf16 would spoil, and the sum of images stay in full precision."""
    model, batch = build(shape=(3, 8, 8), augment=ADA(Augment(), p=0.8)), example((3, 8, 8))
    totals = []
    for half in (False, True):
        model.path_mean.zero_()
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            fake = model.generate(batch, 0)
            assert fake["fake"].dtype == model.augment(batch["image"]).dtype == torch.float32
            losses = model.discriminator_loss(batch, fake, 0), model.generator_loss(batch, fake, 0)
        for loss in losses:
            loss.total.backward()
        totals.append([loss.total.item() for loss in losses])
    assert np.allclose(*totals, rtol=0.02)


def test_a_short_last_batch_can_be_evaluated_but_not_trained_on():
    model = build()
    with pytest.raises(UserError, match=r"data.batch_size=6 must be a multiple of 4"):
        model.prepare([example(n=6)])
    with torch.no_grad():
        assert model.eval().discriminator(torch.zeros(7, 1, 8, 8)).shape == (7,)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"data.batch_size=6 must be a multiple of 4"):
        build().discriminator(torch.zeros(6, 1, 8, 8))
    with pytest.raises(UserError, match=r"multiples of 4, got 10x8 .data.size, or fewer model.generator.widths"):
        build(shape=(1, 10, 8), widths=(4, 4, 4))
    with pytest.raises(UserError, match=r"model.gamma=-1 must be a number at least 0"):
        build(gamma=-1)
    with pytest.raises(UserError, match="label= must name one of its 3 classes"):
        build(classes=3).latent(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="1 or 3 channels"):
        Augment()(torch.zeros(1, 2, 4, 4), torch.tensor(0.5))
    with pytest.raises(UserError, match=r"augment.hue=2 must be a number at least 0 and at most 1"):
        Augment(hue=2)
