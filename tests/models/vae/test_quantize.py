"""Quantisers: the nearest code, what the book learns, the gradient that is published, codes that decode to what was said."""

import itertools
import math
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genai.core.errors import UserError
from genai.models.vae.quantize import (
    FiniteScalarQuantizer,
    GumbelSoftmax,
    ResidualQuantizer,
    VectorQuantizer,
    occurrences,
    rotate_gradient,
)
from genai.models.vae.vqvae import VQVAE


def quantizers():
    torch.manual_seed(0)
    return [
        VectorQuantizer(16, 3),
        VectorQuantizer(16, 3, gradient="rotation"),
        ResidualQuantizer([VectorQuantizer(16, 3) for _ in range(3)]),
        FiniteScalarQuantizer([8, 5, 4]),
        GumbelSoftmax(3),
    ]


@pytest.mark.parametrize("quantizer", quantizers(), ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)], ids=len)
def test_codes_decode_to_what_was_said(quantizer, shape):
    z = torch.randn(shape)
    quantized = quantizer.eval()(z)
    assert quantized.z.shape == z.shape and quantized.index.shape[:-1] == (shape[0], *shape[2:])
    assert quantized.index.min() >= 0 and quantized.index.max() < quantizer.codes
    assert torch.allclose(quantizer.decode(quantized.index), quantized.z, atol=1e-5)


def test_learning_never_waits_for_the_device():
    """Tensors that only pretend to be on a GPU have no values to wait for; the counts are torch's."""
    with FakeTensorMode(), torch.device("cuda"):
        quantizer = VectorQuantizer(16, 3).train()
        assert quantizer(torch.randn(4, 3, 5)).z.is_cuda
        model = SimpleNamespace(quantizer=quantizer)
        assert VQVAE.perplexity(model, torch.zeros(4, 5, dtype=torch.int64)).is_cuda  # type: ignore[arg-type]
    index = torch.randint(0, 16, (400, 3))
    assert torch.equal(occurrences(index, 20), torch.bincount(index.flatten(), minlength=20).float())


def test_the_nearest_code_is_the_nearest():
    quantizer, x = VectorQuantizer(50, 4), torch.randn(200, 4)
    assert torch.equal(quantizer.nearest(x), torch.cdist(x, quantizer.book).argmin(1))


def test_the_book_moves_to_the_mean_of_what_chose_it():
    """decay 0 is one step of k-means; the moving average is the formula."""
    torch.manual_seed(0)
    x = torch.randn(500, 2)
    quantizer = VectorQuantizer(4, 2, decay=0.0, restart=0.0).train()
    index = quantizer.nearest(x)
    quantizer(x)
    for k in index.unique():
        assert torch.allclose(quantizer.book[k], x[index == k].mean(0), atol=1e-5)
    quantizer = VectorQuantizer(4, 2, decay=0.9, restart=0.0).train()
    before, index = quantizer.sums.clone(), quantizer.nearest(x)
    quantizer(x)
    n = (index == index[0]).sum()
    expected = (0.9 * before[index[0]] + 0.1 * x[index == index[0]].sum(0)) / (0.9 + 0.1 * n)
    assert torch.allclose(quantizer.book[index[0]], expected, atol=1e-5)


def test_dead_codes_begin_anew_where_the_data_is():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 2).train()
    quantizer.book += 100  # one of them is nearest to everything
    quantizer.sums += 100
    for _ in range(200):
        quantizer(torch.randn(256, 2))
    used = quantizer.nearest(torch.randn(5000, 2)).unique()
    assert len(used) > 28 and quantizer.book.abs().max() < 10


