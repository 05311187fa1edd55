"""Data sets of recordings: synthetic tones, the Free Spoken Digit Dataset, and any of them as codes of its samples."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch
from genai.data.base import Data, Split, random_order
from genai.data.fingerprint import checksum, split_checksum
from genai.modalities import audio as modalities
from genai.modalities.sound import from_int16

MAX_SECONDS = 3600.0  # of one item


class Recordings:
    """A split of recordings in memory, as clips of one length T: longer ones are cut, shorter ones are followed by zeros.

    In a batch `mask`, bool (B, T), tells which samples are recorded. A clip is cut at a random place if there are draws, else at
    its beginning.

    Args:
        field: name of the waveforms.
        waves: int16 (T_i, C), one for each recording.
        length: T of a clip.
        crop: samples of a clip that are recorded at most; None for T.
        conditions: further tensors of a batch by name, such as `label` (N,).
    """

    def __init__(
        self,
        field: str,
        waves: Sequence[np.ndarray],
        length: int,
        crop: int | None = None,
        conditions: dict[str, np.ndarray] | None = None,
    ):
        self.field, self.length, self.crop = field, length, min(crop or length, length)
        self.whole = torch.from_numpy(np.concatenate(waves).T.copy())  # (C, all samples)
        self.sizes = torch.tensor([len(wave) for wave in waves])
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.conditions = {name: torch.from_numpy(v.astype(np.int64)) for name, v in (conditions or {}).items()}
        self.augments = bool((self.sizes > self.crop).any())

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the items `index` (B,); the first of the draws (B, 4) places the cut."""
        size = self.sizes[index].clamp_max(self.length if draws is None else self.crop)
        slack = self.sizes[index] - size
        place = torch.zeros_like(slack) if draws is None else (draws[:, 0] * (slack + 1)).long().minimum(slack)
        at = torch.arange(self.length)
        mask = at < size[:, None]
        x = from_int16(
            self.whole[:, (self.starts[index] + place)[:, None] + at.minimum(size[:, None] - 1)]
        )  # (C, B, T)
        conditions = {name: values[index] for name, values in self.conditions.items()}
        return {self.field: x.transpose(0, 1) * mask[:, None], "mask": mask, **conditions}

    def fingerprint(self, quick: bool) -> str:
        own = [self.whole, self.sizes, self.length, self.crop, *self.conditions.values()]
        return checksum(*own, quick=quick)


def clip_length(max_seconds: float, sr_hz: int) -> int:
    """Return the samples of a clip. Raises UserError for one of none, or of more than an hour."""
    number(max_seconds, "data.max_seconds", 0, MAX_SECONDS, open_low=True)
    length = round(max_seconds * at_least(sr_hz, 1, "data.sr_hz", most=modalities.MAX_SR_HZ))
    if length < 1:
        raise UserError(f"data.max_seconds={max_seconds} is less than one sample at {sr_hz} Hz: give more")
    return length


class Part(NamedTuple):
    """The recordings of a split, with their conditions by name, int64 (N,)."""

    waves: list[np.ndarray]
    conditions: dict[str, np.ndarray]


def recording_splits(
    field: str, parts: dict[str, Part], length: int, crop_seconds: float | None, sr_hz: int
) -> dict[str, Split]:
    """Build splits of clips; training clips are cut to `crop_seconds`, and the others are in random order."""
    crop = None if crop_seconds is None else clip_length(number(crop_seconds, "data.crop_seconds", 0), sr_hz)
    found: dict[str, Split] = {}
    for name, (waves, conditions) in parts.items():
        training = name == "train"
        split = Recordings(field, waves, length, crop if training else None, conditions)
        found[name] = split if training else random_order(split)
    cut = sum(len(wave) > length for waves, _ in parts.values() for wave in waves)
    if cut:
        n = sum(len(waves) for waves, _ in parts.values())
        print(
            f"{cut} of {n} recordings are longer than {length / sr_hz:g} s and are cut (data.max_seconds)",
            file=sys.stderr,
        )
    return found


NOTES = {
    "A5": 880.0,
    "B5": 987.77,
    "C6": 1046.5,
    "D6": 1174.66,
    "E6": 1318.51,
    "F6": 1396.91,
    "G6": 1567.98,
    "A6": 1760.0,
}
"""Frequency in Hz of the tones, by name."""
PLUCKS = 40, 44, 48, 52  # first values of a tone, in steps of 1 / 128
INNOVATION = 0.025  # probability of each of -1 and +1
DECAY_SECONDS = 0.25  # of a tone to 1 / e


