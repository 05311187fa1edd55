"""Checkpoints made to do harm, or broken in content and not in form: none runs, writes or takes much, each is refused by name."""

import ast
import collections
import copy
import functools
import importlib
import inspect
import json
import os
import pickle
import pkgutil
import random
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from omegaconf import OmegaConf

import genai
from genai import checkpoint, sampling
from genai.checkpoint import build
from genai.checkpoint.build import build_stored, build_typed, check_target
from genai.cli import compose_config, prepare_sampling
from genai.core import archive
from genai.core.errors import UserError
from genai.evaluation.run import data_of
from genai.modalities.audio import QuantizedAudio
from genai.modalities.caption import Caption
from genai.modalities.image import Image
from genai.modalities.label import Label
from genai.modalities.mel import Mel
from genai.modalities.pixels import Pixels
from genai.modalities.stored import nodes_of
from genai.train.resume import STATE
from tests.conftest import ROOT

TINY = ["model=ddpm_mlp", "data=toy2d", "model.net.width=8", "model.schedule.steps=4", "sampler.steps=2"]
BYTES, BPE, CHAR = (
    {"_target_": f"genai.modalities.tokenizers.{kind}", "end": False} for kind in ("Byte", "BPE", "Char")
)


SCHEDULES = "genai.models.diffusion.process.schedules"


def content_of(overrides):
    """What a checkpoint of this model before its first step holds."""
    cfg = compose_config("train", overrides)
    data = build_typed(OmegaConf.to_container(cfg.data, resolve=True))
    for fact in ("shape", "classes", "levels"):
        cfg.data[fact] = getattr(data, fact)
    if cfg.model.get("sigma_data", 1.0) is None:
        cfg.model.sigma_data = 1.0
    config = OmegaConf.to_container(cfg, resolve=True)
    weights = {name: tensor.clone() for name, tensor in build_typed(config["model"]).state_dict().items()}
    modalities = nodes_of(data.modality, data.conditions)
    return {
        "format": 1,
        "rng_version": 1,
        "step": 3,
        "config": config,
        "modalities": modalities,
        "model": weights,
        "ema": dict(weights),
        "trainer": {"optimizer_states": [{"betas": (0.9, 0.99)}]},
    }


@pytest.fixture(scope="module")
def original():
    return content_of(TINY)


@pytest.fixture
def content(original):
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def words():
    small = ["model.net.transformer.width=16", "model.net.transformer.layers=1", "data.shape=[8]", "data.overlap=2"]
    overrides = ["model=gpt_nano", "data=python_docs", *small, "sampler.max_new_tokens=3"]
    return content_of(overrides)


def older(content, **assets):
    """A file of before there were modalities."""
    return {**{key: value for key, value in content.items() if key != "modalities"}, "assets": assets}


def put(content, key, value):
    """content with value at a dotted key; `...` takes the key out."""
    *way, last = key.split(".")
    node = content
    for part in way:
        node = node[int(part)] if isinstance(node, list) else node[part]
    last = int(last) if isinstance(node, list) else last
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return content


def attacked(folder):
    """What `tests.checkpoint.victim` says of every file of a folder; nothing else may be in it afterwards."""
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.victim", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before
    found = {(line := json.loads(row))["file"]: line for row in done.stdout.splitlines()}
    assert found.keys() == {path.name for path in folder.glob("*.ckpt")}
    for name, line in found.items():
        assert not line["deeds"], (name, line)
        assert not (line["answer"] or "").startswith("TRACEBACK"), (name, line)
        assert "\n" not in (line["answer"] or ""), (name, line)
        assert line["seconds"] < 5, (name, line)
        assert line["mb"] < 500, (name, line)
    return found


# What a file may say at all


class Text(str):
    """Equal to a text, and no text."""

    __slots__ = ()


class Group(dict):
    """Equal to a dict, and no dict."""


COMMAND = {"_target_": "os.system", "command": "touch ran"}
HYDRA_S_WAY = {"_target_": "torch.load", "f": {"_target_": "io.BytesIO", "initial_bytes": "x"}, "weights_only": False}
NO_PLAIN_VALUES = {
    "a tuple that hides a call": (COMMAND,),
    "a tuple in a list": [[(HYDRA_S_WAY,)]],
    "a set": {1, 2},
    "a frozen set": frozenset([1]),
    "a counter": collections.Counter("ab"),
    "an ordered dict in a tuple": (collections.OrderedDict(COMMAND),),
    "a text of another class": Text("cosine"),
    "a dict of another class": Group(COMMAND),
    "bytes": b"ab",
    "a bytearray": bytearray(b"ab"),
    "a tensor": torch.zeros(2),
    "a size": torch.Size([2]),
    "a dtype": torch.float32,
    "a complex number": 1j,
    "a number of 65 bits": 2**65,
    "a key that is a number": {1: 2},
    "a key that is a tuple": {(1, 2): 2},
    "a class": dict,
}


