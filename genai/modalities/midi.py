"""Melodies on a grid of steps, as events, as notes, and as MIDI files.

A voice is one event a step, int (S,): `HOLD` (nothing happens), `OFF` (the note that sounds ends), or a MIDI pitch that begins
to sound, also where it sounds already (a re-attack). Several voices are int (S, V), the highest first.
"""

import io
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

HOLD, OFF = -2, -1
TICKS = 480  # per quarter note, in files that are written
DRUMS = 9  # the channel of General MIDI whose notes are no pitches
MOST_STEPS = 2**15  # 68 minutes of sixteenths at 120 quarters a minute


class Note(NamedTuple):
    """A note that sounds from step `start` to before step `end`."""

    start: int
    end: int
    pitch: int


class Score(NamedTuple):
    """The events, metre and tempo of a file of music."""

    events: np.ndarray
    """int16 (S, V)."""
    bar: int | None
    """Steps of a bar, None where they change."""
    tempo: float
    """Quarter notes a minute, at the beginning."""


def to_notes(events: Sequence[int] | np.ndarray) -> list[Note]:
    """Return the notes of one voice's events (S,); a note that is never ended sounds to the end."""
    notes: list[Note] = []
    start = pitch = None
    for step, event in enumerate([*np.asarray(events).tolist(), OFF]):
        if event == HOLD:
            continue
        if start is not None and pitch is not None:
            notes.append(Note(start, step, pitch))
        start, pitch = (None, None) if event == OFF else (step, event)
    return notes


def to_events(notes: Iterable[Note], steps: int) -> np.ndarray:
    """Return the events int16 (steps,) of notes that follow one another, the inverse of `to_notes`."""
    events = np.full(steps, HOLD, np.int16)
    for note in notes:
        if note.end < steps and events[note.end] == HOLD:
            events[note.end] = OFF
        events[note.start] = note.pitch
    return events


def canonical(events: np.ndarray) -> np.ndarray:
    """Return events (S, V) with a hold for each `OFF` that ends nothing, as a file keeps none of these."""
    return np.stack([to_events(to_notes(voice), len(events)) for voice in events.T], 1)


def top_line(notes: Iterable[Note]) -> list[Note]:
    """Return the highest of notes that sound together, as one voice.

    A note begins unless a higher one sounds, and ends the one before it; what is covered does not sound again.
    """
    line: list[Note] = []
    for note in sorted(notes, key=lambda note: (note.start, -note.pitch, -note.end)):
        if line and line[-1].end > note.start:
            if note.pitch < line[-1].pitch or note.start == line[-1].start:
                continue
            line[-1] = line[-1]._replace(end=note.start)
        line.append(note)
    return line


def write(events: np.ndarray, steps_per_quarter: int, tempo: float) -> bytes:
    """Return a MIDI file of events (S, V): of type 0 for one voice, of type 1 with a track for each of several."""
    import mido

    scale, tracks = TICKS // steps_per_quarter, []
    for v, voice in enumerate(events.T):
        messages = [
            (tick * scale, order, mido.Message(kind, note=note.pitch, velocity=80 if order else 0, channel=v))
            for note in to_notes(voice)
            for tick, order, kind in ((note.end, 0, "note_off"), (note.start, 1, "note_on"))
        ]
        track, now = mido.MidiTrack(), 0
        if v == 0:
            track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(tempo)))
        for tick, _, message in sorted(messages, key=lambda message: message[:2]):
            track.append(message.copy(time=tick - now))
            now = tick
        track.append(mido.MetaMessage("end_of_track", time=len(events) * scale - now))
        tracks.append(track)
    file, content = mido.MidiFile(type=0 if len(tracks) == 1 else 1, ticks_per_beat=TICKS, tracks=tracks), io.BytesIO()
    file.save(file=content)
    return content.getvalue()


def read(content: bytes, voices: int, steps_per_quarter: int) -> Score:
    """Read a MIDI file: its top line for one voice, or as many parts as there are voices, by their mean pitch.

    Parts are tracks, or channels of the only track with notes. Onsets and ends are rounded to the grid, by quarter notes, so
    changes of tempo move nothing. The events end with the file's last track.

    Raises ValueError, whose text is the end of a sentence that begins with the file's name, for one that is not MIDI, has no
    notes, another number of parts, or is too long.
    """
    import mido

    try:
        file: Any = mido.MidiFile(file=io.BytesIO(content))
    except Exception as error:  # mido raises almost any exception on a broken file
        raise ValueError(f"is not a MIDI file ({str(error).strip() or type(error).__name__})") from error
    if file.type not in (0, 1) or file.ticks_per_beat <= 0 or file.ticks_per_beat >= 2**15:
        raise ValueError("is a MIDI file of type 2 or in seconds: give one of type 0 or 1 in quarter notes")
    scale = steps_per_quarter / file.ticks_per_beat
    tracks, metres, tempo, last = [], set(), None, 0
    for track in file.tracks:
        now, sounding, found = 0, {}, {}  # of a channel: its notes
        for message in track:
            now += message.time
            if message.type == "set_tempo" and tempo is None and message.tempo:
                tempo = mido.tempo2bpm(message.tempo)
            elif message.type == "time_signature":
                metres.add(message.numerator * 4 * steps_per_quarter / message.denominator)
            elif message.type in ("note_on", "note_off") and message.channel != DRUMS:
                key = message.channel, message.note
                if key in sounding:
                    found.setdefault(message.channel, []).append((sounding.pop(key), now, message.note))
                if message.type == "note_on" and message.velocity > 0:
                    sounding[key] = now
        for (channel, pitch), start in sounding.items():  # never ended
            found.setdefault(channel, []).append((start, now, pitch))
        if found:
            tracks.append(found)
        last = max(last, round(now * scale))
    if last > MOST_STEPS:
        raise ValueError(f"is {last} steps long, and at most {MOST_STEPS} are read")
    if not tracks:
        raise ValueError("has no notes")
    parts = [*tracks[0].values()] if len(tracks) == 1 else [[*chain(*track.values())] for track in tracks]
    found = [[Note(a := round(s * scale), max(round(e * scale), a + 1), p) for s, e, p in part] for part in parts]
    if voices == 1:
        found = [[note for part in found for note in part]]
    if len(found) != voices:
        raise ValueError(f"has {len(found)} part{'s' * (len(found) > 1)} with notes, and not {voices}")
    lines = sorted(map(top_line, found), key=lambda line: -sum(note.pitch for note in line) / len(line))
    steps = max(last, max(line[-1].end for line in lines))
    bar = metres or {4 * steps_per_quarter}
    size = int(next(iter(bar))) if len(bar) == 1 and float(next(iter(bar))).is_integer() else None
    return Score(np.stack([to_events(line, steps) for line in lines], 1), size, tempo or 120.0)


def trimmed(events: np.ndarray) -> np.ndarray:
    """Return events (S, V) without the silence at their end, up to the end of the last note."""
    ends = [to_notes(voice)[-1:] for voice in events.T]
    return events[: max((notes[0].end for notes in ends if notes), default=0)]
