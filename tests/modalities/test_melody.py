"""Melodies as a modality: ids, prompts, files, pictures and sound."""

import math

import numpy as np
import pytest
import soundfile
import torch

from genai.core.errors import UserError
from genai.modalities import midi, synth
from genai.modalities.melody import Melody
from genai.modalities.midi import HOLD, OFF
from tests.modalities.test_midi import file, notes, voice

RANGE = Melody(60, 72)
TUNE = voice(16, s0=60, s4=60, s8=67, s12=OFF)


def theme(folder, events, name="theme.mid"):
    path = folder / name
    path.write_bytes(midi.write(events, 4, 90.0))
    return str(path)


@pytest.mark.parametrize("voices", [1, 4])
def test_ids_are_events_and_back(voices):
    melody = Melody(48, 72, voices)
    events = midi.canonical(
        np.random.default_rng(0).choice([HOLD, HOLD, OFF, 48, 60, 72], (24, voices)).astype(np.int16)
    )
    tokens = torch.from_numpy(melody.encode(events)).long()
    assert tokens.shape == (24 * voices,) and (tokens.min(), tokens.max()) == (0, melody.vocab_size - 1)
    assert np.array_equal(melody.events(tokens), events)
    assert len(melody.events(tokens[: 4 * voices - 1])) == 3
    assert vars(Melody.from_state(melody.state())) == vars(melody)


def test_prompts_follow_the_first_id_and_are_padded_on_the_left(tmp_path):
    empty = RANGE.condition({}, 2)
    assert (
        empty["tokens"].tolist() == [[1], [1]] and empty["pad"].tolist() == [0, 0] and empty["lead"].tolist() == [1, 1]
    )
    short = theme(tmp_path, voice(4, s0=62, s3=64), "short.mid")
    cond = RANGE.condition({"prompt": [theme(tmp_path, TUNE), short]}, 3)
    assert cond["pad"].tolist() == [0, 8, 0] and cond["tokens"].shape == (3, 13)
    assert cond["tokens"][0].tolist() == [1, 2, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0, 0], "without the silence at its end"
    assert cond["tokens"][1, 8:].tolist() == [1, 4, 0, 0, 6]


def test_a_prompt_outside_the_range_is_moved_into_it_and_its_melody_back(tmp_path, capsys):
    high = theme(tmp_path, voice(8, s0=80, s4=84))
    cond = RANGE.condition({"prompt": high}, 1)
    assert cond["tokens"][0].tolist() == [1, 10, 0, 0, 0, 14, 0, 0, 0]
    assert "moved by -12 semitones" in capsys.readouterr().err
    batch = {"tokens": torch.tensor([[2, 0, 0, 0, 14, 0, 0, 0]]), "seeds": torch.tensor([3])}
    RANGE.write(tmp_path / "out", batch, ["seed_000003"], {"prompt": high}, None)
    found = midi.read((tmp_path / "out" / "seed_000003.mid").read_bytes(), 1, 4).events
    assert np.array_equal(found, voice(16, s0=80, s4=84, s8=72, s12=84))


def test_samples_are_written_as_midi_sound_and_piano_roll(tmp_path):
    melody = Melody(48, 72, 2, tempo=120)
    rows = torch.randint(0, melody.vocab_size, (3, 64), generator=torch.Generator().manual_seed(0))
    names = [f"seed_{i:06d}" for i in range(3)]
    written = melody.write(tmp_path, {"tokens": rows, "seeds": torch.arange(3)}, names, {}, None)
    assert written == ["seed_000000.mid", "grid.png", "grid.wav", "samples.npz"]
    for row, name in zip(rows, names, strict=True):
        found = midi.read((tmp_path / f"{name}.mid").read_bytes(), 2, 4)
        assert np.array_equal(np.sort(found.events, 1), np.sort(melody.events(row), 1))
        assert round(found.tempo) == 120
        wave, sr_hz = soundfile.read(tmp_path / f"{name}.wav")
        assert sr_hz == synth.SR_HZ and len(wave) == (32 / 8 + synth.TAIL_SECONDS) * sr_hz
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["samples"], rows.numpy())


