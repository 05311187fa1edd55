"""Events, notes and MIDI files: each is the other's inverse, and files of other programs are read by quarter notes."""

import io

import mido
import numpy as np
import pytest

from genai.modalities import midi
from genai.modalities.midi import HOLD, OFF, Note


def voice(steps, **events):
    found = np.full((steps, 1), HOLD, np.int16)
    for step, event in events.items():
        found[int(step[1:])] = event
    return found


def file(*tracks, ticks=480, kind=1):
    """A file of tracks of (message type, ticks since the one before, values) as bytes."""
    made = mido.MidiFile(type=kind, ticks_per_beat=ticks)
    for messages in tracks:
        track = mido.MidiTrack()
        for what, time, values in messages:
            kinds = mido.MetaMessage if what in ("set_tempo", "time_signature", "end_of_track") else mido.Message
            track.append(kinds(what, time=time, **values))
        made.tracks.append(track)
    content = io.BytesIO()
    made.save(file=content)
    return content.getvalue()


def notes(*given, channel=0):
    """Messages of (pitch, start, end) in ticks."""
    events = sorted(e for p, a, b in given for e in ((b, 0, p), (a, 1, p)))
    found, now = [], 0
    for at, on, pitch in events:
        found.append(("note_on", at - now, {"note": pitch, "velocity": 64 * on, "channel": channel}))  # or velocity 0
        now = at
    return found


RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("voices", [1, 4])
def test_what_is_written_is_read_back_equal(voices):
    """With re-attacks of one pitch, silence at both ends, and notes that last to the end."""
    for _ in range(20):
        events = RANDOM.choice([HOLD, HOLD, HOLD, OFF, 60, 60, 67], (40, voices)).astype(np.int16)
        events[8] = 60
        events = midi.canonical(events - 12 * np.arange(voices) * (events > 0))
        found = midi.read(midi.write(events, 4, 100.0), voices, 4)
        assert np.array_equal(found.events, events)
        assert (found.bar, round(found.tempo, 3)) == (16, 100.0)


def test_a_pitch_that_is_struck_again_is_two_notes():
    events = voice(12, s0=60, s4=60, s8=OFF)
    assert midi.to_notes(events[:, 0]) == [Note(0, 4, 60), Note(4, 8, 60)]
    assert np.array_equal(midi.to_events(midi.to_notes(events[:, 0]), 12), events[:, 0])
    assert np.array_equal(midi.trimmed(events), events[:8])
    twice = voice(12, s0=OFF, s2=60, s6=OFF, s8=OFF)
    assert np.array_equal(midi.canonical(twice), voice(12, s2=60, s6=OFF))


def test_the_top_line_is_the_highest_note_each_time():
    """A lower one does not end a higher one, and does not sound again when that ends."""
    heard = [Note(0, 8, 60), Note(2, 4, 67), Note(3, 9, 55), Note(4, 6, 64), Note(4, 5, 62), Note(10, 12, 50)]
    assert midi.top_line(heard) == [Note(0, 2, 60), Note(2, 4, 67), Note(4, 6, 64), Note(10, 12, 50)]


def test_changes_of_tempo_move_nothing_and_type_0_is_as_type_1():
    tune = notes((60, 0, 480), (62, 480, 720), (64, 720, 960))
    tempos = [("set_tempo", 0, {"tempo": 600_000}), ("set_tempo", 500, {"tempo": 300_000})]
    several = midi.read(file(tempos, tune), 1, 4)
    later = ("set_tempo", 0, tempos[1][2])
    alone = midi.read(file([tempos[0], *tune[:2], later, *tune[2:]], kind=0), 1, 4)
    assert np.array_equal(several.events, voice(8, s0=60, s4=62, s6=64))
    assert np.array_equal(alone.events, several.events)
    assert several.tempo == alone.tempo == 100


def test_a_tempo_of_no_time_is_none():
    tempos = [("set_tempo", 0, {"tempo": tempo}) for tempo in (0, 600_000)]
    assert midi.read(file(tempos, notes((60, 0, 480))), 1, 4).tempo == 100


def test_onsets_are_rounded_to_the_grid_and_drums_left_out():
    """A note shorter than a step is one long."""
    tune = notes((60, 5, 100), (62, 118, 125), (64, 245, 360))
    drums = notes((80, 0, 480), channel=9)
    assert np.array_equal(midi.read(file(tune, drums), 1, 4).events[:3], voice(3, s0=60, s1=62, s2=64))
    assert np.array_equal(midi.read(file(notes((60, 0, 96)), ticks=96), 1, 4).events, voice(4, s0=60))


def test_a_note_that_is_never_ended_lasts_to_the_end_of_its_track():
    content = file([*notes((60, 0, 480)), ("note_on", 0, {"note": 64}), ("end_of_track", 960, {})])
    assert np.array_equal(midi.read(content, 1, 4).events, voice(12, s0=60, s4=64))


def test_four_parts_are_tracks_or_the_channels_of_one():
    """The highest first, whatever their order in the file."""
    parts = [notes((48 + 5 * k, 0, 480), (50 + 5 * k, 480, 960), channel=k) for k in range(4)]
    one = sorted(
        [(at, m) for part in parts for at, m in zip(np.cumsum([t for _, t, _ in part]), part, strict=True)],
        key=lambda pair: pair[0],
    )
    times = np.diff([0, *(at for at, _ in one)])
    single = [(what, int(t), values) for t, (_, (what, _, values)) in zip(times, one, strict=True)]
    conductor = [("set_tempo", 0, {"tempo": 600_000})]
    for content in (file(*parts), file(single, kind=0), file(conductor, single)):
        assert midi.read(content, 4, 4).events[[0, 4]].tolist() == [[63, 58, 53, 48], [65, 60, 55, 50]]
    assert midi.read(file(*parts), 1, 4).events[[0, 4], 0].tolist() == [63, 65]


@pytest.mark.parametrize(
    ("metres", "bar"),
    [([(3, 4)], 12), ([(4, 4), (4, 4)], 16), ([(4, 4), (3, 4)], None), ([(6, 8)], 12), ([(1, 32)], None)],
)
def test_the_bar_is_that_of_the_metre_where_there_is_one(metres, bar):
    signs = [("time_signature", 0, {"numerator": a, "denominator": b}) for a, b in metres]
    assert midi.read(file(signs, notes((60, 0, 480))), 1, 4).bar == bar


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a MIDI file"),
        (b"MThd nothing of the kind", "is not a MIDI file"),
        (file(notes((60, 0, 480)))[:-9], "is not a MIDI file"),
        (file([]), "has no notes"),
        (file(notes((80, 0, 480), channel=9)), "has no notes"),
        (file(notes((60, 0, 480)), kind=2), "is a MIDI file of type 2 or in seconds"),
        (
            file(notes((60, 0, 480)), [("end_of_track", 480 * 2**17, {})]),
            "is 524288 steps long, and at most 32768 are read",
        ),
    ],
)
def test_files_that_cannot_be_read_say_why(content, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        midi.read(content, 1, 4)


def test_another_number_of_parts_is_said():
    with pytest.raises(ValueError, match=r"^has 2 parts with notes, and not 4"):
        midi.read(file(notes((60, 0, 480)), notes((50, 0, 480))), 4, 4)
