"""Benchmarks for a GPU: each command of each call is understood, failures are kept, and a repeated call continues.

Also the parts of other benchmarks that are not calls of the package.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import common, completion, gpu, training
from genai.cli import compose_config

PARTS = {name: part for call in gpu.CALLS.values() for name, part in call.items() if name != "tests"}


@pytest.mark.parametrize("toy", [False, True])
def test_the_arguments_of_every_part_are_understood(toy, monkeypatch):
    for _, module, *arguments in (part.arguments for part in PARTS.values()):
        monkeypatch.setattr(sys, "argv", [module, *arguments, *(["--toy"] if toy else [])])
        assert importlib.import_module(module).arguments().toy == toy


@pytest.mark.parametrize("toy", [False, True])
def test_the_trainings_compose(toy, tmp_path):
    for experiment in training.RECIPES:
        cfg = compose_config("train", training.overrides(experiment, "cifar.zip", "text.txt", toy, tmp_path))
        assert "cifar.zip" in str(cfg.data) or cfg.data.path == "text.txt"
        assert (cfg.max_steps == 2) == toy


def test_calls_keep_failures_and_go_on_where_they_were(tmp_path, monkeypatch):
    flag = tmp_path / "mended"
    script = f"import os, pathlib, sys; pathlib.Path(os.environ['{common.PART}']).write_text('{{\"rows\": [1]}}')"
    broken = (
        f"import pathlib; print(pathlib.Path.cwd() / 'almost'); assert pathlib.Path({str(flag)!r}).exists(), 'broken'"
    )
    slow = "import time; print('begun', flush=True); time.sleep(60)"
    parts = {"broken": gpu.Part(("-c", broken)), "well": gpu.Part(("-c", script)), "slow": gpu.Part(("-c", slow), 6)}
    monkeypatch.setitem(gpu.CALLS, "1", parts)
    monkeypatch.setenv("COMMIT", "abc")

    assert not gpu.call("1", "A Card (80GB)", tmp_path, False, {})
    path = tmp_path / "gpu_a_card_80gb.json"
    found = json.loads(path.read_text())
    assert found["card"] == "A Card (80GB)"
    assert found["parts"]["well"]["figures"] == {"rows": [1]}
    assert found["parts"]["broken"]["error"][0] == "almost"  # without this machine's folders
    assert "broken" in found["parts"]["broken"]["error"][-1]
    assert found["parts"]["slow"]["error"] == ["begun", "stopped after 6 s"]
    assert {entry["commit"] for entry in found["parts"].values()} == {"abc"}

    flag.touch()
    parts["slow"] = gpu.Part(("-c", "print('done')"))
    parts["new"] = gpu.Part(("-c", "print('new')"))
    assert gpu.order("1", found["parts"], gpu.versions()) == ["new", "broken", "slow"]
    assert gpu.call("1", "A Card (80GB)", tmp_path, False, {})
    again = json.loads(path.read_text())["parts"]
    assert again["well"] == found["parts"]["well"]
    assert again["slow"]["figures"] == {"summary": "done"}
    assert gpu.order("1", again, gpu.versions()) == []
    monkeypatch.setenv("COMMIT", "def")
    assert len(gpu.order("1", again, gpu.versions())) == 4


def test_what_does_not_fit_in_a_call_is_left_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.CALLS, "1", {"one": gpu.Part(("-c", "print(1)"))})
    assert not gpu.call("1", "card", tmp_path, False, {}, limit=10)
    assert list(tmp_path.iterdir()) == []


def test_recorded_figures_are_of_parts_and_of_the_card_that_names_the_file():
    for path in common.RESULTS.glob("gpu_*.json"):
        content = json.loads(path.read_text())
        assert path.name == f"gpu_{gpu.slug(content['card'])}.json"
        for name, entry in content["parts"].items():
            assert name == "tests" or name in PARTS
            assert {"command", "commit", "date", "torch", "triton", "seconds"} <= entry.keys()
            assert ("figures" in entry) != ("error" in entry)


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path):
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for k in range(20):
                image = Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8))
                image.save(tmp_path / "images" / split / label / f"{k}.png")
    text = Path(tmp_path, "text.txt")
    text.write_text("To be, or not to be, that is the question.\n" * 50)
    env = {"CIFAR10": str(tmp_path / "images"), "SHAKESPEARE": str(text)}
    well = {name: gpu.call(name, "cpu", tmp_path, True, env, limit=3000) for name in gpu.CALLS}
    assert all(well.values()), json.loads((tmp_path / "gpu_cpu.json").read_text())
    parts = json.loads((tmp_path / "gpu_cpu.json").read_text())["parts"]
    assert parts.keys() == {"tests", *PARTS}
    assert parts["training_gpt_shakespeare"]["figures"]["rows"][0]["val/loss"] > 0


def test_a_lower_half_is_that_of_the_training_image_whose_upper_half_is_nearest():
    train = torch.tensor([[0.0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7]]).view(3, 1, 4, 1)
    images = torch.tensor([[0.9, 1.2, 0, 0], [1.8, 2, 0, 0]]).view(2, 1, 4, 1)
    found = completion.fill(images, train).flatten(1)
    assert torch.equal(found, torch.tensor([[0.9, 1.2, 6, 6], [1.8, 2, 7, 7]]))
    each = completion.fill_each(images, torch.tensor([1, 0]), train, torch.tensor([1, 0, 0])).flatten(1)
    assert torch.equal(each, torch.tensor([[0.9, 1.2, 5, 5], [1.8, 2, 7, 7]]))


@pytest.mark.parametrize(("given", "error"), [("1 2", None), ("1", None), ("1 2 3", "has 3 weights for 2 runs")])
def test_runs_share_a_weight_or_have_one_each(given, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["completion", "one", "two", "--guidance", *given.split()])
    if error is None:
        assert completion.arguments().run == ["one", "two"]
    else:
        with pytest.raises(SystemExit, match="2"):
            completion.arguments()
        assert error in capsys.readouterr().err