def test_gradients_are_the_published_ones():
    x = torch.randn(6, 3, requires_grad=True)
    g = torch.randn(6, 3)
    quantizer = VectorQuantizer(8, 3).eval()
    quantized = quantizer(x)
    quantized.z.backward(g)
    assert torch.allclose(x.grad, g)  # straight through
    x.grad = None
    quantized.loss.backward()
    assert torch.allclose(x.grad, 2 * (x - quantizer.book[quantized.index[:, 0]]).detach() / 18, atol=1e-6)

    code = quantizer.book[quantized.index[:, 0]]
    for k in range(6):  # the rotation in the plane of e and q by the angle between them, as a matrix
        e, q = x[k].detach() / x[k].norm().detach(), code[k] / code[k].norm()
        r = (e + q) / (e + q).norm()
        turn = torch.eye(3) - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
        assert torch.allclose(turn @ turn.T, torch.eye(3), atol=1e-5)
        scale = (code[k].norm() / x[k].norm()).detach()
        one = x[k : k + 1].detach().requires_grad_()
        out = rotate_gradient(one, code[k : k + 1])
        assert torch.allclose(out[0], code[k], atol=1e-5)
        (grad,) = torch.autograd.grad(out, one, g[k : k + 1])
        assert torch.allclose(grad[0], scale * turn.T @ g[k], atol=1e-5)


def test_each_residual_stage_brings_it_closer():
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer([VectorQuantizer(64, 4) for _ in range(4)]).train(), torch.randn(4096, 4)
    for _ in range(100):
        quantizer(x)
    index = quantizer.eval()(x).index
    errors = []
    for k in range(1, 5):
        parts = [stage.decode(index[..., j : j + 1]) for j, stage in enumerate(list(quantizer.stages)[:k])]
        errors.append((x - sum(parts)).square().mean().item())
    assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("level", range(2, 10))
