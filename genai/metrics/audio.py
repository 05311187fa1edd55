"""Distances of two recordings of the same sound, one value for each pair."""

import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.shapes import mean_flat

WINDOWS = 2048, 1024, 512, 256, 128, 64
QUIET = 1e-5  # amplitude of a bin below which its logarithm is not compared


def stft_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute the multi-resolution STFT distance of waveforms x, y (B, C, T), (B,) (Engel et al. 2020, section 4.2.1, as a mean).

    The mean over windows of 64 to 2048 samples, as far as T has them, overlapping by three quarters, of the mean absolute
    difference of magnitudes plus that of their logarithms, normalised so that a sine of amplitude 1 has magnitude 1. Raises
    UserError for different shapes or waveforms of fewer than 64 samples.
    """
    _check_shapes(x, y)
    windows = [window for window in WINDOWS if window <= x.shape[-1]]
    if not windows:
        raise UserError(f"waveforms of {x.shape[-1]} samples must have at least {WINDOWS[-1]} for an STFT distance")
    found = [_difference(_magnitude(x, window), _magnitude(y, window)) for window in windows]
    return torch.stack(found).mean(0)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    logs = x.clamp_min(QUIET).log() - y.clamp_min(QUIET).log()
    return mean_flat((x - y).abs()) + mean_flat(logs.abs())


def _magnitude(x: Tensor, window: int) -> Tensor:
    """Return STFT magnitudes (B, bins, frames of all channels)."""
    hann = torch.hann_window(window, dtype=torch.float32, device=x.device)
    found = torch.stft(
        x.flatten(0, 1).float(),
        window,
        window // 4,
        window=hann,
        pad_mode="constant",
        return_complex=True,
    )
    return (found.abs() * (2 / hann.sum())).unflatten(0, x.shape[:2]).flatten(1, 2)


def si_sdr(x: Tensor, y: Tensor) -> Tensor:
    """Compute the scale-invariant signal-to-distortion ratio of x to the reference y, both (B, C, T), in dB, (B,).

    Le Roux et al. 2019, eq. 5, by torchmetrics, the mean over channels. Raises UserError for different shapes.
    """
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    _check_shapes(x, y)
    return mean_flat(scale_invariant_signal_distortion_ratio(x.float(), y.float()))


def _check_shapes(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 3:
        raise UserError(
            f"waveforms of shape {tuple(x.shape)} and {tuple(y.shape)} must be (B, C, T) to be compared one by one"
        )
