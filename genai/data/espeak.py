"""Spoken digits without a download, by the synthesiser espeak-ng."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genai import progress
from genai.core import extras
from genai.core.errors import UserError, at_least
from genai.data.audio import DIGITS
from genai.data.base import Data
from genai.data.fingerprint import checksum
from genai.data.recordings import clip_length, recording_splits, store
from genai.modalities import sound
from genai.modalities.audio import MAX_SR_HZ, Audio

SPEAKERS = {
    "american_man": ("en-us+m3", 45),
    "american_woman": ("en-us+f2", 55),
    "british_man": ("en-gb-x-rp+m1", 40),
    "british_woman": ("en-gb-x-rp+f4", 60),
    "scottish_man": ("en-gb-scotland+m7", 35),
    "scottish_woman": ("en-gb-scotland+f1", 50),
    "caribbean_man": ("en-029+m2", 30),
    "whisperer": ("en+whisper", 50),
}
"""The voice and mean pitch, from 0 to 99, of each speaker."""
WORDS_PER_MINUTE = 120, 240
PITCHES, PITCH_RANGES = (-12, 12), (20, 80)  # around a speaker's mean, and of the melody of a word
GAIN = 0.9  # of the loudest sample of all
FORMAT = 1  # version of the cached samples
Request = tuple[str, int, int, int, str]


class EspeakDigits(Data):
    """The digits zero to nine, spoken by eight voices of espeak-ng at random speeds and pitches.

    Of each speaker's takes of a digit the last tenth is the test split, and the tenth before it validation. The speakers, who
    are a condition, are the same in all splits. The voices are synthetic, and takes are more alike than those of a person.

    They are spoken once, the same in every installation of one version of espeakng-loader, and cached. That package (the
    extra `audio`) holds the program espeak-ng, which is under the GPL, version 3, and runs in a process of its own.

    Args:
        takes: of each digit by each speaker, at least 3.
        sr_hz: sampling rate; other than 22,050 needs torchaudio.
        max_seconds: length of a clip; longer recordings are cut, shorter ones followed by zeros.
        crop_seconds: training clips hold so much of a recording, cut at a random place; None for `max_seconds`.
        field, shape, classes, levels, speakers, batch_size, num_workers: see `Data`.

    Raises UserError where espeakng-loader is not installed, or fails.
    """

    def __init__(
        self,
        takes: int,
        sr_hz: int,
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
        at_least(takes, 3, "data.takes", most=10_000)
        length = clip_length(max_seconds, at_least(sr_hz, 1, "data.sr_hz", most=MAX_SR_HZ))
        take, speaker, digit = np.unravel_index(
            np.arange(takes * len(SPEAKERS) * len(DIGITS)), (takes, len(SPEAKERS), len(DIGITS))
        )
        held, splits = max(takes // 10, 1), ("train", "val", "test")
        which = np.digitize(take, [takes - 2 * held, takes - held])
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=recording_splits(
                field,
                spoken(takes, sr_hz),
                {name: np.flatnonzero(which == i) for i, name in enumerate(splits)},
                {"label": digit, "speaker": speaker},
                length,
                crop_seconds,
                sr_hz,
            ),
            found_shape=[1, length],
            class_names=DIGITS,
            found_levels=2**16,
            modality=Audio(sr_hz),
            speaker_names=[*SPEAKERS],
            speakers=speakers,
        )


def spoken(takes: int, sr_hz: int) -> Sequence[np.ndarray]:
    """Return all takes of all speakers of all digits, the digit changing first; from the cache if they were spoken before."""
    loader = extras.load("espeakng_loader", "audio", "data=spoken_digits")
    key = checksum("espeak", _version(), requests(takes), sr_hz, FORMAT)

    def make() -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
        asked = requests(takes)
        with progress.task("speaking digits, once"):
            waves, rate = speak(loader, asked)
        scale = GAIN / max(np.abs(wave).max() for wave in waves)
        for wave in progress.track(waves, "resampling digits, once", len(waves), "clips"):
            x = torch.from_numpy(wave)[None] * scale
            yield sound.to_int16(sound.resample(sound.Wave(x, rate), sr_hz, "data.sr_hz")).T.numpy(), {}

    return store(key, 1, make)


def _version() -> str:
    from importlib.metadata import version

    return version("espeakng-loader")


def requests(takes: int) -> list[Request]:
    """Return what to say, with the voice, words per minute, pitch and range of pitch of each; more takes begin with the same."""
    generator, found = np.random.default_rng(0), []
    for _ in range(takes):
        for voice, mean in SPEAKERS.values():
            for digit in DIGITS:
                speed, off, wide = (
                    int(generator.integers(*ends)) for ends in (WORDS_PER_MINUTE, PITCHES, PITCH_RANGES)
                )
                found.append((voice, speed, mean + off, wide, digit))
    return found


def speak(loader: Any, asked: Sequence[Request]) -> tuple[list[np.ndarray], int]:
    """Return float32 samples (T_i,) of what is asked for, and their sampling rate. Raises UserError where espeak-ng fails."""
    script = Path(__file__).with_name("espeak_process.py")
    command = [sys.executable, "-I", "-S", script, loader.get_library_path(), loader.get_data_path()]
    done = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True)
    if done.returncode:
        why = (done.stderr.decode(errors="replace").strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        raise UserError(
            f"data=spoken_digits: espeak-ng failed, {why}: install espeakng-loader again, or choose another data="
        )
    (sr_hz,), at, waves = struct.unpack_from("=i", done.stdout), 4, []
    while at < len(done.stdout):
        (n,) = struct.unpack_from("=i", done.stdout, at)
        waves.append(np.frombuffer(done.stdout, np.int16, n, at + 4).astype(np.float32) / 32768)
        at += 4 + 2 * n
    return waves, sr_hz
