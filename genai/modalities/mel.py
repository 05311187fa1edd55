"""Log-mel spectrograms as conditions: a recording whose spectrogram a clip follows."""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from genai.core.errors import at_least
from genai.core.protocols import Batch
from genai.modalities.audio import Audio
from genai.modalities.base import Modality, Request, read_each
from genai.nn.mel import LogMel


class Mel(Modality):
    """A log-mel spectrogram (B, mels, frames), frame k of the samples around k * hop.

    Args:
        sr_hz: sampling rate.
        mels: number of bands.
        hop: samples between two frames.
    """

    field, keys, meaning, comparison = "mel", ("mel",), "spectrogram", None

    def __init__(self, sr_hz: int, mels: int, hop: int):
        super().__init__()
        self.audio = Audio(sr_hz)
        self.mels = at_least(mels, 1, "data.mels", most=4096)
        self.hop = at_least(hop, 1, "data.hop", most=10**6)
        self.log_mel = LogMel(sr_hz, mels, hop=hop)

    def state(self) -> dict[str, Any]:
        return {"sr_hz": self.audio.sr_hz, "mels": self.mels, "hop": self.hop}

    def condition(self, request: Request, n: int) -> Batch:
        """Return `mel` (n, mels, frames) of the sound files asked for, cyclically, the shorter followed by silence.

        Nothing without a request. Raises UserError for a file that cannot be read, or has another sampling rate.
        """
        if request.get("mel") is None:
            return {}
        waves = read_each(request["mel"], n, "mel", lambda path: self.audio.read_one(path, "mel"))
        return {"mel": self.encode(pad_sequence([wave[0] for wave in waves], batch_first=True)[:, None])}

    def encode(self, x: Tensor) -> Tensor:
        """Return the spectrograms (B, mels, frames) of waveforms (B, 1, T); the last frame is after the end, and so silent.

        A model that holds it from there on therefore sees the same whatever silence a waveform was padded with.
        """
        length = -(-(x.shape[-1] + self.log_mel.window // 2) // self.hop) * self.hop
        return self.log_mel(pad(x, (0, length - x.shape[-1])))[:, 0]
