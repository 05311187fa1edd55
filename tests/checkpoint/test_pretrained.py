"""Another checkpoint as a part of a model: read when a run starts, then part of the run's own checkpoints."""

import copy
import shutil
import sys
from typing import Any

import pytest
import torch
from torch import nn

import genai
from genai import checkpoint
from genai.checkpoint import part, pretrained
from genai.checkpoint.build import build_stored
from genai.cli import compose_config, prepare_sampling, prepare_training
from genai.core.errors import UserError
from genai.core.stored import PRETRAINED, up_to_date
from genai.train.ema import EMA
from genai.train.run import run

LAB = '''
"""A student that learns to draw what a teacher decodes."""

import torch
from torch import nn

from genai.core import rng
from genai.core.protocols import batch_losses


class Student(nn.Module):
    def __init__(self, field, shape, teacher=None, dropout=0.1):
        super().__init__()
        self.field, self.shape, self.teacher = field, tuple(shape), teacher
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.LazyLinear(64), nn.Unflatten(1, self.shape))
        self.net(torch.zeros(1, *teacher.latent_shape))

    def nets(self):
        return {"net": self.net}

    def forward(self, batch, step):
        x = batch[self.field]
        z, _ = self.teacher.posterior(x)
        assert self.teacher.training == (self.training and not self.teacher.pretrained_from.frozen)
        return batch_losses((self.net(z) - x).square().mean(), {}, len(x))


class Hidden(Student):
    def __init__(self, field, shape, teacher=None):
        super().__init__(field, shape, teacher)
        del self.teacher
        self.hidden = [teacher]


def draw(model, seeds, cond=None, on_step=None):
    z = rng.normal(seeds, model.teacher.latent_shape)
    return {model.field: model.net(z) + model.teacher.decode(z)}
'''
TEACHER = ["model.teacher._target_=genai.checkpoint.pretrained"]
SMALL = ["data=digits", "logger=none", "data.batch_size=8", "callbacks.evaluate.n=16", "callbacks.samples.n=2"]


def train(*arguments):
    return run(compose_config("train", [*arguments], prepare_training))


