"""StyleGAN2 (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020). Its networks are in
stylegan2_nets.py."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genai.core import rng
from genai.core.errors import UserError, at_least, number
from genai.core.precision import KeepBufferPrecision
from genai.core.protocols import Batch, Losses, batch_losses
from genai.losses.adversarial import logistic, non_saturating, path_length, r1
from genai.models.gan.ada import ADA
from genai.models.gan.nets import labels
from genai.models.gan.stylegan2_nets import Discriminator, Generator, seeded_noise


class StyleGAN2(KeepBufferPrecision):
    """A style-based generator and a residual discriminator, each regularised only every few steps.

    Args:
        field, shape, classes: field of the data, shape of a sample, and number of labels, None for an unconditional
            model.
        latents: number of latents.
        generator: z -> images and w.
        discriminator: images -> logits.
        gamma: weight of R1 in the paper's gamma / 2 ||grad||^2; 0 for none. It scales with the number of pixels: Karras
            et al. (ADA, 2020) start from 0.0002 H W / batch size (appendix C).
        augment: adaptive augmentation of the discriminator's input, None for none.
        path_weight: weight of path length regularisation, 0 for none.
        mixing: probability of style mixing.
        r1_every_steps, path_every_steps: steps between two uses of each regulariser ("lazy", appendix B), by which it
            is weighted.
        share_fake: use the same fakes for both updates of a round, generated once.

    Raises UserError for an argument out of range.
    """

    lazy: dict[str, int]
    """The interval k, in steps, of each network's regulariser. The paper gives it an optimiser step of its own, and so scales
    Adam's lr and the logarithms of its betas by k / (k + 1); here it shares the step of the loss."""
    images_per_step: int = 0
    """Real images per update over all devices, in which the model measures its own schedules, see `AdversarialModel`."""
    path_mean: Tensor

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        classes: int | None,
        latents: int,
        generator: Generator,
        discriminator: Discriminator,
        gamma: float,
        augment: ADA | None = None,
        path_weight: float = 2.0,
        mixing: float = 0.9,
        r1_every_steps: int = 16,
        path_every_steps: int = 4,
        share_fake: bool = True,
    ):
        super().__init__()
        if augment is not None and not isinstance(augment, nn.Module):
            raise UserError(
                f"model.augment={augment} must be null or a node of ADA, see conf/experiment/stylegan2_cifar10.yaml"
            )
        self.field, self.shape, self.classes, self.latents = field, tuple(shape), classes, latents
        self.generator, self.discriminator, self.augment = generator, discriminator, augment
        self.gamma, self.path_weight = number(gamma, "model.gamma", 0), number(path_weight, "model.path_weight", 0)
        self.mixing, self.share_fake = number(mixing, "model.mixing", 0, 1), share_fake
        self.lazy = {
            "generator": at_least(path_every_steps, 1, "model.path_every_steps"),
            "discriminator": at_least(r1_every_steps, 1, "model.r1_every_steps"),
        }
        self.register_buffer("path_mean", torch.zeros(()))

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks to compile, the generator's parts separately: samplers call those."""
        parts = {"mapping": self.generator.mapping, "synthesis": self.generator.synthesis}
        return {**parts, "discriminator": self.discriminator}

    def prepare(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Measure nothing, see `Preparable`. Raises UserError if a batch does not divide into the discriminator's
        groups."""
        batch = next(iter(batches))
        with torch.no_grad():
            self.discriminate(batch[self.field], self.label(batch))
        return {}

    def generator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the generator's parameters with their names in the model."""
        return self.generator.named_parameters("generator")

    def discriminator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the discriminator's parameters with their names in the model."""
        return self.discriminator.named_parameters("discriminator")

    def generate(self, batch: Batch, step: int) -> Batch:
        """Generate `fake` (B, *shape) and their `w` (B, L, style), with the labels of the batch."""
        fake, w = self.draw(len(batch[self.field]), self.label(batch))
        if self.training:
            self.generator.mapping.track(w[:, 0])
        return {"fake": fake, "w": w}

    def draw(self, n: int, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draw n images and their w, some with the style of a second z from a random layer on (style mixing)."""
        layers, like = self.generator.layers, self.path_mean
        z, second = torch.randn(2, n, self.latents, device=like.device, dtype=like.dtype)
        cut = torch.randint(1, layers, (n,), device=like.device)
        mixed = torch.rand(n, device=like.device) < self.mixing
        return self.generator(z, label, second, cut.where(mixed, layers))

    def discriminate(self, x: Tensor, label: Tensor | None) -> Tensor:
        """Return logits (B,) of images (B, *shape), augmented if augmentation is on."""
        return self.discriminator(x if self.augment is None else self.augment(x), label).to(self.path_mean)

    def label(self, batch: Batch | None) -> Tensor | None:
        """Return the labels int64 (B,) on the networks' device, None for an unconditional model."""
        return labels(batch, self.classes, self.path_mean.device)

    def discriminator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return softplus(-D(x)) + softplus(D(G(z))), every r1_every_steps with R1 at the unaugmented images."""
        x, label = batch[self.field], self.label(batch)
        penalty = None
        if self.gamma and step % self.lazy["discriminator"] == 0 and torch.is_grad_enabled():
            with torch.compiler.set_stance("force_eager"):  # compiled graphs cannot be differentiated twice
                x = x.detach().requires_grad_()
                real = self.discriminate(x, label)
                penalty = r1(real, x)
        else:
            real = self.discriminate(x, label)
        false = self.discriminate(fake["fake"].detach(), label)
        if self.augment is not None and self.training:
            self.augment.update(real, step)
        loss = logistic(real, false).mean()
        logs = {
            "d_loss": loss,
            "logit_real": real.mean(),
            "logit_fake": false.mean(),
            "r_t": real.sign().mean(),
            "fake_sign": false.sign().mean(),
        }
        if self.augment is not None:
            logs["ada_p"] = self.augment.p.clone()  # p is updated in place
        total = loss if penalty is None else loss + self.lazy["discriminator"] * self.gamma / 2 * penalty.mean()
        return with_logs(total, len(x), logs, {"r1": penalty})

    def generator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return softplus(-D(G(z))), every path_every_steps with the path length penalty on half a batch (appendix
        B)."""
        label = self.label(batch)
        logits = self.discriminate(fake["fake"], label)
        loss = non_saturating(logits).mean()
        total, lengths = loss, None
        if self.path_weight and step % self.lazy["generator"] == 0 and torch.is_grad_enabled():
            n = max(len(logits) // 2, 1)
            with torch.compiler.set_stance("force_eager"):
                lengths, penalty = self.path_penalty(*self.draw(n, None if label is None else label[:n]))
            total = loss + self.lazy["generator"] * self.path_weight * penalty.mean()
        return with_logs(total, len(logits), {"g_loss": loss}, {"path_length": lengths})

    def path_penalty(self, images: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return path lengths (B,) and their squared distance from the running mean (eq. 4)."""
        noise = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
        lengths = path_length(images, w, noise).to(self.path_mean)
        mean = self.path_mean.lerp(lengths.mean(), 0.01)
        if self.training:
            self.path_mean.copy_(mean.detach())
        return lengths, (lengths - mean).square()

    # Sampling: the protocol genai.nn.latents.LatentGenerator

    def latent(self, seeds: Tensor, label: Tensor | None = None, truncation: float | None = None) -> Tensor:
        """Map z by seed to w of each layer, (B, L, style); truncation 1 leaves w, 0 returns the mean w for every seed.

        Raises UserError for a missing label, and for a truncation outside [0, 1].
        """
        if self.classes is not None and label is None:
            raise UserError(f"this model is conditional: label= must name one of its {self.classes} classes")
        psi = 1.0 if truncation is None else number(truncation, "sampler.truncation", 0, 1)
        with torch.no_grad():
            z = rng.normal(seeds.to(self.path_mean.device), (self.latents,), stream=rng.INITIAL)
            w = self.generator.mapping.truncate(self.generator.mapping(z, label), psi)
        return w[:, None].expand(-1, self.generator.layers, -1)

    def decode(self, latent: Tensor, label: Tensor | None, seeds: Tensor) -> Tensor:
        """Generate images (B, *shape) in [-1, 1] from w (B, L, style), with each seed's noise."""
        with torch.no_grad():
            return self.generator.synthesis(latent, seeded_noise(seeds.to(latent.device))).clamp(-1, 1)

    def interpolate_latents(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Interpolate linearly from a to b (B, L, style), share (B,)."""
        return torch.lerp(a, b, share[:, None, None])


def with_logs(total: Tensor, n: int, means: Mapping[str, Tensor], lazy_terms: Mapping[str, Tensor | None]) -> Losses:
    """Return Losses whose logs are means of every step, and of regularised steps only; the latter weigh 0 in
    between."""
    losses = batch_losses(total, means, n)
    nothing = total.detach() * 0, 0.0
    sometimes = {
        name: nothing if value is None else (value.detach().mean(), float(len(value)))
        for name, value in lazy_terms.items()
    }
    return losses._replace(logs={**losses.logs, **sometimes})
