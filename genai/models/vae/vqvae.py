"""The vector-quantised autoencoder: van den Oord et al., "Neural Discrete Representation Learning", 2017.

With `GumbelSoftmax` as its quantiser it is the discrete VAE of Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, number
from genai.core.precision import upcast
from genai.core.protocols import Batch, Losses, batch_losses
from genai.core.shapes import check_shape
from genai.models.vae.quantize import Quantized, Quantizer, occurrences


class VQVAE(nn.Module):
    """Encoder, quantiser and decoder; a Codec of token ids.

    Args:
        field, shape: field of the data, and the shape of a sample.
        map_shape: shape of the encoder's output, (D, h, w); it becomes h w token ids per stage of the quantiser.
        encoder: x (B, *shape) -> (B, *map_shape).
        quantizer: quantises the vectors of the map.
        decoder: (B, *map_shape) -> (B, *shape).
        commitment: weight of the quantiser's loss, such as the commitment loss of eq. 3, there 0.25. A codebook follows a
            moving average instead of a loss.

    Raises UserError if the quantiser's dim is not D.
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
    ):
        super().__init__()
        self.field, self.shape, self.commitment = field, tuple(shape), number(commitment, "model.commitment", 0)
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

    def quantize(self, x: Tensor, step: int = 0) -> Quantized:
        """Encode and quantise x (B, *shape) in update `step` of a training."""
        return self.quantizer(check_shape(self.encoder(x), self.map_shape, "model.encoder").float(), step)

    def decode_map(self, z: Tensor) -> Tensor:
        """Decode a map (B, *map_shape) -> (B, *shape)."""
        return upcast(check_shape(self.decoder(z), self.shape, "model.decoder"))

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the squared error per element plus the weighted loss of the quantiser (eq. 3)."""
        x = batch[self.field]
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
        return self.quantize(x).index.flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Map token ids int64 (B, T) to x (B, *shape)."""
        return self.decode_map(self.quantizer.decode(z.view(-1, *self.grid)))

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return batch[field] (B, *shape), encoded and decoded."""
        return self.decode(self.encode(batch[self.field])).clamp(-1, 1)
