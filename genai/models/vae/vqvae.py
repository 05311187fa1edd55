"""The vector-quantised autoencoder: van den Oord et al., "Neural Discrete Representation Learning", 2017.

With `GumbelSoftmax` as its quantiser it is the discrete VAE of Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, number
from genai.core.precision import upcast
from genai.core.protocols import Batch, Losses, batch_losses
from genai.core.shapes import check_shape
from genai.models.vae.quantize import Quantized, Quantizer, occurrences
from genai.nn.latent_space import Latent


class VQVAE(nn.Module):
    """Encoder, quantiser and decoder; a Codec of token ids.

    Args:
        field, shape: field of the data, and the shape of a sample, or of its latents.
        map_shape: shape of the encoder's output, (D, h, w); it becomes h w token ids per stage of the quantiser.
        encoder: x (B, *shape) -> (B, *map_shape).
        quantizer: quantises the vectors of the map.
        decoder: (B, *map_shape) -> (B, *shape).
        commitment: weight of the quantiser's loss, such as the commitment loss of eq. 3, there 0.25. A codebook follows a
            moving average instead of a loss.
        latent: latent space to work in instead of the field's own, such as log-mel spectrograms of sound.
        perturb: changes the data (B, *shape) in training, such as `genai.nn.perturb.Perturb`; None leaves them.

    Raises UserError if the quantiser's dim is not D, or if the latents have another shape.
    """

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        map_shape: Sequence[int],
        encoder: nn.Module,
        quantizer: Quantizer,
        decoder: nn.Module,
        commitment: float = 0.25,
        latent: Latent | None = None,
        perturb: nn.Module | None = None,
    ):
        super().__init__()
        if latent is not None and latent.shape != tuple(shape):
            raise UserError(f"model.shape={list(shape)}, but the first stage's latents are {list(latent.shape)}")
        self.field, self.coded_shape, self.latent, self.perturb = field, tuple(shape), latent, perturb
        self.shape: tuple[int, ...] = self.coded_shape if latent is None else tuple(latent.codec.shape)  # type: ignore[arg-type]
        self.commitment = number(commitment, "model.commitment", 0)
        if quantizer.dim != map_shape[0]:
            raise UserError(
                f"model.quantizer quantises vectors of {quantizer.dim} numbers, and those of model.map_shape={list(map_shape)} "
                f"have {map_shape[0]}: give both the same"
            )
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.map_shape = tuple(map_shape)
        self.grid = (*map_shape[1:], quantizer.depth)
        self.latent_shape = (math.prod(self.grid),)
        self.vocabulary: int | None = quantizer.codes

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def codec(self) -> nn.Module | None:
        """The frozen first stage whose latents are quantised, or None."""
        return None if self.latent is None else self.latent.codec

    def prepare(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Measure the scale of the latents from training data, see `Preparable`; returns no arguments to store.

        Raises UserError if the data do not fit the first stage.
        """
        if self.latent is not None:
            first = next(stream := iter(batches))
            self.latent.check(first, self.field)
            self.latent.measure(itertools.chain([first], stream))
        return {}

    def quantize(self, x: Tensor, step: int = 0) -> Quantized:
        """Encode and quantise x (B, *coded_shape) in update `step` of a training."""
        return self.quantizer(check_shape(self.encoder(x), self.map_shape, "model.encoder").float(), step)

    def decode_map(self, z: Tensor) -> Tensor:
        """Decode a map (B, *map_shape) -> (B, *coded_shape)."""
        return upcast(check_shape(self.decoder(z), self.coded_shape, "model.decoder"))

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the squared error per element, of data or latents, plus the weighted loss of the quantiser (eq. 3)."""
        if self.perturb is not None:
            batch = {self.field: self.perturb(batch[self.field])}
        x = batch[self.field] if self.latent is None else self.latent.encode(batch)
        quantized = self.quantize(x, step)
        error = (self.decode_map(quantized.z) - x).square().mean()
        logs = {"error": error, self.quantizer.loss: quantized.loss, "perplexity": self.perplexity(quantized.index)}
        return batch_losses(error + self.commitment * quantized.loss, logs, len(x))

    def perplexity(self, index: Tensor) -> Tensor:
        """Return e to the entropy of the codes' frequencies, a scalar: the effective number of codes in use."""
        p = occurrences(index, self.quantizer.codes) / index.numel()
        return torch.special.entr(p).sum().exp()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Map x (B, *shape) to token ids int64 (B, T), row by row of the map."""
        x = x if self.latent is None else self.latent.encode({self.field: x})
        return self.quantize(x).index.flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Map token ids int64 (B, T) to x (B, *shape)."""
        x = self.decode_map(self.quantizer.decode(z.view(-1, *self.grid)))
        return x if self.latent is None else self.latent.decode(x)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return batch[field] (B, *shape), encoded and decoded."""
        return self.decode(self.encode(batch[self.field])).clamp(-1, 1)
