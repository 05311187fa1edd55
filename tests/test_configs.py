"""Every file in conf/model and conf/experiment is a case: build, learn, save, load, sample, and the twin of a kill."""

import functools
import re

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import genai
from genai import sampling
from genai.checkpoint.build import build_typed
from genai.cli import compose_config
from genai.core.precision import cast_for_inference
from genai.core.protocols import PAD
from genai.data.base import Data, synthetic_batch
from genai.modalities.caption import Caption
from genai.modalities.media import Media
from genai.modalities.stored import nodes_of
from genai.train.callbacks import File
from genai.train.ema import EMA
from genai.train.record import Record
from tests.conftest import ROOT

MODELS = {"ddpm_mlp": ["data=toy2d"], "audio_diffusion": ["data=fsdd"], "audio_diffusion_waveform": ["data=tones"]}
CASES = {f"model={p.stem}": MODELS.get(p.stem, []) for p in sorted((ROOT / "conf" / "model").glob("*.yaml"))}
CASES |= {f"experiment={p.stem}": [] for p in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))}
SMALLER = {"channels": 8, "width": 24, "layers": 2, "group": 4}  # the same wiring, narrower


class Synthetic:
    """Endless items of the declared shapes."""

    augments = False

    def __init__(self, data, caption=None, audio=None):
        self.facts, self.speakers, self.caption = (data.shape, data.field, data.classes), data.speakers, caption
        self.audio = audio
        self.sources = getattr(data, "source_levels", None)

    def __len__(self):
        return 16

    def batch(self, index, draws):
        whole = synthetic_batch(*self.facts, n=16)
        if self.speakers is not None:
            whole["speaker"] = torch.arange(16) % self.speakers
        if self.caption is not None:
            whole["caption"] = torch.arange(16 * self.caption).view(16, -1) % PAD
        if self.audio is not None:
            whole |= synthetic_batch(self.audio, "audio", None, n=16)
        if self.sources is not None:  # of 1 to 3 ids
            lengths = torch.arange(16)[:, None] % 3 + 1
            whole["source"] = (torch.arange(48).view(16, 3) % self.sources).where(torch.arange(3) < lengths, -1)
        return {name: value[index] for name, value in whole.items()}


def shrink(node):
    for key, value in node.items():
        if isinstance(value, DictConfig):
            shrink(value)
        elif key in SMALLER:
            node[key] = SMALLER[key]
        elif key == "widths":
            node[key] = [8 for _ in value]


def config_of(case):
    cfg = compose_config("train", [case, *CASES[case]])
    cfg.data.shape = cfg.data.shape or ([12] if cfg.data.field == "tokens" else [3, 8, 8])
    if cfg.data.field == "tokens":
        cfg.data.levels = cfg.data.levels or 11
    if "source_levels" in cfg.data:
        cfg.data.source_levels = 9
    shrink(cfg.model)
    if "sigma_data" in cfg.model:
        cfg.model.sigma_data = 0.5
    if cfg.sampler.get("steps") is not None:
        cfg.sampler.steps = 2
    elif "schedule" in cfg.model:
        cfg.model.schedule.steps = 2
    return OmegaConf.to_container(cfg, resolve=True)


def synthetic(facts):
    """Data of the config's shape and classes, made up."""
    names, speakers = (
        None if facts.get(key) is None else [f"{i}" for i in range(facts[key])] for key in ("classes", "speakers")
    )
    data = Data(
        field=facts["field"],
        shape=facts["shape"],
        classes=facts["classes"],
        levels=facts["levels"],
        batch_size=4,
        num_workers=0,
        splits={},
        found_shape=facts["shape"],
        class_names=names,
        found_levels=facts["levels"],
        speaker_names=speakers,
    )
    caption = facts.get("length")  # of the longest one in bytes
    if caption is not None:
        data.conditions = {"caption": Caption(caption), **data.conditions}
    data.source_levels = facts.get("source_levels")
    audio = facts["audio"]["shape"] if "images" in facts and "audio" in facts else None
    if audio is not None:
        data.modality, data.conditions = Media(caption, ["a", "b"], data.shape, audio, 8000), {}
    data.splits = {name: Synthetic(data, caption, audio) for name in ("train", "val")}
    return data


