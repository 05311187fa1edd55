"""A first stage with an adversarial loss on its reconstructions (Esser et al., "Taming Transformers", 2021, section
3.1)."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, at_least, number
from genai.core.precision import downcast, upcast
from genai.core.protocols import Batch, Losses, batch_losses
from genai.losses.adversarial import Adversarial
from genai.models.vae.autoencoder import Autoencoder
from genai.models.vae.nets import norm_act


class AdversarialAutoencoder(Autoencoder):
    """An autoencoder trained as the generator of a GAN: its fakes are its reconstructions.

    Args:
        discriminator: images (B, *shape) -> logits (B, ...), such as `PatchDiscriminator`.
        loss: a pair of losses, see `genai.losses.adversarial`.
        adversarial_weight: weight of the generator's loss, on top of the adaptive weight (eq. 7).
        start_step: step from which the discriminator is trained and its loss used.
        others: see `Autoencoder`.

    Raises UserError for a weight or a step out of range.
    """

    share_fake = True
    images_per_step: int = 0

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        latent_shape: Sequence[int],
        encoder: nn.Module,
        decoder: nn.Module,
        discriminator: nn.Module,
        loss: Adversarial,
        kl_weight: float = 1e-4,
        power: int = 2,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.5,
        start_step: int = 0,
    ):
        super().__init__(field, shape, latent_shape, encoder, decoder, kl_weight, power, perceptual, perceptual_weight)
        self.discriminator, self.loss = discriminator, loss
        self.adversarial_weight = number(adversarial_weight, "model.adversarial_weight", 0)
        self.start_step = at_least(start_step, 0, "model.start_step")

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {**super().nets(), "discriminator": self.discriminator}

    def generator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters of encoder and decoder with their names in the model."""
        return itertools.chain(self.encoder.named_parameters("encoder"), self.decoder.named_parameters("decoder"))

    def discriminator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the discriminator's parameters with their names in the model."""
        return self.discriminator.named_parameters("discriminator")

    def generate(self, batch: Batch, step: int) -> Batch:
        """Return the reconstructions `fake` (B, *shape), with `mean` and `log_variance` of the latents."""
        return dict(zip(("fake", "mean", "log_variance"), self.encode_decode(batch[self.field]), strict=True))

    def discriminator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return the discriminator's loss of images and reconstructions, 0 before start_step."""
        x, y = batch[self.field], fake["fake"]
        if step < self.start_step:
            return batch_losses(x.new_zeros((), requires_grad=True), {}, len(x))  # no gradient, so no update
        real, false = self.discriminator(x).float(), self.discriminator(y).float()
        logs = {"logit_real": real.mean(), "logit_fake": false.mean()}
        return batch_losses(self.loss.discriminator(real, false).mean(), logs, len(x))

    def generator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return the autoencoder's loss plus the weighted adversarial one (eq. 7).

        The adaptive weight makes the gradients of both at the decoder's last layer equally large.
        """
        x, y = batch[self.field], fake["fake"]
        total, logs = self.terms(x, y, fake["mean"], fake["log_variance"])
        if step < self.start_step or not self.adversarial_weight:
            return batch_losses(total, logs, len(x))
        real = self.discriminator(x).float().detach() if getattr(self.loss, "paired", False) else None
        logs["adversarial_loss"] = self.loss.generator(real, self.discriminator(y).float()).mean()
        if torch.is_grad_enabled():
            logs["adaptive_weight"] = balance(total, logs["adversarial_loss"], last_layer(self.decoder))
            total = total + self.adversarial_weight * logs["adaptive_weight"] * logs["adversarial_loss"]
        return batch_losses(total, logs, len(x))


def balance(loss: Tensor, adversarial: Tensor, layer: Tensor) -> Tensor:
    """Return ||d loss / d layer|| / (||d adversarial / d layer|| + 1e-4), a scalar of at most 1e4, detached."""
    first, second = (upcast(torch.autograd.grad(t, layer, retain_graph=True)[0]).norm() for t in (loss, adversarial))
    # 1e-4 and the bound 1e4 are those of the VQGAN code: the discriminator's gradient may vanish.
    return (first / (second + 1e-4)).clamp_max(1e4).detach()


def last_layer(net: nn.Module) -> nn.Parameter:
    """Return the last weight of a network that is a matrix or a kernel."""
    return [p for p in net.parameters() if p.ndim >= 2][-1]


class PatchDiscriminator(nn.Module):
    """A discriminator of overlapping patches: images (B, *shape) -> logits (B, 1, h, w).

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, section 3.2.2.

    Args:
        shape: (C, H, W), the sides at least 2^layers.
        channels: width of the first maps, doubled with each halving.
        layers: number of halvings.

    Raises UserError if the images are too small.
    """

    def __init__(self, shape: Sequence[int], channels: int = 32, layers: int = 2):
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 2 ** at_least(layers, 1, "model.discriminator.layers"):
            raise UserError(
                f"model.discriminator.layers={layers} halves images as often, and {list(shape)} cannot be: give fewer layers"
            )
        net: list[nn.Module] = [nn.Conv2d(shape[0], channels, 4, 2, 1)]
        for k in range(1, layers):
            net += [norm_act(channels << (k - 1)), nn.Conv2d(channels << (k - 1), channels << k, 4, 2, 1)]
        last = channels << (layers - 1)
        self.net = nn.Sequential(*net, norm_act(last), nn.Conv2d(last, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 1, h, w) of images (B, *shape)."""
        return self.net(downcast(x, self))
