"""Melodies: every event is a target once, windows begin at bar lines, and folders, JSON and scores are read as they are."""

import json
import zipfile

import numpy as np
import pytest
import torch

from genai.core.errors import UserError
from genai.data import melodies, scores
from genai.data.melodies import Melodies, Piece
from genai.modalities import midi
from genai.modalities.midi import HOLD, OFF
from tests.modalities.test_midi import file, notes

FACTS = {
    "low": None,
    "high": None,
    "transpose": 0,
    "bar": 8,
    "overlap": 16,
    "field": "tokens",
    "shape": [32],
    "classes": None,
    "levels": None,
    "batch_size": 4,
}


def piece(steps, voices=1, low=60, high=72, seed=0):
    random = np.random.default_rng(seed)
    events = random.choice([HOLD, HOLD, OFF, *range(low, high + 1)], (steps, voices)).astype(np.int16)
    events[0], events[1] = low, high
    return Piece(f"piece {seed}", midi.canonical(events))


def made(sizes=(7, 32, 33, 100), voices=1, **given):
    pieces = [piece(n, voices, seed=i) for i, n in enumerate(sizes)]
    return Melodies({"train": pieces, "val": pieces[:1], "test": pieces[1:]}, voices, **{**FACTS, **given}), pieces


@pytest.mark.parametrize(("voices", "overlap"), [(1, 0), (1, 16), (2, 16)])
def test_every_event_of_a_split_is_a_target_once_with_the_context_it_had(voices, overlap):
    data, pieces = made(voices=voices, overlap=overlap)
    split = data.splits["train"]
    batch = split.batch(torch.arange(len(split)), None)
    assert batch["tokens"].shape == batch["mask"].shape == (len(split), 33)
    assert not batch["mask"][:, 0].any()
    wanted = [token for p in pieces for token in data.modality.encode(p.events).tolist()]
    assert batch["tokens"][batch["mask"]].tolist() == wanted
    for row, k, start in zip(batch["tokens"], split.piece, split.window * (32 - overlap), strict=True):
        whole = torch.tensor([1, *data.modality.encode(pieces[k].events).tolist()])[start:][:33]
        assert torch.equal(row[: len(whole)], whole)
        assert (row[len(whole) :] == 0).all()


def test_draws_move_a_window_to_a_bar_line_and_its_pitches_within_the_range():
    data, pieces = made(sizes=(100,) * 4, transpose=5, low=57, high=74)
    split, n = data.splits["train"], 300
    draws = torch.rand(n, 4, generator=torch.Generator().manual_seed(0))
    batch = split.batch(torch.zeros(n, dtype=torch.int64), draws)
    again = split.batch(torch.zeros(n, dtype=torch.int64), draws)
    assert torch.equal(batch["tokens"], again["tokens"])
    own = torch.tensor([1, *data.modality.encode(pieces[0].events).tolist()])
    places, moves = set(), set()
    for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
        (found,) = {
            (start, move)
            for start in range(0, 100, 8)
            for move in range(-12, 13)
            if torch.equal(row[mask], (own + move * (own > 1))[start + 1 :][: len(row[mask])])
        }
        places.add(found[0])
        moves.add(found[1])
    assert places == {*range(0, 73, 8)}, "the last bar lines from which a window is full, and one with the end"
    assert moves == {*range(-3, 3)}, "60 to 72 within 57 to 74"
    pitched = batch["tokens"][batch["tokens"] > 1]
    assert (pitched.min(), pitched.max()) == (2, data.levels - 1)
    plain = data.splits["test"].batch(torch.tensor([0]), torch.rand(1, 4))
    assert torch.equal(plain["tokens"], data.splits["test"].batch(torch.tensor([0]), None)["tokens"])


def test_frames_are_events_without_what_they_cannot_tell():
    frames = [[60, 55], [60, 55], [62, -1], [-1, -1], [-1, 55]]
    assert scores.from_frames(frames, 2).tolist() == [[60, 55], [HOLD, HOLD], [62, OFF], [OFF, HOLD], [HOLD, 55]]


def jsb(folder, content):
    path = folder / "pieces.json"
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
    return path


def test_a_json_file_has_its_own_splits(tmp_path):
    frames = [[67, 60, 55, 48]] * 5 + [[69, 60, 57, 41]] * 7
    path = jsb(tmp_path, {"train": [frames] * 3, "valid": [frames], "test": [frames, frames]})
    data = melodies.json_file(str(path), "all", **{**FACTS, "overlap": 0})
    assert {name: split.targets for name, split in data.splits.items()} == {"train": 144, "val": 48, "test": 96}
    assert data.modality.state()["low"] == 41 and data.levels == 69 - 41 + 3
    batch = data.splits["val"].batch(torch.tensor([0]), None)
    assert data.modality.events(batch["tokens"][0, 1:])[[0, 5]].tolist() == [[67, 60, 55, 48], [69, HOLD, 57, 41]]
    soprano = melodies.json_file(str(path), "soprano", **FACTS)
    assert soprano.levels == 69 - 67 + 3 and soprano.splits["val"].targets == 12


