"""A user's old runs, small ones of every model as an earlier version wrote them: they still sample, score and go on as they did.

`old/runs_of_format_1.tar.xz` holds run directories, five steps each by train.py, and `expected_1.npz` what the version that wrote
them made of them: samples by seed, and the norm of every weight after two more steps. `models_of_format_1.*` are more of both;
`old/record.py`, which wrote them, says what is in them. None is ever written anew.
"""

import copy
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import genai
from genai import checkpoint
from genai.cli import compose_config, prepare_sampling, prepare_training
from genai.core.errors import UserError
from genai.core.stored import up_to_date
from genai.train.run import run
from tests.checkpoint.old import record

OLD = Path(__file__).parent / "old"
NAMES = [
    "autoencoder_adversarial",
    "biggan",
    "ddpm",
    "ddpm_levels",
    "ddpm_mlp",
    "dit",
    "edm",
    "first",
    "flow",
    "gan",
    "gpt",
    "gpt_digits",
    "latent",
    "stylegan2",
    "vae",
    "vqvae",
]
FIELDS = ("image", "vector", "tokens", "log_prob")


def unpack(folder: Path, name: str) -> None:
    """The run `name` and the first stage that one of them was trained on."""
    with tarfile.open(OLD / "runs_of_format_1.tar.xz") as archive:
        members = [m for m in archive.getmembers() if m.name.split("/")[0] in (name, "first")]
        archive.extractall(folder, members)


def samples(folder: Path) -> dict[str, np.ndarray]:
    batch = genai.sample(genai.load(folder), n=4, seed=3)
    return {name: batch[name].numpy() for name in FIELDS if name in batch}