@pytest.mark.parametrize("value", NO_PLAIN_VALUES.values(), ids=NO_PLAIN_VALUES)
@pytest.mark.parametrize("key", ["config.model.schedule", "config.name", "modalities.output.state"])
def test_a_config_is_of_plain_values_only(content, tmp_path, key, value):
    torch.save(put(content, key, value), tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="is refused"):
        checkpoint.read(tmp_path / "bad.ckpt")


def test_what_lightning_keeps_may_have_tuples_and_comes_back_equal(content, tmp_path):
    shared = torch.arange(6.0)
    content["trainer"] = {
        "betas": (0.9, (1, 2)),
        "ordered": collections.OrderedDict(a=1),
        "by number": {0: shared[1:4], 1: shared},
        "across": torch.arange(6).view(2, 3).T,
        "none": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "one": torch.tensor(3),
        "negative": -5,
        "large": 2**62,
    }
    checkpoint.save(content, tmp_path / "x.ckpt")
    found = checkpoint.read(tmp_path / "x.ckpt")["trainer"]
    expected = torch.load(tmp_path / "x.ckpt", weights_only=True)["trainer"]
    assert found.keys() == expected.keys()
    for key in ("betas", "ordered", "negative", "large"):
        assert found[key] == expected[key] and type(found[key]) is not collections.OrderedDict
    for key in ("across", "none", "half", "flags", "one"):
        assert torch.equal(found[key], expected[key]) and found[key].stride() == expected[key].stride()
        assert found[key].dtype == expected[key].dtype
    assert torch.equal(found["by number"][0], shared[1:4])
    found["by number"][1][1] = 9.0
    assert found["by number"][0][0] == 9.0, "tensors over one storage share it"


# What a config may build


def targets(node):
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


CONFS = [
    path
    for group in ("model", "sampler", "data", "experiment", "optim", "callbacks", "logger", "extractor")
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]


def test_every_target_of_every_config_may_be_stored():
    seen = set()
    for path in CONFS:
        for target in targets(OmegaConf.to_container(OmegaConf.load(path))):
            kinds = (build.MODELS,) if path.parts[-2] in ("model", "sampler") else (build.MODELS, build.DATA, build.RUN)
            room = target.split(".")[1]
            if room in ("train", "extractors"):
                kinds = (build.RUN,)
            elif path.parts[-2] == "experiment" and room == "data":
                kinds = (build.DATA,)
            if target != "my_lab.Net":
                check_target(target, (), kinds)
                seen.add(target)
    assert len(seen) > 80


HARMLESS_MODULES = (
    "__future__",
    "bisect",
    "collections",
    "contextlib",
    "dataclasses",
    "einops",
    "functools",
    "inspect",
    "itertools",
    "lpips",
    "math",
    "numpy",
    "sys",
    "torch",
    "typing",
    "genai.core",
    "genai.kernels",
    "genai.losses",
    "genai.models",
    "genai.nn",
)


