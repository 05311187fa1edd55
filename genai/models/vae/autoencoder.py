"""The autoencoder that is the first stage of latent diffusion (Rombach et al., 2022, section 3.1)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, number
from genai.core.precision import full_precision, upcast
from genai.core.protocols import Batch, Losses, batch_losses
from genai.core.shapes import check_shape
from genai.models.vae.vae import gaussian_kl


class Autoencoder(nn.Module):
    """An autoencoder trained to reconstruct, with a KL term just large enough to keep its latents near the unit normal.

    It is a Codec whose code is the mean of the latents. It has no likelihood: its decoder is not a distribution.

    Args:
        field, shape: field of the data, and the shape of a sample.
        latent_shape: shape of the latents, (C, h, w) or (D,).
        encoder: x (B, *shape) -> (B, 2 latent_shape[0], ...), means and log variances.
        decoder: latents (B, *latent_shape) -> (B, *shape).
        kl_weight: weight of the KL, in nats per element of x.
        power: p of the reconstruction loss |x - y|^p: 2 for the smallest squared error, 1 for sharper edges.
        perceptual: perceptual distance `perceptual(x, y) -> (B,)`, or None.
        perceptual_weight: weight of its mean.

    Raises UserError for a power or a weight out of range.
    """

    vocabulary: int | None = None

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        latent_shape: Sequence[int],
        encoder: nn.Module,
        decoder: nn.Module,
        kl_weight: float = 1e-4,
        power: int = 2,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.1,
    ):
        super().__init__()
        if power not in (1, 2):
            raise UserError(f"model.power={power} is neither 1 nor 2")
        self.field, self.shape, self.latent_shape = field, tuple(shape), tuple(latent_shape)
        self.encoder, self.decoder, self.perceptual, self.power = encoder, decoder, perceptual, power
        self.kl_weight = number(kl_weight, "model.kl_weight", 0)
        self.perceptual_weight = number(perceptual_weight, "model.perceptual_weight", 0)

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances (B, *latent_shape) of the latents of x (B, *shape)."""
        channels, *rest = self.latent_shape
        both = check_shape(self.encoder(x), (2 * channels, *rest), "model.encoder")
        mean, log_variance = both.float().chunk(2, 1)
        return mean, log_variance.clamp(-14, 14)  # its exponential stays finite, also in half precision

    def encode_decode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct x (B, *shape) from one draw of its latents; returns it with their means and log variances."""
        mean, log_variance = self.posterior(x)
        y = self.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
        return upcast(check_shape(y, self.shape, "model.decoder")), mean, log_variance

    def terms(self, x: Tensor, y: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of reconstructing x (B, *shape) as y, a scalar, and its terms."""
        kl = gaussian_kl(mean, log_variance).flatten(1).sum(1).mean()
        error = (y - x).abs().pow(self.power).mean()
        logs, total = {"error": error, "kl": kl}, error + self.kl_weight * kl / math.prod(self.shape)
        if self.perceptual is not None:
            with full_precision(
                x.device
            ):  # as for every frozen network, so that the distance is the same in any precision
                logs["perceptual"] = self.perceptual(x, y).mean()
            total = total + self.perceptual_weight * logs["perceptual"]
        return total, logs

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the loss of a batch."""
        x = batch[self.field]
        return batch_losses(*self.terms(x, *self.encode_decode(x)), len(x))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Map x (B, *shape) to its mean latents (B, *latent_shape)."""
        return self.posterior(x)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Map latents (B, *latent_shape) to x (B, *shape) in [-1, 1]."""
        return upcast(check_shape(self.decoder(z), self.shape, "model.decoder")).clamp(-1, 1)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return batch[field] (B, *shape), encoded and decoded."""
        return self.decode(self.encode(batch[self.field]))
