"""Melodies from a new user's chair: a folder of MIDI files trains, is sampled and measured, and wrong commands say what to do."""

import json

import numpy as np
import pytest

from genai.cli import compose_config, prepare_evaluation, prepare_sampling
from genai.modalities import midi
from tests.data.test_melodies import folder_of
from tests.modalities.test_midi import file, notes, voice

DEBUG = ["debug=true", "logger=none", "model.width=16", "data.shape=[64]", "data.overlap=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tunes of two classes, themes to begin with, and a run trained on the tunes in this process."""
    from genai.train.run import run

    root = tmp_path_factory.mktemp("melodies")
    folder_of(root / "tunes", [f"{style}/{i}.mid" for style in ("jig", "reel") for i in range(16)])
    (root / "none").mkdir()
    (root / "broken.mid").write_bytes(b"RIFF")
    (root / "silent.mid").write_bytes(file([]))
    (root / "wide.mid").write_bytes(file(notes((40, 0, 480), (90, 480, 960))))
    (root / "theme.mid").write_bytes(midi.write(voice(16, s0=72, s4=76, s8=79, s12=midi.OFF), 4, 90.0))
    (root / "pieces.json").write_text(json.dumps({"train": [[[60], [62]]], "valid": [[[60]]]}))
    (root / "list.json").write_text("[1, 2]")
    data = ["model=melody_rnn", "data=midi_folder", f"data.root={root / 'tunes'}"]
    run(compose_config("train", [*data, *DEBUG, f"run_dir={root / 'run'}"]))
    return root


def test_a_folder_of_tunes_trains_is_sampled_and_measured(folder, tmp_path):
    from genai.evaluation.run import run as evaluate
    from genai.sampling import run as sample

    given = [
        f"ckpt={folder / 'run'}",
        "n=3",
        "max_new_tokens=16",
        f"prompt={folder / 'theme.mid'}",
        f"out={tmp_path / 'out'}",
    ]
    out = sample(compose_config("sample", given, prepare_sampling))
    names = {path.name for path in out.iterdir()}
    assert names == {
        "grid.png",
        "grid.wav",
        "samples.npz",
        *(f"seed_00000{i}.{kind}" for i in range(3) for kind in ("mid", "wav")),
    }
    for i in range(3):
        found = midi.read((out / f"seed_00000{i}.mid").read_bytes(), 1, 4).events
        assert len(found) == 12 + 16, "the theme without the silence at its end, and what follows"
        assert np.array_equal(found[:12], voice(12, s0=72, s4=76, s8=79)), (
            "in its own key, though the model's end at 71"
        )
    metrics = "metrics=[nats_per_step,pitch_range,repetition,out_of_key,melody_copy]"
    facts = evaluate(compose_config("evaluate", [f"ckpt={folder / 'run'}", metrics, "repeats=1"]))
    cards = {card["metric"]: card for card in facts["cards"]}
    assert facts["nats_per_step"] > 0 and facts["steps"] == 24 * 3 and facts["context"] == 64
    assert {*cards["nats_per_step"]["baselines"]} == {
        "interpolated 5-gram",
        "interpolated 5-gram with the place in 16",
        "last two onsets, time since and place in the bar",
    }
    assert cards["repetition"]["floor"] >= 0 and cards["melody_copy"]["floor"] > 2


TRAIN = {
    "data.root=nowhere": "data.root='nowhere' is neither a folder nor an intact zip file",
    "data.root=none": "data.root='none' holds no MIDI files: set data.root to a folder, or a zip of one, that does",
    "data.voices=alto": "data.voices=alto must be one of soprano, all",
    "data.voices=all": "holds no MIDI files",
    "data.bar=0": "data.bar=0 must be a whole number of steps, at least 1",
    "data.bar=12": "holds no MIDI files",
    "data.shape=null": "data.shape=null must be a list like [a] of 1 value, a whole number of tokens",
    "data.shape=[64,2]": "data.shape=[64, 2] must be a list like [a] of 1 value",
    "data.shape=[60]": "data.shape=60 must be tokens of whole bars, a multiple of 16",
    "data.overlap=64": "data.overlap=64 must be smaller than a window of 64 tokens",
    "data.low=200": "data.low=200 must be a whole number, at least 0 and at most 127, or null",
    "data.high=62": "has pitches from 60 to 71, outside of data.low=60 and data.high=62: set them to null",
    "data.transpose=30": "data.transpose=30 must be a whole number of semitones, at least 0 and at most 24",
    "model.attention=0": "model.attention=0 must be a whole number of outputs, at least 1",
    "data=digits": "a MelodyRNN takes tokens, but this data has image",
    "data=jsb data.path=nowhere.json": "data.path='nowhere.json' cannot be read (No such file or directory)",
    "data=jsb data.path=list.json": "data.path='list.json' is not JSON of train, valid and test",
    "data=jsb data.path=pieces.json": "data.path='pieces.json' is not JSON of train, valid and test",
}
SAMPLE = {
    "prompt=nowhere.mid": "prompt=nowhere.mid cannot be read (No such file or directory): name a MIDI file with prompt=",
    "prompt=broken.mid": "prompt=broken.mid is not a MIDI file",
    "prompt=silent.mid": "prompt=silent.mid has no notes: name another file with prompt=",
    "prompt=wide.mid": "prompt=wide.mid has pitches from 40 to 90, which no transposition brings into the range of this model",
    "prompt=[]": "prompt=[] must be a value or a list that is not empty",
    "stop=60": "stop='60' was given, but this model takes no text",
    "label=jig": "label=jig was given, but this model is unconditional",
    "image=theme.mid": "image",
}
BASELINES = {
    "baseline=logistic baseline.voices=3": "baseline.voices=3, but windows have 64 tokens",
    "baseline=onsets baseline.period=0": "baseline.period=0 must be",
}


def refusal(script, arguments, folder, monkeypatch):
    from genai.core.errors import UserError
    from genai.evaluation.baselines.run import run as baselines
    from genai.evaluation.run import run as evaluate
    from genai.sampling import run as sample
    from genai.train.run import run as train

    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as refused:
        cfg = compose_config(
            script, arguments, {"sample": prepare_sampling, "evaluate": prepare_evaluation}.get(script)
        )
        {"train": train, "sample": sample, "evaluate": evaluate, "baselines": baselines}[script](cfg)
    assert sorted(folder.rglob("*")) == before and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("argument", TRAIN)
def test_wrong_training_commands(folder, monkeypatch, argument):
    given = [
        "model=melody_rnn",
        *([] if "data=" in argument.split(".")[0] else ["data=midi_folder", "data.root=tunes"]),
    ]
    settings = ["debug=true", "logger=none"] if argument == "data=digits" else DEBUG
    given = [word for word in [*given, *settings] if word.split("=")[0] != argument.split("=")[0]]
    assert TRAIN[argument] in refusal("train", [*given, *argument.split()], folder, monkeypatch)


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(folder, monkeypatch, argument):
    assert SAMPLE[argument] in refusal("sample", ["ckpt=run", "n=2", argument], folder, monkeypatch)


@pytest.mark.parametrize("argument", BASELINES)
def test_wrong_baselines(folder, monkeypatch, argument):
    given = ["data=midi_folder", "data.root=tunes", "data.shape=[64]", "data.overlap=32"]
    assert BASELINES[argument] in refusal("baselines", [*given, *argument.split()], folder, monkeypatch)
