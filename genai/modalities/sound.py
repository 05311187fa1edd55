"""Sound files: waveforms in [-1, 1] written as .wav, and read from any format of libsndfile."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai.core import files
from genai.core.errors import UserError


class Wave(NamedTuple):
    """A recording."""

    x: Tensor
    """float32 (C, T) in [-1, 1]."""
    sr_hz: int
    """Sampling rate."""


def write_wave(path: Path, x: Tensor, sr_hz: int, within: Path | None = None) -> None:
    """Write a waveform (C, T), clipped to [-1, 1], as a .wav file of 16 bits; `within` is as for `core.files.write`."""
    import soundfile

    samples = to_int16(x).T.cpu().numpy()
    files.write(path, lambda file: soundfile.write(file, samples, sr_hz, "PCM_16", format="WAV"), within=within)


def read_wave(path: Path, key: str) -> Wave:
    """Read a sound file whole. Raises UserError, which names the config key `key`, if it cannot be read as sound."""
    import soundfile

    try:
        x, sr_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError) as error:  # soundfile raises a RuntimeError for what libsndfile refuses
        why = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].strip(". ")
        raise UserError(
            f"{key}={path} cannot be read as sound ({why}): name a .wav, .flac, .ogg or .mp3 file"
        ) from error
    if not len(x) or not np.isfinite(x).all():
        raise UserError(
            f"{key}={path} holds {'no samples' if not len(x) else 'values that are not finite'}: name another"
        )
    return Wave(torch.from_numpy(x.T.copy()), sr_hz)


def to_int16(x: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to 16 bits, rounded and clipped; 32768 steps are 1."""
    return (x.float() * 32768).round().clamp(-32768, 32767).to(torch.int16)


def from_int16(x: Tensor) -> Tensor:
    """Convert 16 bits to float32 in [-1, 1)."""
    return x.float() / 32768
