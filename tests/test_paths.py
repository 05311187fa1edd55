"""Paths are taken as they were typed, and live on in a stored config, a resumed run, a job of a sweep and a class's name."""

import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import genai
from genai import sampling
from genai.cli import PATHS, compose_config, parse_override, prepare_sampling, prepare_training, quote_override
from genai.sweeps.search import Basic, Settings, literal
from genai.train.run import run
from tests.conftest import ROOT

ODD = [
    "photos (1)",
    "photos[1]",
    "[1] photos",
    "{a: b}",
    "фотографии",
    "照片",
    "été",
    "lr=0.1",
    "it's",
    "'it",
    'say "hi"',
    "a&b",
    "a,b",
    "a:b",
    "a;b|c",
    "#1",
    "100%",
    "$HOME",
    "a$",
    "back\\slash",
    "back\\",
    'back\\"',
    " spaces ",
    "true",
    "1e3",
    "5",
    "nan",
    "choice(a,b)",
    "C:\\runs\\x",
    "a*?b",
    "!@^`",
]


def test_a_path_is_what_was_typed():
    for name in ODD:
        once = quote_override(f"run_dir={name}")
        assert quote_override(once) == once
        assert OmegaConf.create({"run_dir": parse_override(once).value()}).run_dir == name
    for name in (ODD[0], ODD[-8], "it's [1], {a: b} \\", "照片 = фото"):
        cfg = compose_config(
            "train", ["data=image_folder", f"data.root={name}", f"run_dir={name}/x", f"++resume={name}"]
        )
        assert (cfg.data.root, cfg.run_dir, cfg.resume) == (name, f"{name}/x", name)
    assert compose_config("sample", [f"out=runs/{ODD[1]}/x"]).out == f"runs/{ODD[1]}/x"


def test_quotes_of_ones_own_null_and_references_keep_their_meaning():
    assert compose_config("train", ["run_dir='a, b'"]).run_dir == "a, b"
    assert compose_config("train", ['run_dir="a, b"']).run_dir == "a, b"
    assert compose_config("train", ["run_dir=null"]).run_dir is None
    assert compose_config("train", ["name=x", "run_dir=runs/${name}/1"]).run_dir == "runs/x/1"
    assert compose_config("train", ["name=it's (new), 2"]).name == "it's (new), 2"


def test_a_tilde_is_the_home_folder_wherever_it_was_written(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in ("~/x y", '"~/x y"', "'~/x y'"):
        assert compose_config("train", [f"run_dir={typed}"]).run_dir == f"{tmp_path}/x y"
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(
        (ROOT / "conf" / "data" / "image_folder.yaml").read_text().replace("root: data", "root: ~/photos")
    )
    assert compose_config("train", ["data=mine"], config_dir=str(tmp_path / "conf")).data.root == f"{tmp_path}/photos"


def test_every_key_of_a_path_is_known_as_one():
    words = {"root", "path", "dir", "ckpt", "cache", "file", "folder", "weights", "draft", "resume"}
    for file in (ROOT / "conf").rglob("*.yaml"):
        for key in re.findall(r"^\s*(\w+):", file.read_text(), re.MULTILINE):
            is_path = key == "out" or key.split("_")[-1] in words
            assert not is_path or key in (*PATHS, "dir"), f"{key} of {file}"  # dir is Hydra's


def test_a_sweep_over_paths():
    typed = "data.root=photos (1),[2],'a, b',~/x"
    parsed = [parse_override(quote_override(line, sweep=True)) for line in ("data=image_folder", typed)]
    found = []
    Basic(Settings("x"), parsed, lambda job: found.append(compose_config("train", job).data.root))
    assert found == ["photos (1)", "[2]", "a, b", str(Path.home() / "x")]
    assert parse_override(quote_override("init_from=choice(a,b)", sweep=True)).is_choice_sweep()
    assert [parse_override(f"init_from={literal(name)}").value() for name in ODD] == ODD


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of odd names, with images of classes that look like other values."""
    folder = tmp_path_factory.mktemp("odd") / "it's (1) & [2], lr=0.1 фото 照片"
    for i, name in enumerate(["true", "1e3", "7"]):
        (folder / name).mkdir(parents=True)
        for k in range(20):
            Image.fromarray(np.full((8, 8), 10 * i + k, np.uint8)).save(folder / name / f"{k}.png")
    return folder


def test_odd_folders_train_resume_and_sample(odd):
    tiny = ["debug=true", "model.net.channels=8", "model.schedule.steps=10", "sampler.steps=2", "data.num_workers=0"]
    folder = odd.parent / "прогон [1], 'x' = {y}"
    made = run(compose_config("train", [*tiny, "data=image_folder", f"data.root={odd}", f"run_dir={folder}"]))
    assert made == folder and (folder / "checkpoints" / "last.ckpt").is_file()
    assert OmegaConf.load(folder / "config.yaml").data.root == str(odd)
    assert run(compose_config("train", [f"resume={folder}", "max_steps=6"], prepare_training)) == folder
    out = odd.parent / "out, (1)"
    cfg = compose_config(
        "sample", [f"ckpt={folder}", f"out={out}", "n=3", "label=[true,1e3,7]", "device=cpu"], prepare_sampling
    )
    sampling.run(cfg)
    loaded = genai.load(folder)
    assert loaded.step == 6 and loaded.conditions["label"].names == ["1e3", "7", "true"]
    assert np.load(out / "samples.npz")["labels"].tolist() == [2, 0, 1]
    assert genai.sample(loaded, 1, label=2)["label"].tolist() == [2]
    for typed, index in {"true": 2, "1e3": 0, "7": 1, "0": 0}.items():
        cfg = compose_config("sample", [f"ckpt={folder}", f"label={typed}"], prepare_sampling)
        assert sampling.conditions({"label": cfg.label}, 1, loaded)["label"].tolist() == [index]


def test_the_newest_run_of_a_folder(odd, capsys):
    from genai import checkpoint

    found = checkpoint.locate(str(odd.parent))[1]
    assert found == odd.parent / "прогон [1], 'x' = {y}" / "checkpoints" / "last.ckpt"
    assert "newest run: " in capsys.readouterr().out
    assert checkpoint.locate(str(found.parent))[1] == found
