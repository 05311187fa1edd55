"""Data sets of recordings: synthetic tones, the Free Spoken Digit Dataset, and any of them as codes of its samples."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import checksum, split_checksum
from genai.data.recordings import clip_length, recording_splits
from genai.modalities import audio as modalities
from genai.modalities import sound
from genai.modalities.mel import Mel
from genai.modalities.sound import to_int16

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
        counts = {"train": n, "val": max(n // 10, 1), "test": max(n // 10, 1)}
        label = generator.integers(0, len(NOTES), sum(counts.values()))
        waves = pluck(np.array([*NOTES.values()])[label], sr_hz, length, generator)
        items = np.split(np.arange(len(label)), np.cumsum([*counts.values()])[:-1])
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=recording_splits(
                field, [*waves[..., None]], dict(zip(counts, items, strict=True)), {"label": label}, length, None, sr_hz
            ),
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
        held_out: name of a speaker all of whose recordings, and no others, are the test split; None for the authors' split.

    Raises UserError for a folder without such files, an unknown speaker, and for both `speaker` and `held_out`.
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
        held_out: str | None = None,
    ):
        named = re.compile(r"(\d)_([^_]+)_(\d+)\.wav")
        matches = [match for path in sorted(Path(root).glob("*.wav")) if (match := named.fullmatch(path.name))]
        if not matches:
            raise UserError(
                f"data.root={root} holds no recordings such as 7_jackson_32.wav: download "
                "github.com/Jakobovski/free-spoken-digit-dataset and name its folder recordings with data.root="
            )
        names = sorted({match[2] for match in matches})
        for key, given, else_ in ("speaker", speaker, "all"), ("held_out", held_out, "none"):
            if given is not None and given not in names:
                raise UserError(f"data.{key}={given} must be one of {', '.join(names)}, or null for {else_}")
        if speaker is not None and held_out is not None:
            raise UserError(
                f"data.speaker={speaker} leaves no other speaker to learn from, and data.held_out={held_out} is to be tested on: "
                "set one of them to null"
            )
        kept = [match for match in matches if speaker in (None, match[2])]
        takes = np.array([int(match[3]) for match in kept])
        in_test, in_val = np.isin(takes, TEST_TAKES), np.isin(takes, VAL_TAKES)
        if held_out is not None:
            in_test = np.array([match[2] == held_out for match in kept])
            in_val &= ~in_test
        chosen = {"train": ~in_test & ~in_val, "val": in_val, "test": in_test}
        parts = {name: np.flatnonzero(which) for name, which in chosen.items()}
        if empty := [name for name, items in parts.items() if not len(items)]:
            raise UserError(f"data.root={root} holds no recordings of the {empty[0]} split: bring back takes 0 to 7")
        waves = [read_recording(Path(root) / match[0]) for match in kept]
        rates = {wave.sr_hz for wave in waves}
        if len(rates) > 1:
            raise UserError(
                f"data.root={root} holds recordings of {' and '.join(map(str, sorted(rates)))} Hz: give one rate"
            )
        sr_hz = rates.pop()
        conditions = {"label": np.array([int(match[1]) for match in kept])}
        if speaker is None:
            conditions["speaker"] = np.array([names.index(match[2]) for match in kept])
        length = clip_length(max_seconds, sr_hz)
        clips = [to_int16(wave.x).T.numpy() for wave in waves]
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=recording_splits(field, clips, parts, conditions, length, crop_seconds, sr_hz),
            found_shape=[1, length],
            class_names=DIGITS,
            found_levels=2**16,
            modality=modalities.Audio(sr_hz),
            speaker_names=None if speaker else names,
            speakers=speakers,
        )


def read_recording(path: Path) -> sound.Wave:
    """Read a sound file of one channel. Raises UserError if it cannot be read, or has more."""
    try:
        wave = sound.decode(path)
    except ValueError as error:
        raise UserError(f"{path} {error}: bring it back or remove it") from error
    if len(wave.x) > 1:
        raise UserError(f"{path} has {len(wave.x)} channels, and these recordings one: bring it back or remove it")
    return wave


class QuantizedAudio(Data):
    """Audio of one channel as codes of its samples, for models of token ids: int64 (B, 1 + T), silence first.

    `mask`, bool (B, 1 + T), is true for what was recorded, and so never for the first token.

    Args:
        audio: a data set of audio.
        companding: mu_law or linear, see `genai.nn.companding`.
        shape: [T], the number of tokens after the first.
        levels: number of codes.
        speakers: number of speakers, as `audio` has.
        mels, hop: bands of the log-mel spectrogram `mel` (B, mels, frames) that batches have too, and samples from one frame to
            the next; None for none.
        root: folder of the recordings; the config of `audio` refers to it, so that data.root= works here as it does everywhere.
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
        mels: int | None = None,
        hop: int | None = None,
        root: str | None = None,
    ):
        kind = audio.modality
        if not isinstance(kind, modalities.Audio) or kind.channels != 1:
            raise UserError(f"data.audio is {audio.field} of shape {audio.shape}: give audio of one channel")
        self.source, codes = ("audio", audio), modalities.QuantizedAudio(kind.sr_hz, levels, companding)
        if (mels is None) != (hop is None):
            raise UserError(f"data.mels={mels} and data.hop={hop} belong together: set both, or neither")
        mel = None if mels is None or hop is None else Mel(kind.sr_hz, mels, hop)
        names = {name: getattr(label, "names", None) for name, label in audio.conditions.items()}
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits={name: CodeSplit(part, audio.field, codes, mel) for name, part in audio.splits.items()},
            found_shape=[audio.shape[-1]],
            class_names=audio.class_names,
            found_levels=codes.levels,
            modality=codes,
            speaker_names=names.get("speaker"),
            speakers=speakers,
        )
        self.mels, self.hop = mels, hop
        if mel is not None:
            self.conditions[mel.field] = mel


class CodeSplit:
    """A split of audio as codes, with its spectrograms if there is a `mel`."""

    def __init__(self, split: Split, field: str, codes: modalities.QuantizedAudio, mel: Mel | None = None):
        self.split, self.field, self.codes, self.mel, self.augments = split, field, codes, mel, split.augments

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        found = self.split.batch(index, draws)
        if draws is not None:  # a training batch is as long as its longest clip
            n = int(found["mask"].sum(1).max())
            found |= {"mask": found["mask"][:, :n], self.field: found[self.field][..., :n]}
        mask, x = torch.nn.functional.pad(found.pop("mask"), (1, 0), value=False), found.pop(self.field)
        mel = {} if self.mel is None else {self.mel.field: self.mel.encode(x)}
        return {"tokens": self.codes.encode(x), "mask": mask, **mel, **found}

    def fingerprint(self, quick: bool) -> str:
        mel = [] if self.mel is None else [self.mel.state()]
        return checksum(split_checksum(self.split, quick), self.codes.state(), *mel)
