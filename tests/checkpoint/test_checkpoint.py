"""Checkpoints are data: what is stored comes back, and nothing in one can run."""

import os
import pickle
import re
import subprocess
import sys

import pytest
import torch

import genai
from genai import checkpoint
from genai.core.errors import UserError
from tests.conftest import ROOT

DEBUG = ["debug=true", "model.net.channels=8", "model.schedule.steps=10", "sampler.steps=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished five-step run, trained in this process."""
    from genai.cli import compose_config
    from genai.train.run import run

    return run(compose_config("train", [*DEBUG, f"run_dir={tmp_path_factory.mktemp('debug') / 'run'}"]))


@pytest.fixture
def content(run):
    return checkpoint.read(run / "checkpoints" / "last.ckpt")


def tampered(content, tmp_path, **model):
    content["config"]["model"].update(model)
    checkpoint.save(content, tmp_path / "bad.ckpt")
    return tmp_path / "bad.ckpt"


def test_holds_tensors_and_plain_values_only(run):
    path = run / "checkpoints" / "last.ckpt"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    assert set(torch.load(path, weights_only=True)) == {
        "format",
        "rng_version",
        "step",
        "config",
        "modalities",
        "model",
        "ema",
        "trainer",
    }


def test_load_and_sample_in_python_equal_the_command_line(run, command, tmp_path):
    import numpy as np

    done = command("sample.py", f"ckpt={run}", "n=6", "seed=3", "label=7", "steps=4", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    written = np.load(tmp_path / "out" / "samples.npz")
    batch = genai.sample(genai.load(run), n=6, seed=3, label=7, steps=4)
    from genai.modalities.image import to_uint8

    assert np.array_equal(written["samples"], to_uint8(batch["image"]).numpy())
    assert written["labels"].tolist() == [7] * 6
    assert written["seeds"].tolist() == list(range(3, 9))
    assert written["rng_version"] == 1
    alone = genai.sample(genai.load(run / "checkpoints" / "last.ckpt"), n=1, seed=5, label="7", steps=4, batch_size=1)
    assert (alone["image"][0] - batch["image"][2]).abs().max() < 1e-4
    assert (tmp_path / "out" / "seed_000005_label_7.png").exists()


def test_ema_and_raw_weights_differ_and_both_load(run):
    ema, raw = genai.load(run), genai.load(run, weights="raw")
    stored = checkpoint.read(run / "checkpoints" / "last.ckpt")
    name = "net.stem.weight"
    assert torch.equal(ema.model.state_dict()[name], stored["ema"][name])
    assert torch.equal(raw.model.state_dict()[name], stored["model"][name])
    assert not torch.equal(stored["ema"][name], stored["model"][name])


def test_sampling_never_imports_lightning(run, tmp_path):
    script = (
        f"import sys; sys.argv = ['sample.py', 'ckpt={run}', 'n=2', 'steps=2', 'out={tmp_path / 'out'}']\n"
        "import runpy; runpy.run_path('sample.py', run_name='__main__')\n"
        "assert 'torch' in sys.modules and 'lightning' not in sys.modules and 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_payload_is_refused_and_does_not_run(tmp_path, content):
    torch.save({**content, "modalities": Payload(str(tmp_path / "ran"))}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        genai.load(tmp_path / "bad.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    with pytest.raises(UserError, match=r"cut off or not a checkpoint"):
        genai.load(tmp_path / "raw.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "genai.checkpoint.file.torch.load",
        "genai.models.diffusion.ddpm.torch.load",
        "genai.modalities.image.Path.write_text",
        "genai.train.folder.subprocess.run",
        "genai.checkpoint.save",
        "genai.models.diffusion.ddpm.UserError",
        "genai.models.diffusion.nets.unet.checkpoint",
        "genai.models.diffusion.ddpm.DDPM.forward",
        "genai.models.diffusion.ddpm.no_such_thing",
        "genai.models.no_such_module.DDPM",
        "genaievil.models.x",
        "subprocess",
        "",
        7,
    ],
)
def test_targets_that_are_not_what_they_say_are_refused(content, tmp_path, target):
    schedule = {"_target_": target, "command": f"mkdir {tmp_path / 'ran'}"}
    with pytest.raises(UserError, match=rf"wants to build {re.escape(str(target))}"):
        genai.load(tampered(content, tmp_path, schedule=schedule))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("${oc.env:HOME}", "is an interpolation"),
        (["a", {"b": "${oc.env:HOME}"}], "is an interpolation"),
        ({"_target_": "genai.models.diffusion.process.schedules.cosine", "_args_": [5]}, "has the key _args_"),
        ({"_recursive_": False}, "has the key _recursive_"),
    ],
)
def test_interpolations_and_positional_arguments_are_refused(content, tmp_path, node, message):
    with pytest.raises(UserError, match=message):
        genai.load(tampered(content, tmp_path, schedule=node))


def test_the_sampler_of_a_checkpoint_is_checked_too(content, tmp_path):
    content["config"]["sampler"]["_target_"] = "os.system"
    checkpoint.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"wants to build os\.system"):
        genai.sample(genai.load(tmp_path / "bad.ckpt"), n=1)


def test_a_foreign_package_is_named_with_the_key_that_admits_it(content, tmp_path):
    with pytest.raises(UserError, match="add trust=my_lab"):
        genai.load(tampered(content, tmp_path, schedule={"_target_": "my_lab.schedules.mine"}))


def test_weights_of_another_shape_are_refused_and_counted(content, tmp_path):
    content["model"]["net.stem.weight"] = torch.zeros(3, 3)
    checkpoint.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"1 weights differ, the first is net\.stem\.weight"):
        genai.load(tmp_path / "bad.ckpt", weights="raw")


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "x.ckpt").write_text("hello")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "y.ckpt")
    torch.save({"format": 99}, tmp_path / "z.ckpt")
    for name, message in {
        "x.ckpt": "cut off or not a checkpoint",
        "y.ckpt": "no format number",
        "z.ckpt": "format 99",
        "w.ckpt": "no checkpoint",
    }.items():
        with pytest.raises(UserError, match=message):
            checkpoint.read(tmp_path / name)
    with pytest.raises(UserError, match="no readable checkpoint"):
        genai.load(tmp_path)


def test_a_killed_save_leaves_the_old_file(content, tmp_path, monkeypatch):
    checkpoint.save({**content, "step": 1}, tmp_path / "last.ckpt")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot be written \(disk full\)"):
        checkpoint.save({**content, "step": 2}, tmp_path / "last.ckpt")
    assert checkpoint.read(tmp_path / "last.ckpt")["step"] == 1
