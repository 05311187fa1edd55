"""The vector-quantised autoencoder: van den Oord et al., "Neural Discrete Representation Learning", 2017."""

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
    """Encoder, quantiser, decoder; a Codec of token ids.

    Args:
        field, shape: of the data.
        map_shape: of the encoder's answer, (D, h, w); it becomes h w token ids for each stage of the quantiser.
        encoder: x (B, *shape) -> (B, *map_shape).
        quantizer: between them.
        decoder: (B, *map_shape) -> (B, *shape).
        commitment: weight of the term that keeps the encoder at its codes (eq. 3, there 0.25; the term that would bring
            the codes to the encoder is a moving average here).
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
        return {"encoder": self.encoder, "decoder": self.decoder}

    def quantize(self, x: Tensor) -> Quantized:
        """What the quantiser makes of the encoder's answer to x (B, *shape)."""
        return self.quantizer(check_shape(self.encoder(x), self.map_shape, "model.encoder").float())

    def decode_map(self, z: Tensor) -> Tensor:
        """(B, *map_shape) -> (B, *shape)."""
        return upcast(check_shape(self.decoder(z), self.shape, "model.decoder"))

    def forward(self, batch: Batch, step: int) -> Losses:
        """Squared error of a number, and the commitment (eq. 3)."""
        x = batch[self.field]
        quantized = self.quantize(x)
        error = (self.decode_map(quantized.z) - x).square().mean()
        logs = {"error": error, "commitment": quantized.commitment, "perplexity": self.perplexity(quantized.index)}
        return batch_losses(error + self.commitment * quantized.commitment, logs, len(x))

    def perplexity(self, index: Tensor) -> Tensor:
        """e to the entropy of how often each code is chosen: how many codes these are worth."""
        p = occurrences(index, self.quantizer.codes) / index.numel()
        return torch.special.entr(p).sum().exp()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Token ids int64 (B, T), row by row of the map."""
        return self.quantize(x).index.flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.decode_map(self.quantizer.decode(z.view(-1, *self.grid)))

    def reconstruct(self, batch: Batch) -> Tensor:
        return self.decode(self.encode(batch[self.field])).clamp(-1, 1)
