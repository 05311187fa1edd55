"""Sound files: waveforms in [-1, 1] written as .wav, and read from any format of libsndfile."""

import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai.core import extras, files
from genai.core.errors import UserError

MAX_VALUES = 2**29  # numbers of one decoded file: two hours of stereo at 32 kHz, 2 GB
LEAST = 0.9  # of the samples that a header claims must be there; the header of an mp3 only estimates them

MAX_FILTER = 2**24  # numbers of the filter of a resampling


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


def decode(file: Path | BinaryIO) -> Wave:
    """Decode a sound file whole.

    Raises ValueError whose message continues a sentence that begins with the file's name, if it is no sound or not all of it.
    """
    import soundfile

    try:
        # Opened here, for libsndfile calls a missing file a system error.
        held = file.open("rb") if isinstance(file, Path) else nullcontext(file)
        with held as content, soundfile.SoundFile(content) as opened:
            if opened.frames * opened.channels > MAX_VALUES:
                raise ValueError(f"has {opened.frames:,} samples of {opened.channels} channels: cut it into parts")
            x = opened.read(dtype="float32", always_2d=True)
            cut = len(x) < opened.frames * LEAST or _lacks_bytes(opened.extra_info)
    except (OSError, RuntimeError, TypeError) as error:  # soundfile raises a RuntimeError for what libsndfile refuses
        why = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].strip(". ")
        raise ValueError(f"cannot be read as sound ({why})") from error
    if cut or not len(x):
        raise ValueError("is cut short" if len(x) or cut else "holds no samples")
    if not np.isfinite(x).all():
        raise ValueError("holds values that are not finite")
    return Wave(torch.from_numpy(x.T.copy()), opened.samplerate)


def _lacks_bytes(said: str) -> bool:
    """Tell by what libsndfile says of a .wav or .aiff file whether it ends before its header says.

    The header of a file that was written to a pipe knows no length and has a value close to 2^31 or 2^32.
    """
    found = re.search(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", said, re.MULTILINE)
    return found is not None and int(found[2]) < int(found[1]) < 2**31 - 2**16


def read_wave(path: Path, key: str) -> Wave:
    """Read a sound file whole. Raises UserError, which names the config key `key`, if it cannot be read as sound."""
    try:
        if path.is_dir():
            raise ValueError("is a folder")
        return decode(path)
    except ValueError as error:
        raise UserError(f"{key}={path} {error}: name a .wav, .flac, .ogg or .mp3 file") from error


def resample(wave: Wave, sr_hz: int, key: str) -> Tensor:
    """Return a recording (C, T') at another sampling rate.

    Raises UserError, which names `key`, without torchaudio, and ValueError, whose message continues a sentence that begins with
    the recording's name, for a rate whose filter would fill the memory.
    """
    if wave.sr_hz == sr_hz:
        return wave.x
    common = math.gcd(wave.sr_hz, sr_hz)
    if wave.sr_hz // common * (sr_hz // common) > MAX_FILTER:
        raise ValueError(f"has {wave.sr_hz} Hz, which is in no simple ratio to {sr_hz} Hz")
    functional = extras.load("torchaudio.functional", "audio", f"{key}={sr_hz} for recordings of {wave.sr_hz} Hz")
    return functional.resample(wave.x, wave.sr_hz, sr_hz)


def to_int16(x: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to 16 bits, rounded and clipped; 32768 steps are 1."""
    return (x.float() * 32768).round().clamp(-32768, 32767).to(torch.int16)


def from_int16(x: Tensor) -> Tensor:
    """Convert 16 bits to float32 in [-1, 1)."""
    return x.float() / 32768