def test_chorales_begin_at_bar_lines_with_their_upbeats_and_re_attacks():
    pytest.importorskip("music21")
    data = melodies.chorales("soprano", **{**FACTS, "bar": 16, "transpose": 5})
    sizes = {name: len(split.sizes) for name, split in data.splits.items()}
    assert sum(sizes.values()) > 350 and min(sizes.values()) > 20
    found = {chorale.name: chorale for chorale in scores.chorales(4)}
    first = found["bwv253"].events[:32]  # an upbeat, then Ach bleib bei uns, Herr Jesu Christ
    upbeat = {12: 73, 16: 73, 18: 74, 20: 76, 24: 73, 28: 69}
    assert {t: p for t, p in enumerate(first[:, 0].tolist()) if p != HOLD} == upbeat
    repeats = sum(int((np.diff([n.pitch for n in midi.to_notes(c.events[:, 0])]) == 0).sum()) for c in found.values())
    assert repeats > 3000, "a JSON of frames has none of these"
    beginnings = {}
    for name, split in data.splits.items():
        rows = split.batch((split.window == 0).nonzero()[:, 0], None)["tokens"]
        for row in rows:
            pitches = row[row > 1][:6]
            beginnings.setdefault(tuple(pitches.diff().tolist()), set()).add(name)
    shared = sum(len(names) > 1 for names in beginnings.values())
    assert shared < 0.1 * len(beginnings)


def test_chorales_are_read_once_and_a_damaged_cache_again(monkeypatch, tmp_path, capsys):
    pytest.importorskip("music21")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = []
    chorale = scores._chorale
    monkeypatch.setattr(
        scores,
        "_chorale",
        lambda path, steps: read.append(path) or (chorale(path, steps) if path.stem[-2:] == ".6" else None),
    )
    whole = scores.chorales(4)
    n = len(read)
    again = scores.chorales(4)
    assert len(read) == n and [c.name for c in again] == [c.name for c in whole]
    assert all(np.array_equal(a.events, b.events) and a.bar == b.bar for a, b in zip(whole, again, strict=True))
    (cached,) = (tmp_path / "genai" / "melodies").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(scores.chorales(4)) == len(whole) and "made again" in capsys.readouterr().out


def test_without_music21_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'^data=chorales needs the package music21: pip install "genai-lab\[audio\]", in a checkout'
    ):
        melodies.chorales("soprano", **FACTS)


def folder_of(root, names):
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tune = notes(*((60 + (k + i) % 12, 240 * i, 240 * (i + 1)) for i in range(12)))
        tempos = [("set_tempo", 0, {"tempo": 400_000}), ("set_tempo", 960, {"tempo": 800_000})]
        (root / name).write_bytes(file(tune, kind=0) if k % 2 else file(tempos, tune))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_trains_with_what_is_good_and_names_the_rest(tmp_path, capsys, zipped):
    """Files of type 0 and 1, changes of tempo, classes by folder, a unicode name; broken, silent and in another metre."""
    root = tmp_path / "tunes"
    folder_of(root, [f"{style}/{i}.mid" for style in ("jig", "réel") for i in range(12)])
    (root / "jig/broken.mid").write_bytes(b"MThd\0\0")
    (root / "jig/empty.mid").write_bytes(b"")
    (root / "jig/waltz.mid").write_bytes(
        file([("time_signature", 0, {"numerator": 3, "denominator": 4})], notes((60, 0, 9)))
    )
    (root / "readme.txt").write_text("no music")
    if zipped:
        with zipfile.ZipFile(tmp_path / "tunes.zip", "w") as archive:
            for path in root.rglob("*.*"):
                archive.write(path, path.relative_to(root))
        root = tmp_path / "tunes.zip"
    data = melodies.midi_folder(str(root), "soprano", **{**FACTS, "bar": 16})
    said = capsys.readouterr().err
    assert "skipped 3 of 27 files" in said
    assert (
        "jig/waltz.mid has bars of 12 steps, and not 16 (data.bar)" in said
        and "jig/broken.mid is not a MIDI file" in said
    )
    assert sum(len(split.sizes) for split in data.splits.values()) == 24
    assert data.class_names == ["jig", "réel"]
    batch = data.splits["train"].batch(torch.arange(4), None)
    assert batch["label"].shape == (4,) and (batch["tokens"][:, 1:25:2] > 1).all()