class Tones(Data):
    """Synthetic plucked tones, whose entropy is known exactly: a second-order autoregressive process on 256 levels.

    In steps of 1 / 128 a tone of frequency f is c_t = round(2 r cos(2 pi f / sr_hz) c_{t-1} - r^2 c_{t-2}) + e_t with the
    innovation e_t in {-1, 0, 1}, c_0 one of four values, and c_{-1} = 0. The samples of a tone with known f therefore have
    `entropy_bits(T)`, and no model can predict them with fewer bits. A label is the tone's note.

    Args:
        n: number of training tones, a tenth as many for validation and test each.
        sr_hz: sampling rate, at least 4,000.
        max_seconds: length of a tone.
        field, shape, classes, levels, batch_size, num_workers: see `Data`.
    """

    def __init__(
        self,
        n: int,
        sr_hz: int,
        max_seconds: float,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
    ):
        at_least(n, 1, "data.n")
        if at_least(sr_hz, 1, "data.sr_hz", most=modalities.MAX_SR_HZ) < 4000:
            raise UserError(f"data.sr_hz={sr_hz} is too low for tones of up to 1760 Hz: give at least 4000")
        length, generator = clip_length(max_seconds, sr_hz), np.random.default_rng(0)
        parts = {}
        for name, count in {"train": n, "val": max(n // 10, 1), "test": max(n // 10, 1)}.items():
            label = generator.integers(0, len(NOTES), count)
            waves = pluck(np.array([*NOTES.values()])[label], sr_hz, length, generator)
            parts[name] = Part([wave[:, None] for wave in waves], {"label": label})
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=recording_splits(field, parts, length, None, sr_hz),
            found_shape=[1, length],
            class_names=[*NOTES],
            found_levels=256,
            modality=modalities.Audio(sr_hz),
        )


def pluck(frequencies: np.ndarray, sr_hz: int, length: int, generator: np.random.Generator) -> np.ndarray:
    """Draw a tone of each frequency in Hz, (N,): int16 (N, length), see `Tones`."""
    r = np.exp(-1 / (DECAY_SECONDS * sr_hz))
    a, b = 2 * r * np.cos(2 * np.pi * frequencies / sr_hz), -(r**2)
    values = np.zeros((len(frequencies), length + 1))
    values[:, 1] = generator.choice(PLUCKS, len(frequencies))
    chances = [INNOVATION, 1 - 2 * INNOVATION, INNOVATION]
    innovations = generator.choice([-1, 0, 1], (len(frequencies), length), p=chances)
    for t in range(2, length + 1):
        values[:, t] = np.clip(np.round(a * values[:, t - 1] + b * values[:, t - 2]) + innovations[:, t - 1], -128, 127)
    return (values[:, 1:] * 256).astype(np.int16)


def entropy_bits(length: int) -> float:
    """Return the entropy in bits of `length` samples of a tone whose frequency is known."""
    p = np.array([INNOVATION, 1 - 2 * INNOVATION, INNOVATION])
    return float(np.log2(len(PLUCKS)) - (length - 1) * (p * np.log2(p)).sum())


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEST_TAKES, VAL_TAKES = range(5), range(5, 7)


class SpokenDigits(Data):
    """The Free Spoken Digit Dataset: recordings of digits at 8 kHz, `{digit}_{speaker}_{take}.wav` in one folder.

    Takes 0 to 4 are the test split, as the data set's authors have it, 5 and 6 validation, and the others training.

    Args:
        root: the folder.
        speaker: name of the only speaker to take; None for all, who are then a condition.
        max_seconds: length of a clip; longer recordings are cut, shorter ones followed by zeros.
        crop_seconds: training clips hold so much of a recording, cut at a random place; None for `max_seconds`.
        field, shape, classes, levels, batch_size, num_workers: see `Data`.
        speakers: number of speakers, None if `speaker` is given.

    Raises UserError for a folder without such files, and an unknown speaker.
    """

    def __init__(
        self,
        root: str,
        speaker: str | None,
        max_seconds: float,
        crop_seconds: float | None,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        speakers: int | None,
        batch_size: int,
        num_workers: int = 0,
    ):
        named = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")
        matches = [match for path in sorted(Path(root).glob("*.wav")) if (match := named.fullmatch(path.name))]
        if not matches:
            raise UserError(
                f"data.root={root} holds no recordings such as 7_jackson_32.wav: download "
                "github.com/Jakobovski/free-spoken-digit-dataset and name its folder recordings with data.root="
            )
        names = sorted({match[2] for match in matches})
        if speaker is not None and speaker not in names:
            raise UserError(f"data.speaker={speaker} must be one of {', '.join(names)}, or null for all")
        kept = [match for match in matches if speaker in (None, match[2])]
        takes = np.array([int(match[3]) for match in kept])
        in_test, in_val = np.isin(takes, TEST_TAKES), np.isin(takes, VAL_TAKES)
        chosen = {"train": ~in_test & ~in_val, "val": in_val, "test": in_test}
        if empty := [name for name, which in chosen.items() if not which.any()]:
            raise UserError(f"data.root={root} holds no recordings of the {empty[0]} split: bring back takes 0 to 7")
        read = [read_16_bits(Path(root) / match[0]) for match in kept]
        rates = {sr_hz for _, sr_hz in read}
        if len(rates) > 1:
            raise UserError(
                f"data.root={root} holds recordings of {' and '.join(map(str, sorted(rates)))} Hz: give one rate"
            )
        sr_hz = rates.pop()
        waves = [wave for wave, _ in read]
        facts = {"label": np.array([int(match[1]) for match in kept])}
        if speaker is None:
            facts["speaker"] = np.array([names.index(match[2]) for match in kept])
        parts = {
            name: Part([waves[i] for i in np.flatnonzero(which)], {key: value[which] for key, value in facts.items()})
            for name, which in chosen.items()
        }
        length = clip_length(max_seconds, sr_hz)
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=recording_splits(field, parts, length, crop_seconds, sr_hz),
            found_shape=[1, length],
            class_names=DIGITS,
            found_levels=2**16,
            modality=modalities.Audio(sr_hz),
            speaker_names=None if speaker else names,
            speakers=speakers,
        )


