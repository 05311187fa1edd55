"""Folders of sounds as people have them: what can be read trains, the rest is counted and named."""

import shutil
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf

from genai.checkpoint.build import build_typed
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.data import audio_folder
from tests.conftest import ROOT


def data_of(root, name="audio_folder", **given):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml"))
    return build_typed({**node, "root": str(root), "sr_hz": 8000, "max_seconds": 0.05, "num_workers": 0, **given})


def tone(path, hz=440.0, sr_hz=8000, seconds=0.05, channels=1, amplitude=0.3, **given):
    """Write a sine; returns its samples, (T, C)."""
    at = np.arange(round(seconds * sr_hz)) / sr_hz
    x = amplitude * np.sin(2 * np.pi * hz * at)[:, None] * np.linspace(1, 0.5, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, x, sr_hz, **given)
    return x


def plain(root, n=12, **given):
    """A folder of n tones of two classes."""
    for i in range(n):
        tone(root / ("bell", "dog")[i % 2] / f"{i:02d}.wav", hz=200 + 50 * i, **given)
    return root


GOOD = {
    "stereo.wav": {"channels": 2},
    "eight.wav": {"subtype": "PCM_U8"},
    "deep.wav": {"subtype": "PCM_24"},
    "float.wav": {"subtype": "FLOAT"},
    "cd.wav": {"sr_hz": 44100},
    "compact.flac": {"sr_hz": 44100},
    "vorbis.ogg": {"sr_hz": 44100, "subtype": "VORBIS"},
    "layer three.mp3": {"sr_hz": 44100, "seconds": 0.2},
    "über 猫.wav": {},
}


