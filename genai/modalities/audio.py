"""Audio: waveforms in [-1, 1], and the same as codes of their samples for autoregressive models."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genai.core.errors import UserError, at_least, show
from genai.core.protocols import Batch
from genai.core.runs import Facts
from genai.metrics import likelihood
from genai.modalities import sound
from genai.modalities.base import MAX_HEARD, Clips, Modality, Request, check_values, pad_prompts, read_each
from genai.modalities.image import grid, near_square, period
from genai.nn.companding import companding
from genai.nn.mel import LogMel, stft_power

MAX_SR_HZ = 768_000
CHANNELS = 1, 2
DECIBELS = 80.0  # range of a picture of a spectrogram, below a sine of amplitude 1


class Audio(Modality):
    """Waveforms (B, C, T) in [-1, 1]; a clip shorter than T is followed by zeros.

    Args:
        sr_hz: sampling rate.
        channels: C, 1 or 2.
    """

    field, meaning, likelihoods = "audio", "sampling rate or number of channels", ("bits_per_sample",)
    start, has_time = "audio", True

    def __init__(self, sr_hz: int, channels: int = 1):
        super().__init__()
        self.sr_hz = at_least(sr_hz, 1, "sr_hz", most=MAX_SR_HZ)
        if channels not in CHANNELS:
            raise UserError(f"channels={channels} of audio must be 1 or 2")
        self.channels = channels

    def state(self) -> dict[str, Any]:
        return {"sr_hz": self.sr_hz, "channels": self.channels}

    def preview(self, batch: Batch, columns: int | None = None) -> Clips:
        """Return the spectrograms of samples in a grid, with columns for each class if the labels are periodic, and their sound.

        A spectrogram has time to the right and frequency upwards; white is a sine of amplitude 1, black 80 dB below.
        """
        x = batch[self.field].float().cpu()
        maps, original = spectrograms(x, self.sr_hz), batch.get("original")
        if columns is None and original is not None:
            columns = int(original.long().argmin()) or None
        if columns is None:
            columns = near_square(len(x), maps.shape[-2], maps.shape[-1], period(batch.get("label")))
        return Clips(grid(maps, columns, original=original), x[:MAX_HEARD], self.sr_hz)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write grid.png, grid.wav with the first clips one after the other, samples.npz (int16) and a .wav for each clip."""
        written = super().write(folder, batch, names, request, columns)
        for wave, name in zip(batch[self.field], names, strict=True):
            sound.write_wave(folder / f"{name}.wav", wave, self.sr_hz)
        return [f"{names[0]}.wav", *written]

    def read(self, path: Path, shape: Sequence[int], key: str) -> Tensor:
        """Read sound files as (N, C, T), cut or followed by zeros to the shape [C, T]. Raises UserError for another rate."""
        paths = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else [path]
        if not paths:
            raise UserError(f"{key}={path} contains no file: name a sound file, or a folder of them")
        length = shape[-1]
        waves = [self.read_one(p, key)[:, :length] for p in paths]
        return torch.stack([torch.nn.functional.pad(wave, (0, length - wave.shape[1])) for wave in waves])

    def read_one(self, path: Path, key: str) -> Tensor:
        """Read a sound file as (C, T), mixed down if C is 1. Raises UserError, which names `key`, for another sampling rate."""
        wave = sound.read_wave(path, key)
        if wave.sr_hz != self.sr_hz:
            raise UserError(
                f"{key}={path} has {wave.sr_hz} Hz, and this model {self.sr_hz} Hz: give a file of that rate"
            )
        if self.channels == 1:
            return wave.x.mean(0, keepdim=True)
        if len(wave.x) > 2:
            raise UserError(f"{key}={path} has {len(wave.x)} channels, and this model 2: give a file of 1 or 2")
        return wave.x.expand(2, -1)

    def read_mask(self, mask: Any, shape: Sequence[int]) -> Tensor:
        """Return 1 from the first to the second of two times in seconds, None for an end of the clip, as (1, 1, T)."""
        whole = shape[-1] / self.sr_hz
        times = list(mask) if isinstance(mask, list | tuple) and len(mask) == 2 else [-1, -1]
        low, high = (end if time is None else time for time, end in zip(times, (0, whole), strict=True))
        if not all(isinstance(t, int | float) and not isinstance(t, bool) for t in (low, high)) or not (
            0 <= low < high <= whole
        ):
            raise UserError(
                f"mask={show(mask)} must be [from,to], two times in seconds from 0 to {whole:g} between which the sound is "
                "filled in, null for an end"
            )
        at = torch.arange(shape[-1]) / self.sr_hz
        inside = (at >= low) & (at < high)
        if not inside.any():
            raise UserError(f"mask={show(mask)} has no sample between its times at {self.sr_hz} Hz: give a longer part")
        return inside.float()[None, None]

    def check(self, x: Tensor, key: str) -> None:
        """Raise UserError unless x are waveforms (n, C, T) of floats in [-1, 1]."""
        if x.ndim != 3 or not x.is_floating_point():
            raise UserError(f"{key} must be floats (n, C, T) in [-1, 1], got {x.dtype} {list(x.shape)}: convert it")
        check_values(x, key, -1, 1)

    def to_file(self, x: Tensor) -> Tensor:
        return sound.to_int16(x)

    def quantize(self, x: Tensor, levels: int | None) -> Tensor:
        return sound.from_int16(sound.to_int16(x))

    def features(self, x: Tensor) -> None:
        return None

    @functools.cached_property
    def log_mel(self) -> LogMel:
        return LogMel(self.sr_hz)

    def maps(self, x: Tensor) -> Tensor:
        """Return the log-mel spectrograms (N, C, 40, frames) of waveforms."""
        return self.log_mel.to(x.device)(x)

    def units(self, nats: Tensor, targets: int | None, part: Any, shape: Sequence[int], values: int | None) -> Facts:
        """Convert -ln p in nats (N,) of clips to bits per sample, of each channel."""
        return likelihood.per_sample(nats, len(nats) * math.prod(shape) if targets is None else targets, values)