class Saved(L.Callback):
    """Save a checkpoint called <step>.ckpt after one of the steps, and keep what the average was."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer, lit, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / f"{self.step}.ckpt")
            self.average = {name: value.clone() for name, value in lit.ema.module.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def train(config, folder, steps, saved=None, resume=None, precision="32-true", accumulate=1):
    data = synthetic(config["data"])
    torch.manual_seed(0)
    model = build_typed(config["model"])
    if precision.endswith("-true"):  # as train.py does
        model, precision = cast_for_inference(model, precision), "32-true"
    record = Record(folder)
    record.cut(None)
    loop = build_typed({**config["loop"], "_partial_": True})
    lit = loop(
        model,
        data,
        build_typed(config["optim"]),
        functools.partial(EMA, decay=0.9),
        record,
        accumulate=accumulate,
        log_every_steps=1,
    )
    file = File(config, nodes_of(data.modality, data.conditions))
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        accelerator="cpu",
        plugins=[file],
        precision=precision,
        callbacks=[] if saved is None else [saved],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=1,
    )
    trainer.fit(lit, ckpt_path=resume)
    return lit


@pytest.mark.parametrize("case", CASES)
def test_builds_learns_saves_loads_samples_and_resumes(case, tmp_path, monkeypatch):
    config = config_of(case)
    monkeypatch.setattr(sampling, "items_of", lambda loaded: synthetic(config["data"]).items)
    saved = Saved(tmp_path, 1)
    whole = train(config, tmp_path, 2, saved)
    assert len(whole.model.nets()) > 0
    values = whole.evaluate()
    assert values and np.isfinite(list(values.values())).all()

    loaded = genai.load(tmp_path / "1.ckpt")
    label = None if config["model"].get("classes") is None else 1
    assert same(loaded.model.state_dict(), saved.average)
    first, again = (genai.sample(loaded, n=2, seed=5, label=label) for _ in range(2))
    field = config["data"]["field"]
    assert first[field].shape == (2, *config["data"]["shape"])
    assert torch.equal(first[field], again[field])
    assert torch.isfinite(first[field]).all()

    (tmp_path / "resumed").mkdir()
    resumed = train(config, tmp_path / "resumed", 2, resume=tmp_path / "1.ckpt")
    assert whole.trainer.global_step == resumed.trainer.global_step == 2
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.ema.module.state_dict(), resumed.ema.module.state_dict())
    for one, two in zip(whole.trainer.optimizers, resumed.trainer.optimizers, strict=True):
        states = (optimizer.state_dict()["state"] for optimizer in (one, two))
        assert all(same(*pair) for pair in zip(*map(dict.values, states), strict=True))


# The other experiments are of the same parts as a model's own file.
OF_THEIR_OWN = [
    f"experiment={name}" for name in ("autoencoder_cifar10", "dcgan_mnist", "latent_digits_text", "stylegan2_cifar10")
]
HALF = [
    pytest.param(case, precision, marks=[] if case.startswith("model=") or case in OF_THEIR_OWN else pytest.mark.slow)
    for case in CASES
    for precision in ("bf16-mixed", "bf16-true")
]


@pytest.mark.parametrize(("case", "precision"), HALF)
def test_learns_and_samples_in_half_precision(case, precision, tmp_path, monkeypatch):
    """Two steps of two micro-batches, an evaluation, and samples; weights that were float64 or float32 for a reason stay so."""
    config = config_of(case)
    monkeypatch.setattr(sampling, "items_of", lambda loaded: synthetic(config["data"]).items)
    lit = train(config, tmp_path, 2, Saved(tmp_path, 2), precision=precision, accumulate=2)
    assert lit.trainer.global_step == 2
    values = lit.evaluate()
    assert values and np.isfinite(list(values.values())).all()
    with open(tmp_path / "metrics.csv") as file:
        assert "nan" not in file.read()
    halves = {p.dtype for p in lit.model.parameters() if p.requires_grad}
    assert (torch.bfloat16 in halves) == (precision == "bf16-true")
    assert {p.dtype for p in lit.ema.average} == {torch.float32}
    plain = build_typed(config["model"])
    for (name, ours), theirs in zip(lit.model.named_buffers(), plain.buffers(), strict=True):
        assert ours.dtype == theirs.dtype or name.split(".")[-1] in ("kernel", "positions"), name  # of the network

    field = config["data"]["field"]
    label = None if config["model"].get("classes") is None else 1
    batch = genai.sample(genai.load(tmp_path / "2.ckpt", precision=precision), n=2, seed=5, label=label)
    assert batch[field].shape == (2, *config["data"]["shape"])
    assert torch.isfinite(batch[field]).all()
    assert batch[field].dtype == (torch.int64 if field == "tokens" else torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("experiment=")])
def test_experiments_open_with_their_command(case):
    text = (ROOT / "conf" / "experiment" / f"{case.removeprefix('experiment=')}.yaml").read_text()
    assert f"python train.py {case}" in text


def test_the_nano_recipe_is_that_of_nanogpt():
    """karpathy/nanoGPT: README.md on a CPU, over config/train_shakespeare_char.py, over train.py and model.py."""
    cfg = compose_config("train", ["experiment=gpt_shakespeare_cpu", "model=gpt_nano"])
    cfg = OmegaConf.to_container(cfg, resolve=True)
    optim, net = cfg["optim"], cfg["model"]["net"]["transformer"]
    assert (cfg["max_steps"], cfg["data"]["batch_size"], cfg["data"]["shape"], cfg["clip_norm"]) == (
        2000,
        12,
        [64],
        1.0,
    )
    assert (optim["lr"], optim["lr_min"], optim["warmup_steps"], optim["decay_steps"]) == (1e-3, 1e-4, 100, 2000)
    assert (optim["betas"], optim["weight_decay"], cfg["ema"]["decay"]) == ([0.9, 0.99], 0.1, 0)
    assert (net["layers"], net["width"], net["attention"]["heads"], net["mlp"]["ratio"], net["dropout"]) == (
        4,
        128,
        4,
        4,
        0,
    )
    assert not any(part["bias"] for part in (net["norm"], net["attention"], net["mlp"])) and cfg["model"]["net"]["tied"]


MEASURED = r"\d ?(%|dB)|bits/dim|distance \d|loss \d|perplexity|recall|thread|cores? of|\d (s|min|minutes)\b"
FIGURE = r"\d ?nats|IWAE"
SPLIT = r"\b(test|val|validation)\b"


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("experiment=")])
def test_an_experiments_header_leaves_measured_figures_to_the_page_of_results(case):
    """Figures come from records. Published ones, to compare with, name their split."""
    text = (ROOT / "conf" / "experiment" / f"{case.removeprefix('experiment=')}.yaml").read_text()
    lines = [line for line in text.splitlines() if line.startswith("#") and not line.startswith("#   ")]
    header = " ".join(line.removeprefix("#").strip() for line in lines)
    assert not re.search(MEASURED, header), header
    assert not re.search(FIGURE, header) or re.search(SPLIT, header)


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("experiment=")])
def test_what_an_experiment_says_holds(case):
    """Nothing composed after it changes what the file states."""

    def check(stated, composed_, path):
        for key, value in stated.items():
            if key != "defaults":
                if isinstance(value, dict):
                    check(value, composed_[key], f"{path}.{key}")
                else:
                    assert composed_[key] == value, f"{path}.{key}"

    path = ROOT / "conf" / "experiment" / f"{case.removeprefix('experiment=')}.yaml"
    check(OmegaConf.to_container(OmegaConf.load(path)), OmegaConf.to_container(compose_config("train", [case])), case)


def test_examples_are_of_the_declared_shapes():
    batch = synthetic_batch([3, 4, 6], "image", 10, 5)
    assert batch["image"].shape == (5, 3, 4, 6)
    assert batch["label"].tolist() == [0, 1, 2, 3, 4]
    assert np.abs(batch["image"]).max() <= 1
