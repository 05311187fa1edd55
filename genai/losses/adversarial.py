"""GAN losses and the penalties that stabilise them, one number per sample, (B,).

Logits are (B,), or (B, ...) if a discriminator scores parts of a sample, which are averaged. A pair of losses is one
object with `discriminator(real, fake)` and `generator(real, fake)`, which a config names.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's -ln D(x) - ln(1 - D(G(z))), D = sigmoid(logit) (Goodfellow et al., 2014, eq. 1),
    (B,)."""
    return _each(F.softplus(-real) + F.softplus(fake))


def non_saturating(fake: Tensor) -> Tensor:
    """Return the generator's -ln D(G(z)) (Goodfellow et al., 2014, section 3), (B,)."""
    return _each(F.softplus(-fake))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Miyato et al., 2018, eq. 16), (B,)."""
    return _each(F.relu(1 - real) + F.relu(1 + fake))


def hinge_generator(fake: Tensor) -> Tensor:
    """Return the generator's -D(G(z)) (Miyato et al., 2018, eq. 17), (B,)."""
    return _each(-fake)


def least_squares(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's (D(x) - 1)^2 / 2 + D(G(z))^2 / 2 (Mao et al., 2017, eq. 9), (B,)."""
    return _each(((real - 1).square() + fake.square()) / 2)


def least_squares_generator(fake: Tensor) -> Tensor:
    """Return the generator's (D(G(z)) - 1)^2 / 2 (Mao et al., 2017, eq. 9), (B,)."""
    return _each((fake - 1).square() / 2)


def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """Return the critic's D(G(z)) - D(x) (Arjovsky et al., 2017, eq. 2), (B,).

    Its negative mean estimates the Wasserstein distance if D is 1-Lipschitz.
    """
    return _each(fake - real)


def wasserstein_generator(fake: Tensor) -> Tensor:
    """Return the generator's -D(G(z)) (Arjovsky et al., 2017), (B,)."""
    return _each(-fake)


def relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's -ln sigmoid(D(x) - D(G(z))), item k paired with sample k, (B,).

    Huang et al., "The GAN is dead; long live the GAN!", 2024.
    """
    return _each(F.softplus(fake - real))


def relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """Return the generator's -ln sigmoid(D(G(z)) - D(x)), the mirror image of `relativistic`, (B,)."""
    return _each(F.softplus(real - fake))


def r1(logits: Tensor, x: Tensor) -> Tensor:
    """Return ||dD(x)/dx||^2, (B,), differentiable (Mescheder et al., 2018, eq. 9, without gamma / 2); on fakes it is
    R2.

    `logits` come from x (B, ...), which requires grad, by a network that does not mix samples.
    """
    return _gradient(logits, x).square().flatten(1).sum(1)


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """Return (||dD(x)/dx|| - 1)^2 at x = real + u (fake - real), (B,) (Gulrajani et al., 2017, eq. 3, without lambda).

    u (B,) is one uniform per pair; the norm is over all elements of a sample.
    """
    x = torch.lerp(real.detach(), fake.detach().to(real.dtype), u.view(-1, *[1] * (real.ndim - 1))).requires_grad_()
    return (torch.linalg.vector_norm(_gradient(discriminator(x), x).flatten(1), dim=1) - 1).square()


def path_length(images: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """Return ||J^T y|| of images (B, C, H, W) with respect to w (B, layers, D), (B,) (Karras et al., 2020, eq. 4,
    without a).

    The norm is over D, its square averaged over layers. `noise` is y / sqrt(H W), shaped like images, so that the
    length does not grow with the resolution.
    """
    (gradient,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


class Adversarial(Protocol):
    """A pair of losses, one for the discriminator and one for the generator.

    It may also say `paired` (default False): True if the generator's loss needs the logits of real items; and `boundary` (default
    None): the logit at which real and fake are equally likely, None if only differences of logits have a meaning.
    """

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the discriminator's loss of logits of real and fake items, (B,)."""
        ...

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """Return the generator's loss, (B,); `real` may be None unless the losses are `paired`."""
        ...


class NonSaturating:
    """The losses `logistic` and `non_saturating`."""

    paired, boundary = False, 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return logistic(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return non_saturating(fake)


class Hinge:
    """The losses `hinge` and `hinge_generator`."""

    paired, boundary = False, 0.0

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return hinge(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return hinge_generator(fake)


class LeastSquares:
    """The losses `least_squares` and `least_squares_generator`."""

    paired, boundary = False, 0.5

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return least_squares(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return least_squares_generator(fake)


class Wasserstein:
    """The losses `wasserstein` and `wasserstein_generator`; add a gradient penalty."""

    paired, boundary = False, None

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return wasserstein(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return wasserstein_generator(fake)


class Relativistic:
    """The losses `relativistic` and `relativistic_generator`; R3GAN adds R1 and R2 of equal weight."""

    paired, boundary = True, None

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return relativistic(real, fake)

    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        assert real is not None
        return relativistic_generator(real, fake)


def _each(loss: Tensor) -> Tensor:
    """Average logits' losses (B, ...) over the parts of a sample -> (B,)."""
    return loss.reshape(len(loss), -1).mean(1)


def _gradient(logits: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of each sample's logit with respect to the sample, shaped like x, and differentiable."""
    return torch.autograd.grad(logits.sum(), x, create_graph=True)[0]