def go_on(folder: Path) -> dict[str, float]:
    """Norms of all weights, live and averaged, after two more steps."""
    run(compose_config("train", [f"resume={folder}", "max_steps=7"], prepare_training))
    content = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    assert content["step"] == 7
    weights = {f"{part}.{k}": v for part in ("model", "ema") for k, v in content[part].items()}
    return {k: v.double().norm().item() for k, v in weights.items() if v.is_floating_point()}


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_samples_and_goes_on_as_it_did(tmp_path, monkeypatch, name):
    unpack(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    with np.load(OLD / "expected_1.npz") as file:
        expected = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    for field, values in samples(Path(name)).items():
        np.testing.assert_allclose(values, expected.pop(field), atol=1e-4, err_msg=field)
    norms = go_on(Path(name))
    assert [*norms] == expected.pop("weights").tolist()
    if name != "gpt" or sys.version_info[:3] == (3, 11, 7):  # it learns Python's own documentation
        # a bias before a norm has a gradient of rounding alone, which another processor rounds otherwise and Adam makes steps of
        np.testing.assert_allclose(list(norms.values()), expected["norms"], rtol=2e-3, atol=2e-3)
    assert [*expected] == ["norms"]


# Bits of a float depend on the processor. Where it is the recorded one, with the same torch, nothing may differ; elsewhere
# numbers are as close as other vector units left them when they were recorded.
FORMATS = sorted(path.stem for path in OLD.glob("models_of_format_*.npz"))


class Recorded:
    """The figures of one archive by "run/key", and by how much other vector units change each of them."""

    def __init__(self, stem: str):
        with np.load(OLD / f"{stem}.npz") as file:
            self.values = {key: file[key] for key in file.files}
        self.same_machine = str(self.values.pop("machine")) == record.machine()
        spreads = [key for key in self.values if key.startswith("spread/")]
        self.spread = {key.removeprefix("spread/"): self.values.pop(key) for key in spreads}
        self.runs = sorted({key.partition("/")[0] for key in self.values})

    def differences(self, name: str, found: dict[str, np.ndarray]) -> dict[str, str]:
        """Return the keys of `found` that differ from the record of the run `name`, with the size of the difference."""
        wrong = {}
        for key, value in found.items():
            if f"{name}/{key}" not in self.values or (key.endswith(".bits") and not self.same_machine):
                continue
            before, spread = self.values[f"{name}/{key}"], self.spread[f"{name}/{key}"]
            same = value.shape == before.shape and value.dtype == before.dtype and np.array_equal(value, before)
            least = 1e-1 if key.endswith(".sums") else 2e-4  # of thousands of weights
            if not same and (self.same_machine or not close(value, before, spread, least)):
                number = value.shape == before.shape and value.dtype.kind == "f"
                wrong[key] = f"by {np.abs(value - before).max():.3g}" if number else f"{value} and was {before}"
        return wrong


EXPECTED = {stem: Recorded(stem) for stem in FORMATS}
QUICK = ("autoencoder", "dcgan_mnist", "ddpm", "edm", "flow", "gpt", "stylegan2", "vae")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder of all recorded runs for each archive; to go on with one, copy it."""
    folder = tmp_path_factory.mktemp("recorded")
    for stem in FORMATS:
        with tarfile.open(OLD / f"{stem}.tar.xz") as archive:
            archive.extractall(folder / stem)
    return folder


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        pytest.param(stem, name, marks=() if name in QUICK else pytest.mark.slow)
        for stem in FORMATS
        for name in EXPECTED[stem].runs
    ],
)
def test_what_a_recorded_run_makes_is_what_it_made(recorded, tmp_path, monkeypatch, stem, name):
    """Samples of every sampler, losses and likelihoods of a fixed batch, first weights, and all weights after five more steps."""
    plan = json.loads((recorded / stem / "plan.json").read_text())[name]
    record.copy(recorded / stem, tmp_path, [name, *plan["needs"]])
    monkeypatch.chdir(tmp_path)
    found = record.results(name, plan)
    keys = {key.partition("/")[2] for key in EXPECTED[stem].values if key.startswith(f"{name}/")}
    assert keys <= found.keys()
    assert EXPECTED[stem].differences(name, found) == {}


def close(value: np.ndarray, before: np.ndarray, spread: np.ndarray, least: float) -> bool:
    if value.shape != before.shape or before.dtype.kind != "f":
        return bool(np.isinf(spread).all())
    return bool((np.abs(value - before) <= least + 2e-3 * np.abs(before) + 10 * spread).all())


# What moves since a run was written


def into(target, renamed=(), **added):
    """A value of MOVED whose keys change: builds `target`, with keys `renamed` and those that it lacks `added`."""
    now = dict(renamed)
    return lambda node: {**added, **{now.get(key, key): value for key, value in node.items()}, "_target_": target}


def aged(node, moved):
    """A stored node as a version would have written it in which everything had another name, and samplers another key; notes in
    `moved` what MOVED has to say of that."""
    if isinstance(node, list):
        return [aged(value, moved) for value in node]
    if not isinstance(node, dict):
        return node
    old = {key: aged(value, moved) for key, value in node.items()}
    if "_target_" in node:
        target = node["_target_"]
        old["_target_"] = target.replace("genai.", "genai.attic.")
        moved[old["_target_"]] = target
        if "samplers" in target and "steps" in node:
            old["count"] = old.pop("steps")
            moved[old["_target_"]] = into(target, {"count": "steps"})
    return old


def age(folder, moved):
    """Let a run be one of such a version."""
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content |= {part: aged(content[part], moved) for part in ("config", "assets")}
    codec = content["config"].get("codec")
    if codec is not None:
        codec["sha256"] = checkpoint.digest(
            torch.load(Path(codec["ckpt"]) / "checkpoints" / "last.ckpt", weights_only=True)
        )
    torch.save(content, path)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(content["config"])))


@pytest.mark.parametrize("name", ["dit_captions", "gpt_names"])
def test_a_run_whose_every_target_has_moved_makes_what_it_made(recorded, tmp_path, monkeypatch, name):
    first = recorded / FORMATS[0]
    plan, moved = json.loads((first / "plan.json").read_text())[name], {}
    record.copy(first, tmp_path, [name, *plan["needs"]])
    monkeypatch.chdir(tmp_path)
    for run_ in (*plan["needs"], name):
        age(Path(run_), moved)
    plan = aged(plan, moved)
    assert len(moved) > 8
    with pytest.raises(UserError, match="attic"):
        genai.load(name)
    for target, now in moved.items():
        monkeypatch.setitem(checkpoint.MOVED, target, now)
    assert compose_config("sample", [f"ckpt={name}"], prepare_sampling).sampler._target_ in json.dumps(
        genai.load(name).config["sampler"]
    )
    found = record.results(name, plan)
    assert EXPECTED[FORMATS[0]].differences(name, found) == {}
    assert "attic" not in (tmp_path / name / "config.yaml").read_text()  # it went on under today's names
    assert "attic" not in json.dumps(torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)["config"])


def test_a_stored_node_is_brought_up_to_date_from_within(monkeypatch):
    moves = {
        "a.One": "a.Two",
        "a.Two": "b.Three",
        "b.Keys": into("b.Keys", {"old": "new"}, more=3),
        "a.Pair": into("b.Pair", less=1),
        "c.Ring": "c.Gnir",
        "c.Gnir": "c.Ring",
    }
    for target, now in moves.items():
        monkeypatch.setitem(checkpoint.MOVED, target, now)
    node = {
        "_target_": "a.Pair",
        "less": 2,
        "of": [{"_target_": "a.One", "_partial_": True}, {"_target_": "b.Keys", "old": 1}],
    }
    inner = [{"_target_": "b.Three", "_partial_": True}, {"_target_": "b.Keys", "new": 1, "more": 3}]
    before = copy.deepcopy(node)
    assert up_to_date(node) == {"_target_": "b.Pair", "less": 2, "of": inner}
    assert node == before
    assert up_to_date(up_to_date(node)) == up_to_date(node)
    assert up_to_date({"_target_": "c.Ring"})["_target_"] in ("c.Ring", "c.Gnir")  # and it ends
    for same in ({"_target_": ["a.One"]}, {"target": "a.One"}, "a.One", 3, None, {"_target_": "a.Other"}):
        assert up_to_date(same) == same


@pytest.mark.parametrize("now", ["os.system", "genai.checkpoint.save", "genai.models.nothing.Here", into("os.system")])
def test_what_a_target_has_become_is_checked_as_any_other(recorded, monkeypatch, now):
    monkeypatch.setitem(checkpoint.MOVED, "genai.models.diffusion.nets.unet.UNet", now)
    called = []
    monkeypatch.setattr("os.system", called.append)
    with pytest.raises(UserError, match=r"^the checkpoint wants to build ") as refused:
        genai.load(recorded / FORMATS[0] / "ddpm")
    assert "UNet" not in str(refused.value)
    assert called == []
