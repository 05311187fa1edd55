"""Sound as the levels of a coarse log-mel spectrogram: token ids without training."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.nn.grey_levels import from_levels, to_levels
from genai.nn.vocoder import MULTIPLE, LogMelCodec


class MelLevels(nn.Module):
    """A first stage without training: a coarse log-mel spectrogram's levels are token ids, frame by frame.

    It is the counterpart of `GreyLevels` for sound, and a baseline for what learned codes gain.

    Args:
        field, shape: field of the waveforms, and their shape (1, T).
        sr_hz: sampling rate.
        mels: number of bands.
        factor: a divisor of 8; the frames of `LogMelCodec` are averaged in groups of so many.
        levels: number of levels, the least of which is silence.

    Raises UserError for other data, and for a factor that does not divide 8.
    """

    def __init__(self, field: str, shape: Sequence[int], sr_hz: int, mels: int = 12, factor: int = 4, levels: int = 16):
        super().__init__()
        if factor < 1 or MULTIPLE % factor:
            raise UserError(f"codec.model.factor={factor} must divide {MULTIPLE}, of which the frames are a multiple")
        self.mel = LogMelCodec(field, shape, sr_hz, mels)
        self.field, self.shape, self.vocabulary, self.factor = field, tuple(shape), levels, factor
        self.small = (mels, 1, self.mel.frames // factor)
        self.latent_shape = (math.prod(self.small),)

    def encode(self, x: Tensor) -> Tensor:
        """Map waveforms x (B, 1, T) to token ids int64 (B, mels frames / factor), the bands of a frame together."""
        z = nn.functional.avg_pool2d(self.mel.encode(x), (1, self.factor))
        return to_levels(z.movedim(2, 1), self.vocabulary)

    def decode(self, z: Tensor) -> Tensor:
        """Map token ids int64 (B, mels frames / factor) to waveforms (B, 1, T) in [-1, 1]."""
        bands = from_levels(z, self.small, self.vocabulary).movedim(1, 2)
        return self.mel.decode(bands.repeat_interleave(self.factor, 3))

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the field, encoded and decoded."""
        return self.decode(self.encode(batch[self.field]))