def read_16_bits(path: Path) -> tuple[np.ndarray, int]:
    """Read a sound file as (int16 (T, C), sampling rate). Raises UserError if it cannot be read or is empty."""
    import soundfile

    try:
        wave, sr_hz = soundfile.read(path, dtype="int16", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as sound ({error}): bring it back or remove it") from error
    if not len(wave):
        raise UserError(f"{path} holds no samples: remove it")
    return wave, sr_hz


class QuantizedAudio(Data):
    """Audio of one channel as codes of its samples, for models of token ids: int64 (B, 1 + T), silence first.

    `mask`, bool (B, 1 + T), is true for what was recorded, and so never for the first token.

    Args:
        audio: a data set of audio.
        companding: mu_law or linear, see `genai.nn.companding`.
        shape: [T], the number of tokens after the first.
        levels: number of codes.
        speakers: number of speakers, as `audio` has.
        field, classes, batch_size, num_workers: see `Data`.

    Raises UserError for data that are not audio of one channel.
    """

    def __init__(
        self,
        audio: Data,
        companding: str,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int,
        batch_size: int,
        num_workers: int = 0,
        speakers: int | None = None,
    ):
        kind = audio.modality
        if not isinstance(kind, modalities.Audio) or kind.channels != 1:
            raise UserError(f"data.audio is {audio.field} of shape {audio.shape}: give audio of one channel")
        self.source, codes = ("audio", audio), modalities.QuantizedAudio(kind.sr_hz, levels, companding)
        names = {name: getattr(label, "names", None) for name, label in audio.conditions.items()}
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits={name: CodeSplit(part, audio.field, codes) for name, part in audio.splits.items()},
            found_shape=[audio.shape[-1]],
            class_names=audio.class_names,
            found_levels=codes.levels,
            modality=codes,
            speaker_names=names.get("speaker"),
            speakers=speakers,
        )


class CodeSplit:
    """A split of audio as codes."""

    def __init__(self, split: Split, field: str, codes: modalities.QuantizedAudio):
        self.split, self.field, self.codes, self.augments = split, field, codes, split.augments

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        found = self.split.batch(index, draws)
        mask = torch.nn.functional.pad(found.pop("mask"), (1, 0), value=False)
        return {"tokens": self.codes.encode(found.pop(self.field)), "mask": mask, **found}

    def fingerprint(self, quick: bool) -> str:
        return checksum(split_checksum(self.split, quick), self.codes.state())
