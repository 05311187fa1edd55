"""Data sets of sound files in a folder or zip, with one subfolder per class; they are decoded once, into the cache."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from genai import progress
from genai.core.errors import UserError, at_least
from genai.data.base import Data
from genai.data.files import Files, copies, describe_copies, print_summary
from genai.data.fingerprint import checksum
from genai.data.recordings import MAX_SECONDS, Store, clip_length, recording_splits, store
from genai.data.scan import UNREAD, reason
from genai.data.splits import arrange
from genai.modalities import sound
from genai.modalities.audio import CHANNELS, MAX_SR_HZ, Audio

READABLE = "wav wave flac ogg oga opus mp3 aif aiff aifc au snd caf w64"
OTHERS = "m4a aac wma webm"  # sound that cannot be read: such files are named, and not ignored as texts are
SUFFIXES = tuple(f".{name}" for name in f"{READABLE} {OTHERS}".split())
FEW = 10  # files that may be of no use, however few there are: folders of sounds are less tidy than those of images
SILENT = 0.001  # a recording whose samples are all below this, -60 dB, counts as silent
FULL_SCALE, CLIPPED = 0.9999, 0.001  # a recording with more than this share of samples at full scale counts as clipped
FORMAT = 1  # version of the cached samples


@dataclasses.dataclass
class Facts:
    """The facts of one file.

    Attributes:
        name: its path below the root.
        problem: why the file cannot be used, empty for a recording.
        sr_hz, channels: as in the file.
        silent: whether all is silence.
        clipped: share of samples at full scale.
        digest: a checksum of the file.
        size: samples, at the sampling rate of the data.
    """

    name: str
    problem: str = ""
    sr_hz: int = 0
    channels: int = 0
    silent: bool = False
    clipped: float = 0.0
    digest: str = ""
    size: int = 0


class AudioFolder(Data):
    """The sound files below a folder, sorted by name; its subfolders are the classes, without any there are no labels.

    Formats are those of libsndfile: .wav, .flac, .ogg, .opus, .mp3, .aiff and others, of any depth. Folders named train, val and
    test, or usual variants, are the splits, as for `ImageFolder`; a split without a folder is 1/12 of the training files,
    stratified by class. What cannot be read is left out. A summary on stderr tells what was found and what was not used.

    All files are decoded, resampled and mixed once, to 16 bits in $XDG_CACHE_HOME/genai or ~/.cache/genai, and read from there
    as needed; a change of the files, of `sr_hz` or `channels` makes new ones there.

    Args:
        root: folder or .zip; a folder that contains only one folder is replaced by that.
        sr_hz: sampling rate; files of other rates are resampled, which needs torchaudio.
        channels: 1 mixes the channels of a file, with 2 a mono file is in both.
        max_seconds: length of a clip; longer recordings are cut, in training at a random place, and shorter ones followed by
            zeros, as `mask` tells. None for the longest recording's.
        crop_seconds: training clips hold so much of a recording, cut at a random place; None for `max_seconds`.
        field, shape, classes, levels, batch_size, num_workers: see `Data`.

    Raises UserError if there is no sound, if more than ten files, and more than 1 %, cannot be used, or if the folders are
    contradictory.
    """

    def __init__(
        self,
        root: str,
        sr_hz: int,
        channels: int,
        max_seconds: float | None,
        crop_seconds: float | None,
        field: str,
        shape: Sequence[int] | None,
        classes: int | None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
    ):
        at_least(sr_hz, 1, "data.sr_hz", most=MAX_SR_HZ)
        if channels not in CHANNELS:
            raise UserError(f"data.channels={channels} must be 1 or 2")
        for seconds, key in ((max_seconds, "data.max_seconds"), (crop_seconds, "data.crop_seconds")):
            if seconds is not None:
                clip_length(seconds, sr_hz, key)
        files = Files(root, 2, "recordings", FEW)
        waves = decode_once(files, sr_hz, channels)
        facts = [Facts(**one) for one in waves.facts]
        names = [one.name for one in facts]
        labels, class_names, parts, notes = arrange(root, names, 2)
        longest = max(one.size for one in facts)
        if max_seconds is None and longest > MAX_SECONDS * sr_hz:
            raise UserError(f"data.max_seconds=null, and a recording has {longest / sr_hz:.0f} s: give at most an hour")
        length = longest if max_seconds is None else clip_length(max_seconds, sr_hz)
        notes = [*describe(facts, sr_hz, channels), *notes]
        digests = {one.name: one.digest for one in facts}
        where = {key: [names[i] for i in items] for key, items in parts.items()}
        notes += describe_copies(copies(files, where, digests.__getitem__), files.what)
        print_summary(files, parts, class_names, notes)
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=recording_splits(
                field, waves, parts, {} if labels is None else {"label": labels}, length, crop_seconds, sr_hz
            ),
            found_shape=[channels, length],
            class_names=class_names,
            found_levels=2**16,
            modality=Audio(sr_hz, channels),
        )


def decode_once(files: Files, sr_hz: int, channels: int) -> Store:
    """Return the recordings among files, int16, from the cache, where they are made if they are not there yet.

    Raises UserError if there are none, or too many files cannot be used, see `Files.check`.
    """
    names = files.candidates(SUFFIXES)
    unread = {name: f"{UNREAD} (no permission)" for name in names if not _is_allowed(files, name)}
    names = [name for name in names if name not in unread]
    try:
        key = checksum(files.fingerprint(names, quick=False), names, sr_hz, channels, FORMAT)
    except OSError as error:
        raise UserError(
            f"data.root={str(files.root)!r} cannot be read ({error.strerror}: {error.filename}): bring the file back or remove it"
        ) from error

    def make() -> Iterator[tuple[np.ndarray, Mapping[str, Any]]]:
        for name in progress.track(names, f"decoding {files.root}, once", len(names), "files"):
            wave, facts = decode(files, name, sr_hz, channels)
            yield wave, dataclasses.asdict(facts)

    found = store(key, channels, make)
    problems = {fact["name"]: fact["problem"] for fact in found.facts if fact["problem"]}
    files.drop(unread | problems, len(found) - len(problems))
    return found.without_empty()


def _is_allowed(files: Files, name: str) -> bool:
    return not files.root.is_dir() or os.access(files.root / name, os.R_OK)


def decode(files: Files, name: str, sr_hz: int, channels: int) -> tuple[np.ndarray, Facts]:
    """Decode a file to int16 (T, channels), with its facts; a file that cannot be used has none, and the facts say why."""
    facts, none = Facts(name), np.zeros((0, channels), np.int16)
    try:
        content = files.read(name)
        if not content:
            raise ValueError("is empty")
        facts.digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        wave = sound.decode(BytesIO(content))
        facts.sr_hz, facts.channels = wave.sr_hz, len(wave.x)
        if channels == 2 and facts.channels > 2:
            raise ValueError(f"has {facts.channels} channels, which data.channels=1 would mix")
        loudness = wave.x.abs()
        facts.silent, facts.clipped = bool(loudness.max() < SILENT), float((loudness > FULL_SCALE).float().mean())
        mixed = wave.x.mean(0, keepdim=True) if channels == 1 else wave.x.expand(2, -1)
        x = sound.to_int16(sound.resample(sound.Wave(mixed, wave.sr_hz), sr_hz, "data.sr_hz"))
        facts.size = x.shape[1]
        return x.T.numpy(), facts
    except (UserError, MemoryError):
        raise
    except ValueError as error:
        facts.problem = str(error)
    except Exception as error:  # zipfile raises almost any exception on a broken member
        facts.problem = reason(error)
    return none, facts


def describe(facts: Sequence[Facts], sr_hz: int, channels: int) -> list[str]:
    """Describe recordings, where the user may want to know or change it; returns sentences."""
    seconds = np.array([one.size for one in facts]) / sr_hz
    notes = [
        f"{seconds.sum():.0f} s of sound at {sr_hz} Hz: {seconds.min():.2f} to {seconds.max():.2f} s, median "
        f"{np.median(seconds):.2f} s"
    ]
    if rates := Counter(one.sr_hz for one in facts if one.sr_hz != sr_hz):
        notes.append(
            f"{rates.total()} resampled from {' and '.join(f'{rate}' for rate in sorted(rates))} Hz (data.sr_hz)"
        )
    if others := sum(one.channels != channels for one in facts):
        how = "mixed to one channel" if channels == 1 else "mono, the same in both channels"
        notes.append(f"{others} {how} (data.channels)")
    if silent := [one.name for one in facts if one.silent]:
        notes.append(f"{len(silent)} silent, below -60 dB throughout, such as {silent[0]}")
    if clipped := [one for one in facts if one.clipped > CLIPPED]:
        worst = max(clipped, key=lambda one: one.clipped)
        notes.append(f"{len(clipped)} clipped: of {worst.name} {worst.clipped:.1%} of the samples are at full scale")
    return notes
