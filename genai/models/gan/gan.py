"""Generative adversarial networks (Goodfellow et al., 2014) and their usual variants: losses, penalties, and sampling.

`genai.train.lit_adversarial` alternates the updates of discriminator and generator.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from genai.core import rng
from genai.core.errors import UserError, at_least, number
from genai.core.precision import upcast
from genai.core.protocols import Batch, Losses, batch_losses
from genai.core.shapes import check_shape
from genai.losses import adversarial
from genai.losses.adversarial import Adversarial
from genai.models.gan.nets import labels

STANDING_SEED = 11  # mixed into the seeds of the latents of standing statistics


class GAN(nn.Module):
    """A generator from normal latents to items of one field, and a discriminator of real and generated items.

    Args:
        field, shape: field of the data, and the shape of a sample.
        latents: number of latents.
        generator: `generator(z, label) -> x`, z (B, latents), label int64 (B,) or None, x (B, *shape).
        discriminator: `discriminator(x, label) -> logits`, (B,), or several for each sample.
        loss: a pair of losses, see `genai.losses.adversarial`.
        classes: number of labels, None for an unconditional model.
        r1: gamma of the penalty gamma / 2 ||grad||^2 at real items (Mescheder et al., 2018, eq. 9).
        r2: the same at fakes (eq. 10).
        gradient_penalty: lambda of WGAN-GP (Gulrajani et al., 2017, eq. 3; 10 in the paper).
        share_fake: use the same fakes for both updates of a round, generated once.

    Raises UserError for an argument out of range, and for a penalty on a discriminator with batch norm, which mixes
    samples, so that a sample has no gradient of its own.
    """

    images_per_step: int = 0
    """Real images of one step, all ranks together; the loop sets it."""

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        latents: int,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: Adversarial,
        classes: int | None = None,
        r1: float = 0.0,
        r2: float = 0.0,
        gradient_penalty: float = 0.0,
        share_fake: bool = True,
    ):
        super().__init__()
        self.field, self.shape, self.classes = field, tuple(shape), classes
        self.latents = at_least(latents, 1, "model.latents")
        self.generator, self.discriminator, self.loss, self.share_fake = generator, discriminator, loss, share_fake
        self.r1, self.r2 = number(r1, "model.r1", 0), number(r2, "model.r2", 0)
        self.gradient_penalty = number(gradient_penalty, "model.gradient_penalty", 0)
        # The standing statistics that were measured last, after the key of what they were measured for.
        self._standing: tuple[object, Any] = (None, None)
        if self.penalises and batch_norms(discriminator):
            raise UserError(
                "model.r1, model.r2 and model.gradient_penalty are on the gradient of each sample, but batch norm in "
                "model.discriminator mixes samples: set them to 0, or choose another model.discriminator.norm"
            )

    @property
    def penalises(self) -> bool:
        """True if the discriminator's loss has a penalty on gradients."""
        return self.r1 > 0 or self.r2 > 0 or self.gradient_penalty > 0

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks to compile; with a penalty without the discriminator: compiled graphs cannot be
        differentiated twice."""
        return {"generator": self.generator, **({} if self.penalises else {"discriminator": self.discriminator})}

    def generator_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the generator's parameters with their names in the model."""
        return [(name, p) for name, p in self.named_parameters() if name.startswith("generator.")]

    def discriminator_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the discriminator's parameters with their names in the model."""
        return [(name, p) for name, p in self.named_parameters() if name.startswith("discriminator.")]

    def label(self, batch: Batch | None) -> Tensor | None:
        """Return the labels int64 (B,) on the networks' device, None for an unconditional model."""
        return labels(batch, self.classes, self.device)

    # Training

    def generate(self, batch: Batch, step: int) -> Batch:
        """Generate `fake` (B, *shape), one for each item of the batch, with its label."""
        x = batch[self.field]
        fake = self.generator(torch.randn(len(x), self.latents, device=x.device), self.label(batch))
        return {"fake": upcast(check_shape(fake, self.shape, "model.generator"))}

    def discriminator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return the discriminator's loss of one pass over real items and one over fakes, which the penalties share.

        Without gradients, as in evaluation, there are no penalties.
        """
        label, penalties = self.label(batch), torch.is_grad_enabled()
        x = batch[self.field].detach().requires_grad_(penalties and self.r1 > 0)
        y = fake["fake"].detach().requires_grad_(penalties and self.r2 > 0)
        real, false = self.discriminator(x, label).float(), self.discriminator(y, label).float()
        total, logs = self.loss.discriminator(real, false).mean(), self.logit_means(real.detach(), false.detach())
        if x.requires_grad:
            logs["r1"] = adversarial.r1(real, x).mean()
            total = total + self.r1 / 2 * logs["r1"]
        if y.requires_grad:
            logs["r2"] = adversarial.r1(false, y).mean()
            total = total + self.r2 / 2 * logs["r2"]
        if penalties and self.gradient_penalty:
            u = torch.rand(len(x), device=x.device)
            between = adversarial.gradient_penalty(lambda mixed: self.discriminator(mixed, label), x, y, u)
            logs["gradient_penalty"] = between.mean()
            total = total + self.gradient_penalty * logs["gradient_penalty"]
        return batch_losses(total, logs, len(x))

    def generator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return the generator's loss on fakes; the logits of real items are computed only if the loss needs them."""
        label, real = self.label(batch), None
        if getattr(self.loss, "paired", False):
            with torch.no_grad():
                real = self.discriminator(batch[self.field], label).float()
        false = self.discriminator(fake["fake"], label).float()
        return batch_losses(self.loss.generator(real, false).mean(), {}, len(false))

    def logit_means(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Return the mean logits, and the discriminator's accuracy on real and fake items.

        If only differences of logits have a meaning, the accuracy is that of pairs.
        """
        logs = {"logit_real": real.mean(), "logit_fake": fake.mean()}
        boundary = getattr(self.loss, "boundary", None)
        if boundary is None:
            return {**logs, "accuracy": (real > fake).float().mean()}
        right = {"accuracy_real": real > boundary, "accuracy_fake": fake < boundary}
        return {**logs, **{name: ok.float().mean() for name, ok in right.items()}}

    # Sampling: the protocol genai.nn.latents.LatentGenerator

    def latent(self, seeds: Tensor, label: Tensor | None, truncation: float | None = None) -> Tensor:
        """Draw z (B, latents) from a standard normal, by seed; with truncation limited to |z| <= truncation.

        Brock et al., 2019, section 3.1. Raises UserError for a truncation that is not positive.
        """
        z = rng.normal(seeds.to(self.device), (self.latents,), stream=rng.INITIAL)
        return (
            z if truncation is None else truncate_normal(z, number(truncation, "sampler.truncation", 0, open_low=True))
        )

    def decode(self, latent: Tensor, label: Tensor | None, seeds: Tensor) -> Tensor:
        """Generate images (B, *shape) from latents; the seeds are for generators that add noise of their own."""
        with torch.no_grad():
            return upcast(check_shape(self.generator(latent, label), self.shape, "model.generator"))

    def interpolate_latents(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Interpolate latents (B, latents) along the great circle from a to b, share (B,) in [0, 1]."""
        return slerp(a, b, share[:, None])

    @contextlib.contextmanager
    def use_standing_statistics(
        self, batches: int, truncation: float | None = None, batch_size: int = 64
    ) -> Iterator[None]:
        """Return a context in which the generator's batch norms use `standing_statistics` of some batches of latents.

        The latents are always the same, with labels in turn. The statistics are measured once and kept until the
        weights change; afterwards those of training are restored. Raises UserError if the generator has no batch norm.
        """
        at_least(batches, 1, "sampler.standing_batches")
        if not batch_norms(self.generator):
            raise UserError("sampler.standing_batches: this generator has no batch norm, set it to 0")
        norms, what = batch_norms(self.generator), (batches, truncation, batch_size, self.device, self._versions())
        trained = [dict(norm._buffers) for norm in norms]
        cached = self._standing[1] if self._standing[0] == what else None
        try:
            for k, norm in enumerate(norms):
                norm._buffers.update(
                    cached[k] if cached else {name: t.clone() for name, t in trained[k].items() if t is not None}
                )
            if cached is None:
                standing_statistics(self.generator, self._inputs(batches, truncation, batch_size))
                self._standing = what, [dict(norm._buffers) for norm in norms]
            yield
        finally:
            for norm, buffers in zip(norms, trained, strict=True):
                norm._buffers.update(buffers)

    def _inputs(
        self, batches: int, truncation: float | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the latents and labels of so many batches."""
        for k in range(batches):
            seeds = rng.seed_range(rng.mix(STANDING_SEED, k), batch_size)
            index = torch.arange(k * batch_size, (k + 1) * batch_size, device=self.device)
            label = None if self.classes is None else index % self.classes
            yield self.latent(seeds, label, truncation), label

    def _versions(self) -> list[int]:
        """Return how often each tensor of the generator has been written to, which tells if the statistics are still
        valid."""
        return [t._version for t in (*self.generator.parameters(), *self.generator.buffers())]

    @property
    def device(self) -> torch.device:
        """The device of the generator's weights."""
        return next(self.generator.parameters()).device


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    """Return all batch norms of a network."""
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


@torch.no_grad()
def standing_statistics(generator: nn.Module, inputs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Set every batch norm to the mean over batches (z, label) of their means and variances (Brock et al., 2019).

    An averaged generator needs this: its buffers are those of the live one. Only the batch norms are in training mode
    meanwhile.
    """
    norms = batch_norms(generator)
    before = [(norm.training, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # a cumulative mean
        for z, label in inputs:
            generator(z, label)
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.train(training)
            norm.momentum = momentum


def truncate_normal(z: Tensor, threshold: float) -> Tensor:
    """Map standard normals z to normals truncated to |z| <= threshold, by Phi^-1 of the rescaled Phi(z), written with
    erf.

    The result has the distribution that resampling until |z| <= threshold gives, but is a smooth function of z, so that
    a seed keeps its picture at any threshold.
    """
    root = math.sqrt(2)
    z64 = torch.erfinv(torch.erf(z.double() / root) * math.erf(threshold / root)) * root
    return z64.clamp(-threshold, threshold).to(z.dtype)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Interpolate spherically from a to b (..., D) (Shoemake, 1985); share (..., 1) or a number in [0, 1].

    Parallel vectors are interpolated linearly.
    """
    cosine = torch.cosine_similarity(a, b, dim=-1)[..., None].clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    # Slerp divides by the sine of the angle: for nearly parallel latents a straight line takes its place.
    arc = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / sine.clamp_min(1e-6)
    return torch.where(sine > 1e-3, arc, a + share * (b - a))