def as_people_have_them(root):
    """A folder with sounds of every kind, and three files that are none."""
    plain(root)
    for name, given in GOOD.items():
        tone(root / "bell" / name, hz=300, **given)
    (root / "dog" / "empty.wav").write_bytes(b"")
    (root / "dog" / "text.wav").write_text("this is a text")
    tone(root / "dog" / "cut.wav", seconds=0.1)
    whole = (root / "dog" / "cut.wav").read_bytes()
    (root / "dog" / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("of the session")
    (root / "dog" / "dog.jpg").write_bytes(b"picture")
    return root


def by_name(data):
    """name -> (waveform (C, T), number of recorded samples, label) of every recording."""
    found = {}
    for part in data.splits.values():
        batch = part.batch(torch.arange(len(part)), None)
        inner = getattr(part, "split", part)
        items = inner.items[part.index] if inner is not part else inner.items
        for i, item in enumerate(items.tolist()):
            name = inner.waves.facts[item]["name"]
            found[name] = batch["audio"][i], int(batch["mask"][i].sum()), int(batch["label"][i])
    return found


def test_good_sounds_of_every_kind_are_read_and_the_others_counted_and_named(tmp_path, capsys):
    data = data_of(as_people_have_them(tmp_path / "sounds"), max_seconds=0.25)
    found = by_name(data)
    assert len(found) == 12 + len(GOOD) == sum(map(len, data.splits.values()))
    assert data.class_names == ["bell", "dog"] and data.shape == [1, 2000]
    for name, given in GOOD.items():
        wave, size, label = found[f"bell/{name}"]
        seconds = given.get("seconds", 0.05)
        assert label == 0
        assert abs(size - 8000 * seconds) < 1, name  # what an mp3 pads is taken away again
        assert not wave[:, size:].any()
        expected = 0.3 * np.sin(2 * np.pi * 300 * np.arange(size) / 8000)
        expected *= 0.75 if given.get("channels") == 2 else 1
        middle = slice(40, -40) if size > 200 else slice(None)
        lossy = name.endswith(("ogg", "mp3"))
        error = np.abs(wave[0, :size].numpy() - expected)[middle].max()
        assert error < (0.05 if lossy else 0.01 if given.get("subtype") == "PCM_U8" else 0.004), (name, error)
    said = capsys.readouterr().err
    assert "sounds: 21 recordings of 2 classes (17 train, 2 val, 2 test)" in said
    assert "skipped 3 of 24 files: " in said
    for name, why in {
        "dog/cut.wav": "is cut short",
        "dog/empty.wav": "is empty",
        "dog/text.wav": "cannot be read as sound (Format not recognised)",
    }.items():
        assert f"{name} {why}" in said
    assert "ignored: 1 .jpg, 1 texts" in said
    assert "4 resampled from 44100 Hz (data.sr_hz)" in said and "1 mixed to one channel (data.channels)" in said


@pytest.mark.parametrize("cut", ["compact.flac", "vorbis.ogg", "layer three.mp3", "deep.wav", "float.wav", "a.aiff"])
def test_a_file_that_is_cut_short_is_said_to_be_no_sound_or_half_of_one(tmp_path, cut):
    tone(tmp_path / cut, **{"seconds": 1.0, **GOOD.get(cut, {})})
    whole = (tmp_path / cut).read_bytes()
    assert audio_folder.sound.decode(tmp_path / cut).x.shape[1] > 100
    (tmp_path / cut).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^(is cut short|cannot be read as sound \(.*\))$"):
        audio_folder.sound.decode(tmp_path / cut)


def test_a_wave_that_was_written_to_a_pipe_is_whole(tmp_path):
    """Its header knows no length."""
    tone(tmp_path / "a.wav")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert audio_folder.sound.decode(tmp_path / "a.wav").x.shape == (1, 400)


def test_sixteen_bits_at_the_rate_of_the_data_are_kept_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        samples = rng.integers(-32768, 32768, (400, 2), dtype=np.int16)
        path = tmp_path / "sounds" / f"{i:02d}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, samples, 8000)
    data = data_of(tmp_path / "sounds", channels=2)
    assert data.shape == [2, 400] and data.classes is None and data.modality.state() == {"sr_hz": 8000, "channels": 2}
    part = data.splits["train"]
    for i, item in enumerate(part.items.tolist()):
        name = part.waves.facts[item]["name"]
        x = part.batch(torch.tensor([i]), None)["audio"][0]
        samples = soundfile.read(tmp_path / "sounds" / name, dtype="int16")[0]
        assert torch.equal(x, torch.from_numpy(samples.T.astype(np.float32) / 32768))


def test_a_file_of_one_channel_is_in_both_and_one_of_six_is_named(tmp_path, capsys):
    plain(tmp_path / "sounds")
    tone(tmp_path / "sounds" / "dog" / "cinema.wav", channels=6)
    found = by_name(data_of(tmp_path / "sounds", channels=2))
    assert torch.equal(*found["bell/00.wav"][0]) and found["bell/00.wav"][0].any()
    said = capsys.readouterr().err
    assert "dog/cinema.wav has 6 channels, which data.channels=1 would mix" in said
    assert "12 mono, the same in both channels (data.channels)" in said
    assert "dog/cinema.wav" in by_name(data_of(tmp_path / "sounds", channels=1))


def test_silence_clipping_and_copies_are_counted_and_named(tmp_path, capsys):
    root = plain(tmp_path / "sounds")
    tone(root / "dog" / "quiet.wav", amplitude=0.0009)
    tone(root / "dog" / "loud.wav", amplitude=1.5)
    for split in ("train", "val"):
        shutil.copytree(root / "dog", tmp_path / "split" / split / "dog")
        shutil.copytree(root / "bell", tmp_path / "split" / split / "bell")
    data_of(tmp_path / "split")
    said = capsys.readouterr().err
    assert "2 silent, below -60 dB throughout, such as train/dog/quiet.wav" in said
    assert "2 clipped: of train/dog/loud.wav 5" in said and "% of the samples are at full scale" in said
    assert "are exact copies of recordings in another split, such as" in said


def test_long_recordings_are_cut_by_the_draws_and_short_ones_are_masked(tmp_path, capsys):
    for i in range(12):
        path = tmp_path / "sounds" / f"{i:02d}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.arange(1000 if i % 2 else 100, dtype=np.int16), 8000)
    data = data_of(tmp_path / "sounds", crop_seconds=0.025)
    assert "6 of 12 recordings are longer than 0.05 s and are cut (data.max_seconds)" in capsys.readouterr().err
    part = data.splits["train"]
    n = len(part)
    assert part.augments
    index, draws = torch.arange(n), torch.zeros(n, 4)
    for draw, start in {0.0: 0, 0.5: 400, 1.0: 800}.items():
        draws[:, 0] = draw
        batch = part.batch(index, draws)
        for x, mask, size in zip(batch["audio"], batch["mask"], part.sizes.tolist(), strict=True):
            kept = min(size, 200)
            first = start if size == 1000 else 0
            assert mask.tolist() == [i < kept for i in range(400)]
            assert (x[0] * 32768).tolist() == [first + i if i < kept else 0 for i in range(400)]
    whole = data.splits["test"].batch(torch.arange(1), None)
    assert whole["mask"].sum() in (100, 400)


def test_the_longest_recording_gives_the_length_where_none_is_said(tmp_path):
    root = plain(tmp_path / "sounds")
    tone(root / "dog" / "long.wav", seconds=0.2)
    assert data_of(root, max_seconds=None).shape == [1, 1600]


def test_files_are_decoded_once_and_again_where_one_has_changed(tmp_path, monkeypatch, waits, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = plain(tmp_path / "sounds")
    decoding = f"decoding {root}, once"
    first = data_of(root)
    assert waits.count(decoding) == 1
    again = data_of(root)
    assert waits.count(decoding) == 1
    prints = [
        getattr(part, "split", part).fingerprint(quick=True) for data in (first, again) for part in data.splits.values()
    ]
    assert prints[:3] == prints[3:]
    data_of(root, sr_hz=4000), data_of(root, channels=2)
    assert waits.count(decoding) == 3
    tone(root / "dog" / "more.wav")
    assert len(by_name(data_of(root))) == 13
    assert waits.count(decoding) == 4
    for path in cache_folder("recordings").glob("*.int16"):
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="was cut short while it was in use"):
        first.splits["train"].batch(torch.arange(2), None)
    capsys.readouterr()
    assert len(by_name(data_of(root))) == 13
    assert "is damaged: it is made again" in capsys.readouterr().err
    shutil.move(root, tmp_path / "moved")
    data_of(tmp_path / "moved")
    assert f"decoding {tmp_path / 'moved'}, once" not in waits


def test_a_zip_means_the_same_as_its_folder(tmp_path):
    root = as_people_have_them(tmp_path / "sounds")
    with zipfile.ZipFile(tmp_path / "sounds.zip", "w") as archive:
        for path in sorted(root.rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path))
    packed, unpacked = by_name(data_of(tmp_path / "sounds.zip")), by_name(data_of(root))
    assert {name.removeprefix("sounds/") for name in packed} == set(unpacked)
    assert all(torch.equal(packed[f"sounds/{name}"][0], one[0]) for name, one in unpacked.items())


