"""Losses of two players and the penalties that keep the game stable, one number per sample, (B,).

Logits are (B,), or (B, ...) where a discriminator judges parts of a sample, which then count equally. A pair of losses
is one object with `discriminator(real, fake)` and `generator(real, fake)`, which a config names.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """-ln D(x) - ln(1 - D(G(z))) with D = sigmoid(logit) (Goodfellow et al., 2014, eq. 1)."""
    return _each(F.softplus(-real) + F.softplus(fake))


def non_saturating(fake: Tensor) -> Tensor:
    """-ln D(G(z)) (Goodfellow et al., 2014, section 3)."""
    return _each(F.softplus(-fake))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Miyato et al., 2018, eq. 16)."""
    return _each(F.relu(1 - real) + F.relu(1 + fake))


def hinge_generator(fake: Tensor) -> Tensor:
    """-D(G(z)) (Miyato et al., 2018, eq. 17)."""
    return _each(-fake)


def least_squares(real: Tensor, fake: Tensor) -> Tensor:
    """(D(x) - 1)^2 / 2 + D(G(z))^2 / 2 (Mao et al., 2017, eq. 9)."""
    return _each(((real - 1).square() + fake.square()) / 2)


def least_squares_generator(fake: Tensor) -> Tensor:
    """(D(G(z)) - 1)^2 / 2 (Mao et al., 2017, eq. 9)."""
    return _each((fake - 1).square() / 2)


def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """D(G(z)) - D(x) (Arjovsky et al., 2017, eq. 2): its negative mean estimates the distance if D is 1-Lipschitz."""
    return _each(fake - real)


def wasserstein_generator(fake: Tensor) -> Tensor:
    """-D(G(z)) (Arjovsky et al., 2017)."""
    return _each(-fake)


def relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """-ln sigmoid(D(x) - D(G(z))), item k against sample k (Huang et al., "The GAN is dead; long live the GAN!", 2024)."""
    return _each(F.softplus(fake - real))


def relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """-ln sigmoid(D(G(z)) - D(x)), the same game the other way round."""
    return _each(F.softplus(real - fake))


def r1(logits: Tensor, x: Tensor) -> Tensor:
    """||dD(x)/dx||^2 (Mescheder et al., 2018, eq. 9, without gamma / 2), differentiable; on fakes it is R2.

    `logits` come from x (B, ...), which requires grad, by a network that keeps samples apart.
    """
    return _gradient(logits, x).square().flatten(1).sum(1)


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """(||dD(x)/dx|| - 1)^2 at x = real + u (fake - real) (Gulrajani et al., 2017, eq. 3, without lambda).

    One uniform u (B,) for each pair; the norm is over all that a sample is made of.
    """
    x = torch.lerp(real.detach(), fake.detach().to(real.dtype), u.view(-1, *[1] * (real.ndim - 1))).requires_grad_()
    return (torch.linalg.vector_norm(_gradient(discriminator(x), x).flatten(1), dim=1) - 1).square()


def path_length(images: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """||J^T y|| of images (B, C, H, W) by w (B, layers, D), the norm over D, its square's mean over layers (Karras et al.,
    2020, eq. 4, without a).

    `noise` is y / sqrt(H W), of the images' shape: then the length does not grow with the resolution.
    """
    (gradient,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


class Adversarial(Protocol):
    """What two players get, as a game wants it."""

    paired: bool
    """Whether the generator's loss needs the logits of real items; where it does not, None will do."""
    boundary: float | None
    """The logit between real and fake; None where only differences of logits mean anything."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor: ...


class NonSaturating:
    """`logistic` against `non_saturating`."""

    paired, boundary = False, 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return logistic(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return non_saturating(fake)


class Hinge:
    """`hinge` against `hinge_generator`."""

    paired, boundary = False, 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return hinge(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return hinge_generator(fake)


class LeastSquares:
    """`least_squares` against `least_squares_generator`."""

    paired, boundary = False, 0.5

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return least_squares(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return least_squares_generator(fake)


class Wasserstein:
    """`wasserstein` against `wasserstein_generator`; add a gradient penalty."""

    paired, boundary = False, None

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return wasserstein(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return wasserstein_generator(fake)


class Relativistic:
    """`relativistic` against `relativistic_generator`; R3GAN adds R1 and R2 of equal weight."""

    paired, boundary = True, None

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return relativistic(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        assert real is not None
        return relativistic_generator(real, fake)


def _each(loss: Tensor) -> Tensor:
    return loss.reshape(len(loss), -1).mean(1)


def _gradient(logits: Tensor, x: Tensor) -> Tensor:
    """Of each sample's logit by the sample itself, as x; it can be differentiated once more."""
    return torch.autograd.grad(logits.sum(), x, create_graph=True)[0]