class QuantizedAudio(Modality):
    """Audio of one channel as the codes of its samples: int64 (B, T), 0, ..., levels - 1, without the first one.

    Before every clip there is silence, the code of 0: a clip begins with a first token that is not its own.

    Args:
        sr_hz: sampling rate.
        levels: number of codes.
        companding: name of the map between values and codes, see `genai.nn.companding`.
    """

    field, keys, meaning, comparison = "tokens", ("prompt",), "sampling rate or quantisation", None
    likelihoods = ("bits_per_sample",)

    def __init__(self, sr_hz: int, levels: int, companding: str):
        super().__init__()
        self.audio, self.levels, self.name = Audio(sr_hz), levels, companding
        self.companding = _companding(companding, levels)
        self.silence = int(self.companding.encode(torch.zeros(())))

    def state(self) -> dict[str, Any]:
        return {"sr_hz": self.audio.sr_hz, "levels": self.levels, "companding": self.name}

    def encode(self, x: Tensor) -> Tensor:
        """Encode waveforms (B, 1, T) as codes (B, 1 + T), silence in front."""
        return torch.nn.functional.pad(self.companding.encode(x[:, 0]), (1, 0), value=self.silence)

    def condition(self, request: Request, n: int) -> Batch:
        """Return the codes that n clips begin with, those of the sound files in `prompt`, cyclically; only silence without.

        `tokens` int64 (n, 1 + T) are padded on the left, `pad` (n,) is the amount of padding, and `lead` (n,) is 1. Raises
        UserError for a file that cannot be read, or has another sampling rate.
        """
        cond = pad_prompts([self.encode(wave[None])[0] for wave in self.prompts(request, n)], self.silence)
        return {**cond, "lead": torch.ones(n, dtype=torch.int64)}

    def prompts(self, request: Request, n: int) -> list[Tensor]:
        """Return the waveforms (1, T_i) that n clips begin with, those of the sound files in `prompt`; of T_i = 0 without."""
        if request.get("prompt") is None:
            return [torch.zeros(1, 0)] * n
        return read_each(request["prompt"], n, "prompt", lambda path: self.audio.read_one(path, "prompt"))

    def decode(self, batch: Batch) -> Batch:
        """Return `audio` (B, 1, T) of codes (B, T)."""
        return {self.audio.field: self.companding.decode(batch["tokens"])[:, None]}

    def preview(self, batch: Batch, columns: int | None = None) -> Clips:
        return self.audio.preview({**batch, **self.decode(batch)}, columns)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write the clips as `Audio` does; each continues its prompt, which is in its file too."""
        begun = [wave[0] for wave in self.prompts(request, len(names))]
        before = pad_sequence(begun, batch_first=True, padding_side="left")[:, None]
        audio = torch.cat([before, self.decode(batch)[self.audio.field]], 2)
        return self.audio.write(folder, {**batch, self.audio.field: audio}, names, request, columns)

    def units(self, nats: Tensor, targets: int | None, part: Any, shape: Sequence[int], values: int | None) -> Facts:
        return self.audio.units(nats, targets, part, shape, self.levels)


_companding = companding  # which an argument's name hides


def spectrograms(x: Tensor, sr_hz: int) -> Tensor:
    """Return the spectrograms of waveforms (N, C, T), channels mixed, as images (N, 1, F, frames) in [-1, 1]."""
    window = 2 ** max(round(sr_hz * 0.032) - 1, 1).bit_length()
    power = stft_power(x.mean(1, keepdim=True), torch.hann_window(window), max(window // 4, 1))
    decibels = 10 * power.clamp_min(1e-12).log10()
    return (decibels * (2 / DECIBELS) + 1).clamp(-1, 1).flip(-2)
