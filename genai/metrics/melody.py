"""Metrics of melodies as notes (start, end, MIDI pitch), in steps: range, repetition, notes out of key, copies.

None has a best value: a figure is compared with that of real melodies.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from genai.metrics.text import distinct, longest_copy

Notes = Sequence[tuple[int, int, int]]
"""The notes of one voice, one after the other."""

MAJOR = 0, 2, 4, 5, 7, 9, 11  # semitones of a major scale above its tonic
PATTERN = 4  # notes of what may be repeated
SEPARATOR = 2**40  # numbers from here on keep pieces apart


def pitch_range(voices: Sequence[Notes]) -> float:
    """Return the mean over voices of the semitones between the lowest and the highest note; 0 for a voice without notes."""
    ranges = [max(p for _, _, p in notes) - min(p for _, _, p in notes) if notes else 0 for notes in voices]
    return float(np.mean(ranges)) if ranges else 0.0


def out_of_key(voices: Sequence[Notes]) -> float:
    """Return the share of sounding steps whose pitch is not in the major scale, of the twelve, that has most of them.

    A natural minor scale is the major one of its relative, so a piece in minor counts its raised notes.
    """
    steps = np.zeros(12)
    for start, end, pitch in (note for notes in voices for note in notes):
        steps[pitch % 12] += end - start
    inside = max(steps[[(tonic + k) % 12 for k in MAJOR]].sum() for tonic in range(12))
    return float(1 - inside / steps.sum()) if steps.any() else 0.0


def repetition(voices: Sequence[Notes]) -> float:
    """Return the mean over voices of the share of four successive notes, with their lengths, that came before in the voice."""
    rows = [[(pitch, end - start) for start, end, pitch in notes] for notes in voices]
    found = [1 - distinct([row], PATTERN) for row in rows if len(row) >= PATTERN]
    return float(np.mean(found)) if found else 0.0


def intervals(notes: Notes) -> np.ndarray:
    """Return a melody whatever its key: each interval to the next note and the steps to it, as a number, int64 (N - 1,)."""
    found = [
        (after[2] - note[2] + 128) * 2**20 + min(after[0] - note[0], 2**20 - 1)
        for note, after in itertools.pairwise(notes)
    ]
    return np.array(found, np.int64)


def copied_notes(voices: Sequence[Notes], train: Any) -> int:
    """Return how many successive notes of a voice are also in training, transposed or not, with their rhythm.

    `train` is of `join`.
    """
    rows: Any = map(intervals, voices)
    return max((longest_copy(own, train).length + 1 for own in rows if len(own)), default=0)


def join(voices: Sequence[Notes]) -> np.ndarray:
    """Return the intervals of many voices one after the other, each followed by a number that is in no other, int64 (N,)."""
    parts = [part for k, notes in enumerate(voices) for part in (intervals(notes), [SEPARATOR + k])]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