@pytest.mark.parametrize("room", ["models", "nn", "losses"])
def test_nothing_that_a_file_may_build_writes_downloads_or_runs(room):
    """Read off the source: modules of these rooms import nothing that could."""
    for path in sorted((ROOT / "genai" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith(HARMLESS_MODULES), f"{path}: {name}"
                assert not name.startswith(("torch.hub", "genai.core.files", "genai.core.cache")), f"{path}: {name}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                forbidden = "open", "exec", "eval", "torch.save", "torch.load", "compile"
                assert called not in forbidden, f"{path}: {called}"
                assert not re.fullmatch(r"np\.(load|save|from|gen|mem).*|.*\.tofile", called), f"{path}: {called}"


def test_functions_of_data_and_training_that_do_things_are_not_admitted():
    everything = (build.MODELS, build.DATA, build.RUN)
    admitted = set()
    for room in ("data", "evaluation", "train"):
        package = importlib.import_module(f"genai.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"genai.{room}."):
            for name, found in vars(importlib.import_module(module.name)).items():
                if callable(found) and getattr(found, "__module__", None) == module.name:
                    try:
                        check_target(f"{module.name}.{name}", (), everything)
                        admitted.add(f"{module.name}.{name}")
                    except UserError:
                        pass
    data = {name for name in admitted if name.startswith("genai.data.")}
    metrics = {name for name in admitted if name.startswith("genai.evaluation.metrics.")}
    assert admitted - data - metrics == set(build.RUN_TARGETS) and "genai.evaluation.metrics.Distinct" in metrics
    assert {name.rpartition(".")[2] for name in data} == {
        "AudioFolder",
        "Captioned",
        "CelebA",
        "CIFAR10",
        "Data",
        "Digits",
        "EspeakDigits",
        "FashionMNIST",
        "ImageFolder",
        "MNIST",
        "Media",
        "Melodies",
        "Pairs",
        "Pixels",
        "QuantizedAudio",
        "SpokenDigits",
        "Text",
        "Tones",
        "Toy2D",
        "chorales",
        "g2p",
        "json_file",
        "lines",
        "midi_folder",
        "mixed_text",
        "numbers",
        "pairs",
        "passages",
        "python_docs",
        "reverse",
        "speakers",
        "text_file",
        "text_folder",
        "topics",
    }


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("genai.data.toy2d.Toy2D", (build.MODELS,)),
        ("genai.data.text.text_file", (build.MODELS,)),
        ("genai.data.token_files.prepare", (build.MODELS, build.DATA)),
        ("genai.modalities.base.save", (build.MODELS, build.DATA)),
        ("genai.modalities.image.Image", (build.MODELS, build.DATA, build.RUN)),
        ("genai.data.images.download", (build.MODELS, build.DATA)),
        ("genai.train.callbacks.Save", (build.MODELS, build.DATA)),
        ("genai.train.codec.precompute", (build.MODELS, build.DATA, build.RUN)),
        ("genai.train.run.run", (build.MODELS, build.DATA, build.RUN)),
        ("genai.checkpoint.save", (build.MODELS, build.DATA, build.RUN)),
        ("genai.models.vae.nets.ResBlock.forward", (build.MODELS,)),
        ("genai.models..vae", (build.MODELS,)),
        ("genai.models.vae.nets.__name__", (build.MODELS,)),
        ("genai.models.autoregressive.decode._Writer", (build.MODELS,)),
    ],
)
def test_a_file_builds_only_what_is_asked_of_it(target, kinds):
    with pytest.raises(UserError, match="wants to build"):
        build_stored({"_target_": target}, kinds=kinds)


@pytest.mark.parametrize("value", [("a",), Group(a=1), Text("a"), {1: 2}, collections.OrderedDict(a=1), {1}])
def test_the_node_that_is_checked_is_the_one_that_is_built(value):
    with pytest.raises(UserError, match="config is refused"):
        build_stored({"_target_": "genai.nn.transformer.GELU", "width": 2, "hidden": value})


def test_what_user_typed_is_not_bounded(tmp_path):
    assert build_typed({"_target_": "fractions.Fraction", "numerator": 3}) == 3


# Data, the network and the disk


def test_a_stored_data_node_downloads_nothing(tmp_path, content):
    node = {
        "_target_": "genai.data.text.text_file",
        "path": str(tmp_path / "new.txt"),
        "url": "data:,attack",
        "tokenizer": "byte",
        "vocab_size": None,
        "val": 0.1,
        "test": 0.1,
        "overlap": 0,
        "cache": None,
        "field": "tokens",
        "shape": [2],
        "classes": None,
        "levels": None,
        "batch_size": 2,
    }
    for key in ("config.data", "config.model.net", "config.sampler.clip"):
        path = tmp_path / f"{key}.ckpt"
        checkpoint.save(put(copy.deepcopy(content), key, node), path)
        with pytest.raises(UserError):
            loaded = genai.load(path)
            data_of(loaded, None) if key == "config.data" else genai.sample(loaded, n=1)
    with pytest.raises(UserError, match=r"train\.py with the data= it was trained on downloads it"):
        build_stored(node, kinds=(build.DATA,))
    assert not (tmp_path / "new.txt").exists()
    for name, message in {"images.MNIST": "MNIST", "images.CIFAR10": "CIFAR10", "celeba.CelebA": "CelebA"}.items():
        facts = {"root": str(tmp_path / "none"), "field": "image", "shape": None, "classes": None, "levels": None}
        facts |= {"size": [8, 8], "flip": False} if "celeba" in name else {}
        node = {"_target_": f"genai.data.{name}", **facts, "batch_size": 2}
        with pytest.raises(UserError, match=f"{message} is not in .* nothing is downloaded because a checkpoint"):
            build_stored(node, kinds=(build.DATA,))
    assert not (tmp_path / "none").exists()


def test_a_stored_text_is_prepared_in_the_users_own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (tmp_path / "a.txt").write_text("some words, " * 40)
    node = {
        "_target_": "genai.data.text.text_file",
        "path": str(tmp_path / "a.txt"),
        "tokenizer": "byte",
        "vocab_size": None,
        "val": 0.1,
        "test": 0.1,
        "overlap": 0,
        "cache": str(tmp_path / "theirs"),
        "field": "tokens",
        "shape": [4],
        "classes": None,
        "levels": None,
        "batch_size": 2,
    }
    data = build_stored(node, kinds=(build.DATA,))
    assert not (tmp_path / "theirs").exists()
    assert data.splits["val"].path.is_relative_to(tmp_path / "own")
    assert build_typed(node).splits["val"].path.is_relative_to(tmp_path / "theirs"), "a user may name any folder"
    assert build_stored(node, kinds=(build.DATA,)).splits["val"].path.is_relative_to(tmp_path / "theirs"), "read there"


# Configs that come in by another door


def test_a_first_stage_is_checked_as_any_file(content, tmp_path, refused):
    """Without weights too, and before the run directory is made."""
    content["config"]["model"] = {"_target_": "os.mkdir", "path": str(tmp_path / "ran")}
    for name, weights in (("with", content["model"]), ("without", {})):
        checkpoint.save({**content, "model": weights, "ema": {}}, tmp_path / f"{name}.ckpt")
        sentence = refused("train.py", "model=latent", f"codec.ckpt={tmp_path / name}.ckpt", "max_steps=1")
        assert "wants to build os.mkdir" in sentence
    assert not (tmp_path / "ran").exists()


def test_a_runs_config_admits_no_package_of_its_own(content, tmp_path, refused):
    config = {**content["config"], "trust": ["os", "subprocess"], "resume": None}
    call = {"_target_": "os.mkdir", "path": "ran"}
    for key, node in {
        "callbacks": {"x": call},
        "logger": call,
        "model": {"_target_": "genai.checkpoint.pretrained", "ckpt": None, "model": call},
    }.items():
        run = tmp_path / key
        run.mkdir()
        OmegaConf.save(OmegaConf.create({**config, key: node}), run / "config.yaml")
        assert "wants to build os.mkdir" in refused("train.py", f"resume={run}")


def test_a_resumed_run_with_cards_builds_no_sampler_of_its_own(tmp_path, refused):
    """Its file names the package, and nobody else admitted it."""
    content = content_of(["model=gan", "data=digits"])
    config = {**content["config"], "max_steps": 9, "resume": None, "trust": None}
    config["sampler"] = {"_target_": "subprocess.Popen", "_partial_": True, "args": ["touch", str(tmp_path / "ran")]}
    config["callbacks"]["cards"] |= {"every_steps": 1, "metrics": ["frechet"]}
    trainer = {key: kind() for key, kind in STATE.items()} | {
        "optimizer_states": content["trainer"]["optimizer_states"]
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({**content, "config": config, "trainer": trainer}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    OmegaConf.save(OmegaConf.create(config), tmp_path / "run" / "config.yaml")
    assert "wants to build subprocess.Popen" in refused("train.py", f"resume={tmp_path / 'run'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not a config of a run (while parsing"),
        ("- 1", "is not a config of a run"),
        ("model: 5", "is not a config of a run"),
        ("a: &a [1]\nb: *a", "has references"),
        ("a: ${oc.env:HOME}", "has references"),
        ("a: !!python/object/apply:os.mkdir [ran]", "could not determine a constructor"),
        ("a: " + "[" * 5000, "is not a config of a run ("),
        ("#" + " " * 2**22, "more than 4 MiB"),
    ],
)
def test_a_runs_config_is_a_file_from_elsewhere(tmp_path, refused, text, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert message in refused("sample.py", f"ckpt={tmp_path / 'run'}")
    assert message in refused("train.py", f"resume={tmp_path / 'run'}")


# Well-formed files of wrong content, each in a process that is watched


def node_like(kind, values):
    """What a file says of a modality that may not be one."""
    names = list(inspect.signature(kind).parameters)[: len(values)]
    return {"_target_": f"{kind.__module__}.{kind.__name__}", "state": dict(zip(names, values, strict=True))}


def wrong(content, words):
    """Name -> content that `torch.save` can write."""
    weights, node = content["model"], content["config"]["model"]
    old, old_words = older(content, class_names=None), older(words, class_names=None, tokenizer=BYTES)
    kinds = Pixels, Label, Caption, QuantizedAudio, Mel
    pixels, label, caption, codes, mel = (lambda *values, kind=kind: node_like(kind, values) for kind in kinds)
    huge = {
        f"a huge {key} {str(value)[:20]}": (content, f"config.model.{key}", value)
        for key in ("net.width", "net.blocks", "net.dim", "schedule.steps", "classes", "shape", "levels", "clip")
        for value in (10**9, 2**62, -1, 0, 1e30, [10**9], [1] * 100)
    }
    changes = {
        **huge,
        "wide words": (words, "config.model.net.transformer.width", 10**9),
        "rather wide words": (words, "config.model.net.transformer.width", 10**6),
        "many layers of words": (words, "config.model.net.transformer.layers", 10**9),
        "rather many layers of words": (words, "config.model.net.transformer.layers", 10**6),
        "many layers of nothing": (words, "config.model.net.transformer.width", 0),
        "a long context": (words, "config.model.length", 10**9),
        "many heads": (words, "config.model.net.transformer.attention.heads", 10**6),
        "no weights": (content, "model", {}),
        "weights by number": (content, "model", {0: torch.zeros(2)}),
        "weights that are lists": (content, "model", {name: t.tolist() for name, t in weights.items()}),
        "sparse weights": (content, "model", {name: t.to_sparse() for name, t in weights.items()}),
        "weights without numbers": (content, "model", {name: t.to("meta") for name, t in weights.items()}),
        "parameters": (content, "model", {name: torch.nn.Parameter(t) for name, t in weights.items()}),
        "weights of a text": (content, "model", "weights"),
        "a weight too many": (content, "model", {**weights, "x": torch.zeros(1)}),
        "weights of another shape": (content, "model", {name: t.flatten()[:1] for name, t in weights.items()}),
        "expanded weights": (content, "ema", {"x": torch.zeros(1).expand(10**9)}),
        "a text as step": (content, "step", "3"),
        "a negative step": (content, "step", -3),
        "a step that is true": (content, "step", True),
        "a format of text": (content, "format", "1"),
        "format 0": (content, "format", 0),
        "no trainer": (content, "trainer", ...),
        "a trainer that is a list": (content, "trainer", []),
        "no assets": (old, "assets", ...),
        "assets that are a list": (old, "assets", [1]),
        "class names for no classes": (old, "assets.class_names", ["a"]),
        "pixels of nothing": (old, "assets.pixels", {"shape": [1, 2, 2], "levels": 2}),
        "pixels that are a list": (old, "assets.pixels", [2]),
        "pixels without a shape": (old, "assets.pixels", {"levels": 2}),
        "no modalities": (content, "modalities", ...),
        "modalities that are a list": (content, "modalities", [1]),
        "modalities without conditions": (content, "modalities.conditions", ...),
        "conditions that are a list": (content, "modalities.conditions", []),
        "modalities of nothing": (content, "modalities", {}),
        "an output that is code": (content, "modalities.output", COMMAND),
        "an output that is a function": (content, "modalities.output._target_", "genai.modalities.image.grid"),
        "an output that is a model": (content, "modalities.output", {"_target_": node["_target_"], "state": node}),
        "an output of a list": (content, "modalities.output._target_", ["os.system"]),
        "an output without a state": (content, "modalities.output.state", ...),
        "an output that is a partial": (content, "modalities.output._partial_", True),
        "a state of a list": (content, "modalities.output.state", [1]),
        "a state with more": (content, "modalities.output.state.more", 1),
        "a state that is code": (content, "modalities.output.state.field", COMMAND),
        "another state": (content, "modalities.output._target_", "genai.modalities.pixels.Pixels"),
        "pixels of one level": (content, "modalities.output", pixels([1, 2, 2], 1)),
        "huge pixels": (content, "modalities.output", pixels([1, 10**9, 10**9], 2)),
        "codes of too many levels": (content, "modalities.output", codes(8000, 10**9, "linear")),
        "codes of no rate": (content, "modalities.output", codes("8000", 256, "linear")),
        "codes by code": (content, "modalities.output", codes(8000, 256, COMMAND)),
        "huge spectrograms": (content, "modalities.conditions.label", mel(8000, 10**9, 128)),
        "spectrograms of no frames": (content, "modalities.conditions.label", mel(8000, 40, 0)),
        "class names that are numbers": (content, "modalities.conditions.label", label(2, [1, 2])),
        "class names that are a text": (content, "modalities.conditions.label", label(2, "ab")),
        "a name too few": (content, "modalities.conditions.label", label(2, ["a"])),
        "a text for classes": (content, "modalities.conditions.label", label("2", None)),
        "a caption by the name of a label": (content, "modalities.conditions.label", caption(9)),
        "a caption of no length": (content, "modalities.conditions.caption", caption(0)),
        "a huge caption": (content, "modalities.conditions.caption", caption(10**12)),
        "no config": (content, "config", ...),
        "no model": (content, "config.model", ...),
        "no data": (content, "config.data", ...),
        "no sampler": (content, "config.sampler", ...),
        "a model that is a list": (content, "config.model", [node]),
        "a net where a model is needed": (content, "config.model", node["net"]),
        "a loss where a model is needed": (content, "config.model", {"_target_": "genai.losses.adversarial.Hinge"}),
        "a model where a net is needed": (content, "config.model.net", node),
        "a text where a net is needed": (content, "config.model.net", "net"),
        "a list where a net is needed": (content, "config.model.net", [1]),
        "a model where a sampler is needed": (content, "config.sampler", node),
        "a sampler that is called at once": (content, "config.sampler._partial_", False),
        "a partial that is a text": (content, "config.sampler._partial_", "yes"),
        "a sampler of another family": (content, "config.sampler._target_", "genai.models.gan.samplers.gan"),
        "a function that is not a sampler": (content, "config.sampler._target_", "genai.models.gan.gan.slerp"),
        "a sampler of another family, bare": (
            content,
            "config.sampler",
            {"_target_": "genai.models.gan.samplers.gan", "_partial_": True},
        ),
        "a sampler without an argument": (content, "config.sampler.solver.eta", ...),
        "a solver that is code": (content, "config.sampler.solver._target_", "os.system"),
        "a solver that is not a solver": (content, "config.sampler.solver._target_", f"{SCHEDULES}.cosine"),
        "a solver that is called at once": (content, "config.sampler.solver._partial_", False),
        "a solver that is a text": (content, "config.sampler.solver", "ddim"),
        "no solver": (content, "config.sampler.solver", ...),
        "a solver without an end": (content, "config.sampler.sigma_max", {"a": 1}),
        "a spacing that is a list": (content, "config.sampler.spacing", ["trailing"]),
        "a sampler's steps": (content, "config.sampler.steps", 10**9),
        "a sampler's text for steps": (content, "config.sampler.steps", "many"),
        "a model's classes": (content, "config.model.classes", "ten"),
        "a field of nothing": (content, "config.model.field", "sound"),
        "data that are code": (content, "config.data._target_", "os.system"),
        "a schedule that is code": (content, "config.model.schedule", COMMAND),
        "no tokenizer": (words, "modalities.output.state.tokenizer", ...),
        "an older tokenizer that is a list": (old_words, "assets.tokenizer", []),
        "an older tokenizer that is code": (old_words, "assets.tokenizer._target_", "os.system"),
        "a tokenizer that is a list": (words, "modalities.output.state.tokenizer", []),
        "a tokenizer that is code": (words, "modalities.output.state.tokenizer._target_", "os.system"),
        "a tokenizer of a list": (words, "modalities.output.state.tokenizer._target_", ["os.system"]),
        "a tokenizer with more": (words, "modalities.output.state.tokenizer.more", 1),
        "a tokenizer's end": (words, "modalities.output.state.tokenizer.end", "no"),
        "a spec of garbage": (words, "modalities.output.state.tokenizer", {**BPE, "spec": "{"}),
        "a spec of a list": (words, "modalities.output.state.tokenizer", {**BPE, "spec": "[]"}),
        "a deep spec": (words, "modalities.output.state.tokenizer", {**BPE, "spec": "[" * 10**5}),
        "a spec that pads": (words, "modalities.output.state.tokenizer", {**BPE, "spec": PADDING}),
        "chars that are a list": (words, "modalities.output.state.tokenizer", {**CHAR, "chars": ["a"]}),
        "chars of none": (words, "modalities.output.state.tokenizer", {**CHAR, "chars": ""}),
        "chars in disorder": (words, "modalities.output.state.tokenizer", {**CHAR, "chars": "ba"}),
    }
    for name, (base, key, value) in changes.items():
        yield name, put({**copy.deepcopy(base), "ema": {}}, key, value)


PADDING = json.dumps(
    {
        "version": "1.0",
        "padding": {
            "strategy": {"Fixed": 10**12},
            "direction": "Left",
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
        "pre_tokenizer": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
)
HARMLESS = {
    "class names for no classes",
    "a field of nothing",
    "data that are code",
    "a sampler without an argument",
    *(f"a huge clip {value}" for value in (-1, 0, 1e30)),
    *(f"a huge levels {value}" for value in (-1, 0, 1e30)),
    f"a huge levels {str([1] * 100)[:20]}",
}


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """A copy of an archive in which `change(name, bytes)` says what each record holds."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))


def bombs(content, folder):
    """Archives that `torch.save` does not write."""
    torch.save(content, folder / "good")
    torch.save({**content, "ema": {"x": torch.zeros(10**6)}}, folder / "zeros")
    zeros = bytes(10**8)
    rewritten(folder / "zeros", folder / "compressed.ckpt", lambda name, data: zeros if len(data) > 10**6 else data, 8)
    rewritten(folder / "good", folder / "a pickle compressed.ckpt", lambda name, data: data, zipfile.ZIP_DEFLATED)
    (folder / "nothing.ckpt").write_bytes(b"")
    (folder / "an end alone.ckpt").write_bytes(b"PK\x05\x06" + bytes(18))
    whole = (folder / "good").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "with a comment.ckpt").write_bytes(whole[:-2] + b"\x04\0more")
    for name, at in {"a long list": len(whole) - 98 + 40, "a far list": len(whole) - 42 + 8}.items():
        many = bytearray(whole)
        assert many[-98:-94] == b"PK\x06\x06" and many[-42:-38] == b"PK\x06\x07"
        many[at : at + 8] = (2**40).to_bytes(8, "little")
        (folder / f"{name}.ckpt").write_bytes(many)
    programs = {
        "a bytearray": pickle.GLOBAL + b"builtins\nbytearray\n" + b"J\x00\x00\x00\x70" + pickle.TUPLE1 + pickle.REDUCE,
        "a tensor of a size": b"ctorch\nFloatTensor\nJ\x00\x00\x00\x70" + pickle.TUPLE1 + pickle.REDUCE,
        "tuples of tuples": b")" + b"".join(b"q\x01h\x01\x86" for _ in range(200)),
        "a dict by tuples of tuples": b"})" + b"".join(b"q\x01h\x01\x86" for _ in range(60)) + b"K\x01s",
        "lists of lists": b"]" + b"".join(b"q\x01]q\x02h\x01ah\x01a" for _ in range(60)),
        "a list in itself": b"]q\x01h\x01a",
        "a deep list": b"]" * 10**6 + b"a" * (10**6 - 1),
        "a long number": b"\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20,
        "a far place in memory": b"}r\xff\xff\xff\xff",
        "a place that is empty": b"h\x07",
        "nothing on the stack": b"a",
        "an attribute": b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb",
        "no end": b"}" * 10,
        "another protocol": b"\x80\x05\x95\x00\x00\x00\x00\x00\x00\x00\x00}",
        "an object": b"ccollections\nOrderedDict\n)\x81",
        "an old name": b"ios\nsystem\n",
        "a name as a value": b"}X\x06\x00\x00\x00formatccollections\nOrderedDict\ns",
    }
    for name, program in programs.items():
        stop = b"" if name == "no end" else b"."
        rewritten(
            folder / "good",
            folder / f"{name}.ckpt",
            lambda record, data, p=b"\x80\x02" + program + stop: p if record.endswith("/data.pkl") else data,
        )
    with zipfile.ZipFile(folder / "good") as archive:
        program = archive.read("good/data.pkl")
    assert b"K\x08K\x08\x86" in program
    larger = program.replace(b"K\x08K\x08\x86", b"J\x00\x00\x10\x00K\x08\x86")
    rewritten(
        folder / "good",
        folder / "beyond its storage.ckpt",
        lambda record, data: larger if record.endswith("/data.pkl") else data,
    )
    for name in ("good", "zeros"):
        (folder / name).unlink()


def test_wrong_content_and_bombs_are_refused_at_once(content, words, tmp_path):
    torch.save(content, tmp_path / "0 good.ckpt")
    torch.save(words, tmp_path / "0 good words.ckpt")
    for name, bad in wrong(content, words):
        torch.save(bad, tmp_path / f"{name}.ckpt")
    bombs(content, tmp_path)
    found = attacked(tmp_path)
    accepted = {name.removesuffix(".ckpt") for name, line in found.items() if line["answer"] is None}
    assert accepted == HARMLESS | {"0 good", "0 good words"}
    assert len(found) > 100


def test_a_modality_that_cannot_write_what_was_sampled_is_named(content, tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.save(put(copy.deepcopy(content), "modalities.output", node_like(Image, ["vector"])), path)
    with pytest.raises(UserError, match=r"bad.ckpt fails with its config and the arguments of this call \(ValueError"):
        sampling.run(
            compose_config("sample", [f"ckpt={path}", "device=cpu", "n=2", f"out={tmp_path / 'out'}"], prepare_sampling)
        )


# Three hundred mutations


def places(node, way=()):
    """Every way to a value below a node of dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*way, key)
        yield from places(value, (*way, key))


NAMES = [
    "os.system",
    "builtins.exec",
    "subprocess.Popen",
    "genai.checkpoint.save",
    "genai.data.text.text_file",
    "genai.modalities.base.save",
    "genai.models.gan.gan.GAN",
    "genai.models.diffusion.ddpm.DDPM",
    "genai.nn.norm.LayerNorm",
    "genai.models.diffusion.sampling.samplers.sample",
    f"{SCHEDULES}.cosine",
    "genai.train.run.run",
    "torch.load",
]


def mutated(content, seed):
    """content with one to three values of its config or modalities changed, dropped, swapped, nested or of another type."""
    draw, content = random.Random(seed), copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        part = draw.choice(["config", "config", "config", "modalities"])
        ways = [
            w
            for w in places(content[part])
            if part == "modalities" or w[0] in ("model", "data", "sampler", "name", "trust")
        ]
        if not ways:
            continue
        way = draw.choice(ways)
        node = content[part]
        for key in way[:-1]:
            node = node[key]
        value, key = node[way[-1]], way[-1]
        other = content[part]
        for step in draw.choice(ways):
            other = other[step]
        swapped = functools.partial(lambda other, v: other, other)
        change = draw.choice(
            [
                lambda v: (v,),
                lambda v: [v],
                lambda v: {"a": v},
                lambda v: {1, 2},
                lambda v: Text("x"),
                lambda v: Group(a=1),
                lambda v: collections.OrderedDict(a=v),
                lambda v: collections.Counter("ab"),
                lambda v: draw.choice(NUMBERS),
                lambda v: draw.choice(NUMBERS),
                lambda v: draw.choice(["", "x", "${oc.env:HOME}", "true", "\0", "\ud800"]),
                lambda v: None,
                lambda v: not v,
                lambda v: {"_target_": draw.choice(NAMES), "path": "ran"},
                lambda v: {"_target_": draw.choice(NAMES), "_args_": [v]},
                lambda v: draw.choice(NAMES),
                swapped,
                lambda v: torch.zeros(2),
                lambda v: b"x",
                lambda v: nested(draw.randint(1, 200)),
                lambda v: ...,
                lambda v: ...,
            ]
        )
        value = change(value)
        if value is ... and isinstance(node, dict):
            del node[key]
        elif value is not ...:
            node[key] = copy.deepcopy(value)
    return content


NUMBERS = [-1, 0, 1, 3, 10**5, 10**9, 2**31, 2**63, 2**64, 2**200, -(2**63), 0.5, 1e30, float("nan"), float("inf")]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_three_hundred_mutations_are_refused_by_name_or_harmless(content, tmp_path):
    torch.save(content, tmp_path / "000 good.ckpt")
    for seed in range(1, 301):
        torch.save(mutated(content, seed), tmp_path / f"{seed:03d}.ckpt")
    found = attacked(tmp_path)
    refusals = [line["answer"] for line in found.values() if line["answer"]]
    assert 150 < len(refusals) < 300


class Endless:
    """/dev/zero, where reading all would fill memory."""

    def seek(self, position):
        assert position == 0

    def read(self, n=-1):
        assert n >= 0, "all of a device is read"
        return bytes(n)


def test_no_more_of_a_device_is_read_than_an_end_has():
    with pytest.raises(archive.DamagedArchive, match="does not end as a zip file does"):
        archive._check_directory(Endless(), 0)  # type: ignore[arg-type]
