"""Adversarial losses: formulae against numbers worked out by hand, gradients of penalties against finite differences."""

import math

import pytest
import torch
from torch import nn

from genai.losses import adversarial

REAL, FAKE = torch.tensor([2.0, -0.5]), torch.tensor([-1.0, 3.0])


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("loss", "logits", "expected"),
    [
        (adversarial.logistic, (REAL, FAKE), [softplus(-2) + softplus(-1), softplus(0.5) + softplus(3)]),
        (adversarial.non_saturating, (FAKE,), [softplus(1), softplus(-3)]),
        (adversarial.hinge, (REAL, FAKE), [0 + 0, 1.5 + 4]),
        (adversarial.hinge_generator, (FAKE,), [1, -3]),
        (adversarial.least_squares, (REAL, FAKE), [0.5 * 1 + 0.5 * 1, 0.5 * 2.25 + 0.5 * 9]),
        (adversarial.least_squares_generator, (FAKE,), [0.5 * 4, 0.5 * 4]),
        (adversarial.wasserstein, (REAL, FAKE), [-3, 3.5]),
        (adversarial.wasserstein_generator, (FAKE,), [1, -3]),
        (adversarial.relativistic, (REAL, FAKE), [softplus(-3), softplus(3.5)]),
        (adversarial.relativistic_generator, (REAL, FAKE), [softplus(3), softplus(-3.5)]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_losses_are_those_of_their_papers(loss, logits, expected):
    assert loss(*logits).tolist() == pytest.approx(expected, rel=1e-6)
    places = [t[:, None, None].expand(2, 3, 4) for t in logits]
    assert loss(*places).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("pair", "discriminator", "generator"),
    [
        (adversarial.NonSaturating(), adversarial.logistic, adversarial.non_saturating),
        (adversarial.Hinge(), adversarial.hinge, adversarial.hinge_generator),
        (adversarial.LeastSquares(), adversarial.least_squares, adversarial.least_squares_generator),
        (adversarial.Wasserstein(), adversarial.wasserstein, adversarial.wasserstein_generator),
        (adversarial.Relativistic(), adversarial.relativistic, adversarial.relativistic_generator),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_pair_is_its_two_losses(pair, discriminator, generator):
    assert torch.equal(pair.discriminator(REAL, FAKE), discriminator(REAL, FAKE))
    given = (REAL, FAKE) if pair.paired else (FAKE,)
    assert torch.equal(pair.generator(REAL if pair.paired else None, FAKE), generator(*given))


def net(inputs, outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def check_gradients(parameters, penalty):
    """Every parameter's gradient of `penalty()` against central differences."""
    grads = torch.autograd.grad(penalty(), parameters, allow_unused=True)  # the last bias moves no gradient
    for p, grad in zip(parameters, grads, strict=True):
        flat, step = p.data.view(-1), 1e-5
        for k in range(0, len(flat), 5):
            values = []
            for sign in (1, -1):
                flat[k] += sign * step
                values.append(penalty().item())
                flat[k] -= sign * step
            expected = (values[0] - values[1]) / (2 * step)
            assert (0.0 if grad is None else grad.view(-1)[k].item()) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_r1_is_the_squared_gradient_and_its_own_gradient_is_right():
    d, x = net(6, 1), data(5, 6).requires_grad_()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: d(row)[0]))(x.detach())
    assert torch.allclose(adversarial.r1(d(x)[:, 0], x), jacobian.square().sum(1))
    check_gradients(list(d.parameters()), lambda: adversarial.r1(d(x)[:, 0], x).mean())


def test_the_gradient_penalty_is_of_the_points_between_and_its_own_gradient_is_right():
    d, real, fake = net(6, 1), data(5, 1, 2, 3), data(5, 1, 2, 3).flip(0)
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    penalty = lambda: adversarial.gradient_penalty(lambda x: d(x.flatten(1))[:, 0], real, fake, u)  # noqa: E731
    between = real + u.view(5, 1, 1, 1) * (fake - real)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: d(row)[0]))(between.flatten(1))
    assert torch.allclose(penalty(), (jacobian.square().sum(1).sqrt() - 1).square())
    assert torch.equal(between[0], real[0]) and torch.allclose(between[-1], fake[-1])
    check_gradients(list(d.parameters()), lambda: penalty().mean())


def test_a_discriminator_without_slope_gets_a_finite_penalty():
    d = nn.Linear(4, 1)
    nn.init.zeros_(d.weight)
    penalty = adversarial.gradient_penalty(lambda x: d(x)[:, 0], torch.ones(3, 4), torch.zeros(3, 4), torch.rand(3))
    penalty.mean().backward()
    assert penalty.tolist() == [1, 1, 1] and torch.isfinite(d.weight.grad).all()


def test_the_path_length_is_that_of_the_jacobian_and_its_own_gradient_is_right():
    g, w, noise = net(2 * 3, 12), data(4, 2, 3).requires_grad_(), data(4, 1, 3, 4) / math.sqrt(12)
    images = lambda w: g(w.flatten(1)).view(-1, 1, 3, 4)  # noqa: E731
    lengths = []
    for k in range(4):
        jacobian = torch.func.jacrev(lambda row: g(row.flatten()))(w[k].detach())  # (12, 2, 3)
        squares = torch.einsum("o,old->ld", noise[k].flatten(), jacobian).square().sum(1)
        lengths.append(squares.mean().sqrt())
    assert torch.allclose(adversarial.path_length(images(w), w, noise), torch.stack(lengths))
    check_gradients(list(g.parameters()), lambda: adversarial.path_length(images(w), w, noise).mean())
