"""Log-mel spectrograms of waveforms."""

import math

import torch
from torch import Tensor

from genai.core import extras
from genai.core.precision import KeepBufferPrecision

FLOOR = 1e-7  # of the power, 70 dB below a sine of amplitude 1; at 50 dB quiet recordings would be nothing but floor
LOW = math.log(FLOOR)


class LogMel(KeepBufferPrecision):
    """Map waveforms (B, C, T) in [-1, 1] to log-mel spectrograms (B, C, mels, 1 + T // hop), about in [-1, 1].

    ln of the power in each of `mels` triangular bands (HTK mel scale), floored at 1e-7, where a sine of amplitude 1 has about 1;
    then scaled from [ln 1e-7, 0] to [-1, 1].

    Args:
        sr_hz: sampling rate.
        mels: number of bands between 0 and sr_hz / 2.
        window, hop: samples of an STFT frame, and between two frames; None takes 32 ms, a power of two of samples, and half
            of it.

    Raises UserError if torchaudio is not installed.
    """

    bank: Tensor
    hann: Tensor

    def __init__(self, sr_hz: int, mels: int = 40, window: int | None = None, hop: int | None = None):
        super().__init__()
        functional = extras.load("torchaudio.functional", "audio", "a mel spectrogram")
        self.sr_hz, self.mels = sr_hz, mels
        self.window = window or 2 ** max(round(sr_hz * 0.032) - 1, 1).bit_length()
        self.hop = hop or self.window // 2
        bank = functional.melscale_fbanks(self.window // 2 + 1, 0.0, sr_hz / 2, mels, sr_hz)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the spectrograms (B, C, mels, 1 + T // hop) of waveforms (B, C, T)."""
        power = stft_power(waveform, self.hann, self.hop)
        mel = (power.transpose(-1, -2) @ self.bank).transpose(-1, -2)
        return mel.clamp_min(FLOOR).log() * (-2 / LOW) + 1

    def power(self, z: Tensor) -> Tensor:
        """Invert the logarithm: log-mel spectrograms (...) -> powers (...) of at least 0; that of the floor is 0."""
        return (((z - 1) * (LOW / -2)).exp() - FLOOR * (1 + 1e-5)).clamp_min(0)  # what rounding leaves is silent too

    def bins(self, mel: Tensor, iterations: int = 30) -> Tensor:
        """Return powers (B, window // 2 + 1, frames) of STFT bins of at least 0 whose bands fit the powers mel (B, mels, frames).

        Starts from the least-squares solution of smallest norm; each update (Lee and Seung 2001, eq. 4) lowers the squared error.
        """
        mel, bank = mel.mT, self.bank
        found = (mel @ torch.linalg.pinv(bank)).clamp_min(0)  # (B, frames, bins)
        target = mel @ bank.T
        for _ in range(iterations):
            found = found * target / ((found @ bank) @ bank.T).clamp_min(1e-12)
        return found.mT


def stft_power(x: Tensor, hann: Tensor, hop: int) -> Tensor:
    """Return the power of the STFT frames of waveforms (B, C, T): (B, C, window // 2 + 1, 1 + T // hop).

    It is normalised so that a sine of amplitude 1 has power 1 in its bin. Waveforms are padded by zeros at both ends.
    """
    found = torch.stft(
        x.flatten(0, 1).float(),
        len(hann),
        hop,
        window=hann,
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    return (found.abs() * (2 / hann.sum())).square().unflatten(0, x.shape[:2])