def last(folder):
    return checkpoint.read(folder / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    nets = [f"model.{net}.{key}" for net in ("encoder", "decoder") for key in ("channels=4", "multipliers=[1,1]")]
    return train("model=autoencoder", *nets, *SMALL, "max_steps=4", f"run_dir={folder}")


@pytest.fixture
def student(tmp_path, monkeypatch, teacher):
    """Train a student of a copy of the teacher, `run` below the folder that is current now."""
    (tmp_path / "my_student.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_student", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "teacher")
    own = [
        "model._target_=my_student.Student",
        "sampler._target_=my_student.draw",
        *TEACHER,
        "model.teacher.ckpt=teacher",
    ]

    def of(*arguments, name="run", steps=4):
        return train(*own, *SMALL, f"max_steps={steps}", f"run_dir={tmp_path / name}", *arguments)

    return of


def of_teacher(weights):
    return {name.removeprefix("teacher."): t for name, t in weights.items() if name.startswith("teacher.")}


def test_a_teacher_of_ones_own_model_is_stored_once_and_its_run_no_longer_needed(student, tmp_path):
    folder, theirs = student(), last(tmp_path / "teacher")
    content, long = last(folder), student(name="long", steps=6)
    assert of_teacher(content["model"]).keys() == checkpoint.weights_of(theirs).keys()
    assert all(torch.equal(t, checkpoint.weights_of(theirs)[name]) for name, t in of_teacher(content["model"]).items())
    assert not of_teacher(content["ema"])
    node = content["config"]["model"]["teacher"]
    assert (node["sha256"], node["model"]) == (checkpoint.digest(theirs), theirs["config"]["model"])

    made = genai.sample(genai.load(folder, trust="my_student"), n=2)["image"]
    shutil.rmtree(tmp_path / "teacher")
    folder.rename("moved")
    with pytest.raises(UserError, match="add trust=my_student"):
        genai.load("moved")
    assert torch.equal(genai.sample(genai.load("moved", trust="my_student"), n=2)["image"], made)
    train("resume=moved", "max_steps=6", "trust=my_student")
    a, b = last(tmp_path / "moved"), last(long)
    for kind in ("model", "ema"):
        assert a[kind].keys() == b[kind].keys() and all(torch.equal(a[kind][k], b[kind][k]) for k in b[kind])


def test_frozen_is_neither_trained_nor_in_training_mode(student):
    def states(content):
        return len(content["trainer"]["optimizer_states"][0]["state"])

    frozen, trained = last(student()), last(student("model.teacher.frozen=false", name="tuned"))
    assert states(frozen) == 2  # weight and bias of the student's own layer
    assert states(trained) == 2 + sum(k.startswith("encoder.") for k in of_teacher(trained["ema"]))
    assert of_teacher(trained["ema"]).keys() == of_teacher(trained["model"]).keys()
    changed = [k for k, t in of_teacher(trained["model"]).items() if not torch.equal(t, of_teacher(frozen["model"])[k])]
    assert any(k.startswith("encoder.") for k in changed)


def test_a_frozen_part_stays_so_wherever_it_is_copied_to():
    part = pretrained(model=nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    whole: Any = nn.ModuleDict({"part": part, "net": nn.Linear(2, 2)})
    copies: Any = (whole, copy.deepcopy(whole), EMA(whole).module.train())
    for model in copies:
        model.train()
        assert not model["part"].training and not model["part"][1].training and model["net"].training
        model["part"][1].training = True
        model.train()
        assert not model["part"][1].training, "of the copy itself"
    whole["part"](torch.ones(2, 2, requires_grad=True)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in part.parameters())
    assert pretrained(model=nn.Dropout().eval(), frozen=False).train().training


def test_the_trained_weights_or_their_average(student, tmp_path):
    theirs = last(tmp_path / "teacher")
    raw, ema = (of_teacher(last(student(f"model.teacher.weights={w}", name=w))["model"]) for w in ("raw", "ema"))
    assert any(not torch.equal(raw[k], ema[k]) for k in raw)
    assert all(torch.equal(raw[k], theirs["model"][k]) for k in raw)
    changed = {**theirs, "model": {k: t + 1 for k, t in theirs["model"].items()}}
    assert checkpoint.digest(changed) == checkpoint.digest(theirs)
    assert checkpoint.digest(changed, "raw") != checkpoint.digest(theirs, "raw") != checkpoint.digest(theirs)
    with pytest.raises(UserError, match=r"model.teacher.weights='best' must be one of ema, raw"):
        student("model.teacher.weights=best", name="best")
    with pytest.raises(UserError, match=r"model.teacher.frozen=3 must be true or false"):
        student("model.teacher.frozen=3", name="best")
    with pytest.raises(UserError, match=r"genai.checkpoint.pretrained has no ckpt: name the run or checkpoint"):
        student("model.teacher.ckpt=null", name="best")


def test_what_is_no_longer_what_it_was_is_refused(student, tmp_path):
    folder, wrong = student(), "0" * 64
    with pytest.raises(
        UserError, match=r"model.teacher.ckpt=teacher has changed: .* and model.teacher.sha256 says 0{16}"
    ):
        student(f"model.teacher.sha256={wrong}", name="other")
    assert not (tmp_path / "other").exists()
    sha256 = last(folder)["config"]["model"]["teacher"]["sha256"]
    student(f"model.teacher.sha256={sha256}", name="same", steps=1)
    with pytest.raises(UserError, match=r"model.teacher: there is no checkpoint nowhere: name a run"):
        student("model.teacher.ckpt=nowhere", name="other")
    with pytest.raises(UserError, match=r"model.teacher must be a submodule of this model"):
        student("model._target_=my_student.Hidden", name="other")
    for path in (tmp_path / "teacher" / "checkpoints").iterdir():
        content = checkpoint.read(path)
        next(iter(content["ema"].values())).add_(1e-3)
        checkpoint.save({k: v for k, v in content.items() if k not in ("format", "rng_version")}, path)
    with pytest.raises(UserError, match=r"model.teacher.ckpt=teacher has changed"):
        train(f"resume={folder}", "max_steps=5", "trust=my_student")


def test_a_run_without_a_checkpoint_yet_reads_its_part_again(student, tmp_path):
    folder = student()
    before = last(folder)["model"]
    shutil.rmtree(folder / "checkpoints")
    (tmp_path / "teacher").rename("elsewhere")
    with pytest.raises(UserError, match="there is no checkpoint teacher"):
        train(f"resume={folder}", "trust=my_student")
    train(f"resume={folder}", "trust=my_student", "model.teacher.ckpt=elsewhere")
    assert all(torch.equal(before[name], tensor) for name, tensor in last(folder)["model"].items())


def test_old_weights_are_those_of_all_but_frozen_parts(student, tmp_path):
    folder = student("model.teacher.weights=raw")
    begun = student(f"init_from={folder}", "optim.lr=1e-30", name="begun", steps=1)
    a, b = last(folder), last(begun)
    assert all(
        torch.allclose(b["model"][k], checkpoint.weights_of(a)[k], atol=1e-6)
        for k in b["model"]
        if k.startswith("net.")
    )
    theirs = checkpoint.weights_of(last(tmp_path / "teacher"))
    assert all(torch.equal(t, theirs[name]) for name, t in of_teacher(b["model"]).items())
    shutil.rmtree(folder)
    train(f"resume={begun}", "max_steps=2", "trust=my_student")


def test_every_other_checkpoint_is_read_by_one_function(teacher, tmp_path, monkeypatch):
    read = []
    for module in (checkpoint, part):
        monkeypatch.setattr(module, "adopt", lambda *given, real=module.adopt: read.append(given[1]) or real(*given))
    latents = [
        "model=latent",
        "model.net.channels=4",
        "model.net.multipliers=[1]",
        "sampler.steps=2",
        "max_steps=1",
        *SMALL,
    ]
    given = [f"codec.ckpt={teacher}", "model.latent.codec.weights=raw", f"run_dir={tmp_path / 'latent'}"]
    latent = train(*latents, *given)
    config = last(latent)["config"]
    assert read == ["codec"] and config["codec"]["sha256"] == config["model"]["latent"]["codec"]["sha256"]
    first_stage: Any = genai.load(latent).model.codec
    assert first_stage.pretrained_from == (config["codec"]["sha256"], "raw", True, None)
    text, tiny = tmp_path / "text.txt", ["model.net.transformer.layers=1", "model.net.transformer.width=16"]
    text.write_text("the rain in spain, " * 99)
    given = [
        "data=text_file",
        f"data.path={text}",
        "data.shape=[16]",
        "model=gpt_nano",
        "max_steps=1",
        "logger=none",
        *tiny,
    ]
    gpt = train(*given, "callbacks.samples.n=1", "callbacks.evaluate.n=8", f"run_dir={tmp_path / 'gpt'}")
    node = {"_target_": "genai.models.autoregressive.speculative.speculative", "_partial_": True, "max_new_tokens": 2}
    loaded = genai.load(gpt)
    a = genai.sample(loaded, n=2, sampler={**node, "draft": str(gpt)})
    b = genai.sample(
        loaded, n=2, sampler={**node, "draft": {"_target_": PRETRAINED, "ckpt": str(gpt), "weights": "raw"}}
    )
    assert read == ["codec", "draft", "draft"] and torch.equal(a["tokens"], b["tokens"])
    for key, path, message in (
        ("draft", teacher, "draft=.* is an Autoencoder, and must be a Rewindable"),
        ("draft", tmp_path / "none", "there is no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            genai.sample(loaded, n=1, sampler={**node, key: str(path)})


# A checkpoint's config is data


@pytest.fixture
def unread(monkeypatch):
    """No checkpoint may be read from here on."""

    def locate(ckpt, *_):
        raise AssertionError(f"{ckpt} was read")

    return lambda: monkeypatch.setattr(part, "locate", locate)


def test_a_stored_node_builds_what_it_says_and_reads_no_file(teacher, unread):
    net = {"_target_": "genai.nn.latent_space.SpaceToDepth", "field": "image", "shape": [1, 8, 8]}
    unread()
    node = {"_target_": PRETRAINED, "ckpt": str(teacher), "model": net}
    assert build_stored(node).latent_shape == (4, 4, 4)
    assert build_stored({**node, "model": node}).latent_shape == (4, 4, 4)
    for model, message in (
        (None, "must be named in the config of a new run or in a call, which reads it"),
        (5, "must be named in the config of a new run"),
        ({"_target_": "os.mkdir", "path": "ran"}, "wants to build os.mkdir"),
    ):
        with pytest.raises(UserError, match=message):
            build_stored({**node, "model": model})
    for _ in range(70):
        node = {**node, "model": node}
    with pytest.raises(UserError, match="nested more than 64 times"):
        build_stored(node)


def test_a_stored_sampler_names_no_file(teacher, tmp_path, unread):
    content = last(teacher)
    content["config"]["sampler"] = {
        "_target_": "genai.models.autoregressive.speculative.speculative",
        "_partial_": True,
        "draft": str(teacher),
    }
    path = tmp_path / "theirs.ckpt"
    checkpoint.save({k: v for k, v in content.items() if k not in ("format", "rng_version", "written")}, path)
    loaded = genai.load(path)
    assert compose_config("sample", [f"ckpt={path}"], prepare_sampling).sampler.draft is None
    unread()
    with pytest.raises(UserError, match="the sampler speculative is for a Rewindable"):
        genai.sample(loaded, n=1)


def test_what_a_part_holds_is_checked_as_any_file(student, teacher, tmp_path):
    content = last(teacher)
    content["config"]["model"] = {"_target_": PRETRAINED, "ckpt": "x", "model": {"_target_": "os.mkdir", "path": "ran"}}
    path = tmp_path / "theirs.ckpt"
    checkpoint.save({k: v for k, v in content.items() if k not in ("format", "rng_version", "written")}, path)
    with pytest.raises(UserError, match=r"wants to build os\.mkdir"):
        student(f"model.teacher.ckpt={path}", name="other")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "other").exists()


def test_parts_are_found_wherever_they_stand_but_within_others():
    inner = {"_target_": PRETRAINED, "ckpt": "a", "model": {"_target_": PRETRAINED, "ckpt": "b"}}
    node = {"_target_": "x.Y", "teachers": [{"_target_": "x.Z", "net": inner}, inner], "codec": inner, "net": None}
    found = dict(checkpoint.pretrained_nodes(node, "model"))
    assert found == dict.fromkeys(["model.teachers[0].net", "model.teachers[1]", "model.codec"], inner)


def test_a_first_stage_that_only_codec_named_is_named_by_its_node():
    built = {"_target_": "genai.models.vae.autoencoder.Autoencoder", "field": "image"}
    old = {
        "codec": {"ckpt": "a", "sha256": "b", "cache": None, "shape": [2], "model": built},
        "model": {"_target_": "x.Y", "latent": {"_target_": "x.Latent", "codec": built}},
    }
    new = up_to_date(old)
    node = {"_target_": PRETRAINED, "ckpt": "a", "sha256": "b", "shape": [2], "weights": "ema", "model": built}
    assert new["model"]["latent"]["codec"] == node and new["codec"] == old["codec"]
    assert up_to_date(new) == new
    for model in ({}, {"latent": None}, {"latent": {"codec": 5}}, 5):
        assert up_to_date({"codec": {}, "model": model}) == {"codec": {}, "model": model}