def test_four_voices_come_from_four_tracks(tmp_path):
    for k in range(6):
        parts = [notes((48 + 6 * v + k, 0, 480), (50 + 6 * v, 480, 960)) for v in range(4)]
        (tmp_path / f"{k}.mid").write_bytes(file(*parts))
    data = melodies.midi_folder(str(tmp_path), "all", **{**FACTS, "bar": 16, "shape": [64], "overlap": 0})
    assert data.modality.voices == 4 and data.splits["test"].targets == 32


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": [30]}, "data.shape=30 must be tokens of whole bars, a multiple of 8"),
        ({"overlap": 12}, "data.overlap=12 must be tokens of whole bars, a multiple of 8"),
        ({"overlap": 32}, "data.overlap=32 must be smaller than a window of 32 tokens"),
        ({"low": 62}, "piece 0 has pitches from 60 to 72, outside of data.low=62 and data.high=72"),
        ({"high": 70}, "piece 0 has pitches from 60 to 72, outside of data.low=60 and data.high=70"),
        ({"bar": 0}, "data.bar=0 must be a whole number, at least 1"),
        ({"transpose": 25}, "data.transpose=25 must be a whole number, at least 0 and at most 24"),
        ({"levels": 99}, "data.levels=99, but this data has 15"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, said):
    with pytest.raises(UserError, match=f"^{said}"):
        made(**given)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON of train, valid and test"),
        ([1], "is not JSON of train, valid and test"),
        ({"train": [[[60]]], "test": [[[60]]]}, "is not JSON of train, valid and test"),
        ({"train": [[[60], [60, 61]]], "valid": [], "test": []}, "is not JSON of train, valid and test"),
        ({"train": [[[200]]], "valid": [], "test": []}, "is not JSON of train, valid and test"),
        ({"train": [[[0.5]]], "valid": [], "test": []}, "is not JSON of train, valid and test"),
    ],
)
def test_a_file_that_is_no_json_of_pieces_is_refused(tmp_path, content, said):
    with pytest.raises(UserError, match=f"^data.path='.*' {said}"):
        melodies.json_file(str(jsb(tmp_path, content)), "soprano", **FACTS)


@pytest.mark.parametrize(
    ("frame", "voices", "said"),
    [
        ([60], "all", "is not JSON of .* a frame has 1 pitch, and not 4"),
        ([60, 59, 58, 57, 56], "all", "is not JSON of .* a frame has 5 pitches, and not 4"),
        ([-1] * 4, "all", "piece 0 of train has no notes"),
        ([-1, 60, 50, 40], "soprano", "piece 0 of train has no notes"),
    ],
)
def test_pieces_of_other_voices_or_none_are_refused(tmp_path, frame, voices, said):
    path = jsb(tmp_path, {name: [[frame] * 8] for name in ("train", "valid", "test")})
    with pytest.raises(UserError, match=said):
        melodies.json_file(str(path), voices, **{**FACTS, "overlap": 0})


def test_a_damaged_member_of_a_zip_is_skipped_and_named(tmp_path, capsys):
    """As a damaged file is: whatever zipfile raises."""
    with zipfile.ZipFile(tmp_path / "tunes.zip", "w") as archive:
        for part in ("train", "val", "test"):
            archive.writestr(f"{part}/tune.mid", file(notes((60, 0, 480), (62, 480, 960))))
        archive.writestr("train/broken.mid", file(notes((61, 0, 480))))
    path = tmp_path / "tunes.zip"
    content = path.read_bytes()
    path.write_bytes(content.replace(file(notes((61, 0, 480))), b"x" * len(file(notes((61, 0, 480))))))
    data = melodies.midi_folder(str(path), "soprano", **{**FACTS, "bar": 16})
    assert data.splits["train"].targets == 8
    assert "train/broken.mid" in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path):
    empty = jsb(tmp_path, {"train": [[[60]]], "valid": [], "test": []})
    with pytest.raises(UserError, match=r"^there are no pieces for the split val"):
        melodies.json_file(str(empty), "soprano", **FACTS)
    with pytest.raises(UserError, match=r"cannot be read .No such file"):
        melodies.json_file(str(tmp_path / "none.json"), "soprano", **FACTS)
    with pytest.raises(UserError, match="holds no MIDI files"):
        melodies.midi_folder(str(tmp_path), "soprano", **FACTS)
    with pytest.raises(UserError, match=r"^data.voices=alto must be soprano or all"):
        melodies.midi_folder(str(tmp_path), "alto", **FACTS)