def test_shares_of_finite_scalars_are_those_of_the_published_bound(level):
    """Of z ~ N(0, 1): P(k) = P(e_k < z < e_(k+1)), where tanh(e_k + s) h - o is half-way between two levels."""
    torch.manual_seed(level)
    half, offset = (level - 1) * 0.999 / 2, 0.0 if level % 2 else 0.5
    shift, normal = math.tan(offset / half), NormalDist()
    between = [k + 0.5 - level // 2 for k in range(level - 1)]
    below = [0.0, *(normal.cdf(math.atanh((b + offset) / half) - shift) for b in between), 1.0]
    expected = torch.tensor([high - low for low, high in itertools.pairwise(below)])
    z = torch.randn(100_000, 1, requires_grad=True)
    quantized = FiniteScalarQuantizer([level])(z)
    shares = torch.bincount(quantized.index.flatten(), minlength=level) / len(z)
    assert shares.min() > 0.01  # none is dead
    assert ((shares - expected).abs() < 5 * (expected / len(z)).sqrt()).all()
    (grad,) = torch.autograd.grad(quantized.z.sum(), z)  # straight through the rounding
    slope = half / (level // 2) / torch.cosh(z.detach().double() + shift) ** 2
    assert torch.allclose(grad, slope.float(), rtol=1e-3, atol=1e-6)


def test_finite_scalars_of_an_older_state_keep_their_meaning():
    """Before their bound was part of the state it was tanh(z + artanh(o / h)) h - o with h = (L - 1) 1.001 / 2."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"quantizer": FiniteScalarQuantizer([2, 5, 8])})
    model.load_state_dict({})
    z = torch.randn(1000, 3)
    h, o = torch.tensor([1, 4, 7]) * 1.001 / 2, torch.tensor([0.5, 0, 0.5])
    bounded = torch.tanh(z + torch.atanh(o / h)) * h - o
    assert torch.equal(model["quantizer"](z).z, bounded.round() / torch.tensor([1, 2, 4]))
    again = torch.nn.ModuleDict({"quantizer": FiniteScalarQuantizer([2, 5, 8])})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again["quantizer"](z).z, model["quantizer"](z).z)


@pytest.mark.parametrize("levels", [[8, 5, 5], [2, 3], [7]])
def test_finite_scalars_use_every_level_and_no_other(levels):
    quantizer = FiniteScalarQuantizer(levels)
    z = 2 * torch.randn(50_000, len(levels))
    quantized = quantizer(z)
    assert len(quantized.index.unique()) == quantizer.codes
    for k, level in enumerate(levels):
        assert len(quantized.z[:, k].unique()) == level and quantized.z[:, k].abs().max() <= 1
    z = torch.zeros(1, len(levels), requires_grad=True)
    quantizer(z).z.sum().backward()
    assert (z.grad > 0).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="neither straight_through nor rotation"):
        VectorQuantizer(4, 2, gradient="magic")
    other = [VectorQuantizer(8, 2)], [VectorQuantizer(4, 3)], [VectorQuantizer(4, 2, gradient="rotation")]
    for stages in ([], *([VectorQuantizer(4, 2), *stages] for stages in other)):
        with pytest.raises(UserError, match="stages of a residual quantiser"):
            ResidualQuantizer(stages)
    with pytest.raises(UserError, match="codes=1"):
        VectorQuantizer(1, 2)
    with pytest.raises(UserError, match="levels=1"):
        FiniteScalarQuantizer([8, 1])


def test_the_temperature_falls_along_half_a_cosine_and_stays():
    quantizer = GumbelSoftmax(4, 1.0, 1 / 16, anneal_steps=80)
    found = [quantizer.temperature(step) for step in (0, 20, 40, 80, 1000)]
    quarter = 1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 4)) / 2
    assert found == pytest.approx([1, quarter, (1 + 1 / 16) / 2, 1 / 16, 1 / 16])


@pytest.mark.parametrize("step", [0, 10])
def test_relaxed_codes_are_those_of_logits_with_gumbel_noise(step):
    """The largest has the probability of softmax (Gumbel-max); t ln(y_i / y_j) - (z_i - z_j) is logistic at any temperature."""
    torch.manual_seed(0)
    logits = torch.tensor([0.5, -1.0, 0.0, 1.5], dtype=torch.float64)
    quantizer, n = GumbelSoftmax(4, 1.0, 0.25, anneal_steps=10).train(), 40_000
    found = quantizer(logits.expand(n, 4), step)
    assert torch.allclose(found.z.sum(1), torch.ones(n).double())
    assert torch.equal(found.z.argmax(1), found.index[:, 0])
    expected = logits.softmax(0) * n
    counts = torch.bincount(found.index[:, 0], minlength=4)
    assert (
        (counts - expected).square() / expected
    ).sum() < 16.3  # the 0.1 % point of chi-square with 3 degrees of freedom
    gap = quantizer.temperature(step) * (found.z[:, 0].log() - found.z[:, 1].log()) - (logits[0] - logits[1])
    u = gap.sigmoid().sort().values
    assert (u - torch.arange(n) / n).abs().max() < 1.95 / n**0.5  # Kolmogorov-Smirnov, 0.1 %


def test_the_divergence_of_logits_to_equally_probable_codes():
    quantizer = GumbelSoftmax(8).eval()
    assert quantizer(torch.zeros(2, 8, 3)).loss.item() == pytest.approx(0, abs=1e-6)
    assert quantizer(torch.eye(8) * 1000).loss.item() == pytest.approx(math.log(8))
    z = torch.randn(5, 8, 2, dtype=torch.float64)
    p = z.softmax(1)
    assert quantizer(z).loss.item() == pytest.approx((p * (8 * p).log()).sum(1).mean().item())


def test_relaxed_codes_pass_their_gradient_and_hard_ones_need_no_noise():
    quantizer, z = GumbelSoftmax(4), torch.randn(3, 4, 2, requires_grad=True)
    quantizer.train()(z).z[:, 0].sum().backward()
    assert (z.grad != 0).all()
    quantizer.eval()
    assert torch.equal(quantizer(z).z, quantizer(z).z) and torch.equal(quantizer(z).index[..., 0], z.argmax(1))


@pytest.mark.parametrize("given", [{"start": 0}, {"end": -1}, {"anneal_steps": 0}, {"codes": 1}])
def test_relaxations_without_a_temperature_are_refused(given):
    with pytest.raises(UserError, match=next(iter(given))):
        GumbelSoftmax(**{"codes": 4, **given})