def test_a_rate_of_another_kind_is_resampled_or_named(tmp_path, monkeypatch, capsys):
    root = plain(tmp_path / "sounds")
    tone(root / "dog" / "odd.wav", sr_hz=44101)
    assert "dog/odd.wav" not in by_name(data_of(root))
    assert "dog/odd.wav has 44101 Hz, which is in no simple ratio to 8000 Hz" in capsys.readouterr().err
    (root / "dog" / "odd.wav").unlink()
    tone(root / "dog" / "cd.wav", sr_hz=44100)
    monkeypatch.setitem(__import__("sys").modules, "torchaudio.functional", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"^data\.sr_hz=8000 for recordings of 44100 Hz needs the package torchaudio: pip"
    ):
        data_of(root)
    (root / "dog" / "cd.wav").unlink()
    data_of(root)


def test_a_folder_that_is_mostly_no_sound_is_refused(tmp_path):
    root = plain(tmp_path / "sounds")
    for i in range(11):
        (root / "dog" / f"song{i}.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    with pytest.raises(
        UserError, match=r"^11 of the 23 files in data\.root=.* more than 1 %: dog/song0\.m4a cannot be r"
    ):
        data_of(root)


def test_a_folder_trains_and_its_codes_too(tmp_path):
    from genai.cli import compose_config
    from genai.train.run import run

    root = as_people_have_them(tmp_path / "sounds")
    small = [
        "debug=true",
        "model.net.transformer.layers=1",
        "data.num_workers=0",
        "data.audio.sr_hz=4000",
        "data.audio.max_seconds=0.01",
    ]
    chosen = ["model=gpt_nano", "data=audio_folder_codes", f"data.root={root}", f"run_dir={tmp_path / 'run'}"]
    folder = run(compose_config("train", [*chosen, *small]))
    config = OmegaConf.load(folder / "config.yaml")
    assert config.data.shape == [40] and config.model.length == 40 and config.data.classes == 2
    wave, sr_hz = soundfile.read(next((folder / "samples").glob("*.wav")))
    assert sr_hz == 4000 and len(wave) and np.isfinite(wave).all()
