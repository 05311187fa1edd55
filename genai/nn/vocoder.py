"""Log-mel spectrograms as the latents of sound, and their way back without a trained network."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from genai.core import extras
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.nn.mel import LogMel

MULTIPLE = 8  # of which the number of frames is one, so that networks can halve it


class LogMelCodec(nn.Module):
    """A first stage without training: sound of one channel as log-mel spectrograms, and back by Griffin-Lim.

    The power in each bin of the STFT is found by multiplicative updates that fit the bands (Lee and Seung 2001, eq. 4), its
    phases by fast Griffin-Lim from phase 0 (Griffin and Lim 1984; Perraudin et al. 2013), so that decoding is deterministic. The
    floor of `LogMel` is subtracted first: what is at the floor is silent.

    Args:
        field, shape: field of the waveforms, and their shape (1, T).
        sr_hz, mels, window, hop: see `LogMel`.
        layout: map: latents (1, mels, frames) as images are, for networks that convolve over frequency too; sequence: (mels,
            frames), the bands as channels, each of which a latent model then standardises by itself.
        iterations: of Griffin-Lim; 0 leaves all phases 0.

    The frames cover the waveform and more, up to a multiple of 8. Raises UserError for other data, or another layout.
    """

    vocabulary: int | None = None

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        sr_hz: int,
        mels: int = 40,
        window: int | None = None,
        hop: int | None = None,
        layout: Literal["map", "sequence"] = "map",
        iterations: int = 32,
    ):
        super().__init__()
        if len(shape) != 2 or shape[0] != 1:
            raise UserError(
                f"codec.model=LogMelCodec takes sound of one channel [1, T], got {list(shape)}: choose another data="
            )
        if layout not in ("map", "sequence"):
            raise UserError(f"codec.model.layout={layout} must be map or sequence")
        self.field, self.shape, self.layout = field, tuple(shape), layout
        self.log_mel = LogMel(sr_hz, mels, window, hop)
        self.iterations = at_least(iterations, 0, "codec.model.iterations")
        self.frames = -(-(1 + -(-shape[1] // self.log_mel.hop)) // MULTIPLE) * MULTIPLE
        self.latent_shape = (1, mels, self.frames) if layout == "map" else (mels, self.frames)

    @property
    def padded(self) -> int:
        """Samples that the frames cover."""
        return (self.frames - 1) * self.log_mel.hop

    def encode(self, x: Tensor) -> Tensor:
        """Map waveforms x (B, 1, T) to (B, 1, mels, frames) or (B, mels, frames), in about [-1, 1]."""
        z = self.log_mel(nn.functional.pad(x, (0, self.padded - x.shape[-1])))
        return z if self.layout == "map" else z[:, 0]

    def decode(self, z: Tensor) -> Tensor:
        """Map latents to waveforms (B, 1, T) in [-1, 1]."""
        functional = extras.load("torchaudio.functional", "audio", "Griffin-Lim")
        part, hann = self.log_mel, self.log_mel.hann
        power = part.bins(part.power(z if self.layout == "sequence" else z[:, 0]))
        magnitude = power.sqrt() * (hann.sum() / 2)
        length, momentum = self.padded, 0.99
        x = functional.griffinlim(
            magnitude, hann, part.window, part.hop, part.window, 1.0, self.iterations, momentum, length, False
        )
        return x[:, None, : self.shape[1]].clamp(-1, 1)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return batch[field] (B, 1, T) as Griffin-Lim makes it from its log-mel spectrogram."""
        return self.decode(self.encode(batch[self.field]))

    def downsample_mask(self, mask: Tensor) -> Tensor:
        """Map a mask of samples (B, 1, T) to one of latents (B, *latent_shape).

        A frame is kept as much as the least kept sample in its window. Samples past the end are as the last one.
        """
        part = self.log_mel
        ends = part.window // 2, self.padded + part.window // 2 - mask.shape[-1]
        lost = nn.functional.max_pool1d(nn.functional.pad(1 - mask, ends, mode="replicate"), part.window, part.hop)
        kept = 1 - lost  # (B, 1, frames)
        return (kept if self.layout == "sequence" else kept[:, None]).expand(-1, *self.latent_shape)