def test_a_piano_roll_has_each_note_at_its_pitch_and_step():
    picture = RANGE.roll([TUNE])
    low, high = 59, 68  # a row above and below the notes
    assert picture.shape == (3, (high - low + 1) * 4 + 6, 16 * 4 + 6) and picture.dtype == torch.uint8
    first, rest = picture[:, (high - 60) * 4, 0], picture[:, (high - 60) * 4, 4]
    assert not torch.equal(first, rest)
    row = picture[:, (high - 60) * 4]
    assert torch.equal(row[:, 16], first), "struck again"
    assert torch.equal(picture[:, (high - 67) * 4, 32], first) and not torch.equal(row[:, 36], rest)


def test_a_note_sounds_at_its_frequency_while_it_lasts():
    wave = synth.render(voice(16, s4=69, s8=OFF), 4, 60)  # 440 Hz from 1 s to 2 s
    sr = synth.SR_HZ
    assert wave.dtype == np.float32 and np.abs(wave).max() == pytest.approx(0.8)
    assert np.abs(wave[:sr]).max() == 0 and np.abs(wave[int(2.1 * sr) :]).max() < 1e-6
    spectrum = np.abs(np.fft.rfft(wave[sr : 2 * sr]))
    assert spectrum.argmax() == 440
    assert not synth.render(voice(16), 4, 60).any()


def test_a_struck_note_is_heard_twice():
    once, twice = (synth.render(events, 4, 60) for events in (voice(16, s0=69), voice(16, s0=69, s8=69)))
    at = 2 * synth.SR_HZ
    loud = [np.abs(wave[at + 400 : at + 2000]).max() for wave in (once, twice)]
    assert loud[1] > 2 * loud[0]


def test_the_likelihood_is_that_of_all_voices_of_a_step():
    nats = torch.full((3,), 64 * math.log(2)).double()
    assert Melody(60, 72, 4).units(nats, 3 * 64, None, [64], 15)["nats_per_step"] == round(4 * math.log(2), 4)
    assert Melody(60, 72).units(nats, None, None, [64], 15)["steps"] == 192


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read .No such file or directory.: name a MIDI file with prompt="),
        (b"RIFF", "is not a MIDI file"),
        (file(notes((60, 0, 480)))[:-5], "is not a MIDI file"),
        (file([]), "has no notes: name another file with prompt="),
        (
            file(notes((50, 0, 480), (70, 480, 960))),
            "has pitches from 50 to 70, which no transposition brings into the range of this model, 60 to 72",
        ),
    ],
)
def test_prompts_that_cannot_be_are_refused(tmp_path, content, said):
    path = tmp_path / "theme.mid"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^prompt={path} {said}"):
        RANGE.condition({"prompt": str(path)}, 1)


def test_a_prompt_of_another_number_of_voices_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has 1 part with notes, and not 4: name another file"):
        Melody(60, 72, 4).condition({"prompt": theme(tmp_path, TUNE)}, 1)
    with pytest.raises(UserError, match=r"^prompt=\[\] is empty"):
        RANGE.condition({"prompt": []}, 1)


@pytest.mark.parametrize(
    "state",
    [{"low": -1}, {"high": 128}, {"low": 73}, {"low": 60.0}, {"voices": 9}, {"steps_per_quarter": 5}, {"tempo": 0}],
    ids=str,
)
def test_a_state_from_anybodys_file_is_checked(state):
    with pytest.raises(UserError, match=r"^a melody has "):
        Melody.from_state({**RANGE.state(), **state})


def test_a_note_is_made_only_as_long_as_it_is_heard(monkeypatch):
    """A held note takes no more memory than it has sound; what is left out is less than a step of 16 bits."""
    lengths, tone = [], synth.tone
    monkeypatch.setattr(
        synth, "tone", lambda pitch, samples, sr_hz: lengths.append(samples) or tone(pitch, samples, sr_hz)
    )
    wave = synth.render(voice(120, s0=36), 4, 60, 4000)  # 30 s
    assert lengths == [synth.AUDIBLE_SECONDS * 4000] and len(wave) == (30 + synth.TAIL_SECONDS) * 4000
    whole = tone(36, 30 * 4000, 4000)
    whole = whole * synth.PEAK / np.abs(whole).max()
    assert np.abs(wave[: len(whole)] - whole[: len(wave)]).max() < 2**-16
