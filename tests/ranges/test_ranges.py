"""Every key of every config has a range; what is outside is one sentence, what is inside builds and takes a step."""

import copy
import functools
import random
import re

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import nn

from genai.checkpoint.build import build_typed
from genai.cli import apply, compose_config, keys
from genai.core import rng
from genai.core.errors import UserError, at_least, number
from genai.core.protocols import AdversarialModel, check_sampler, with_items
from genai.data.base import synthetic_batch
from genai.ranges import check as ranges
from genai.ranges.kinds import Choice, Many, Number, Text
from genai.ranges.table import RANGES
from genai.train.optim import set_lr
from tests.conftest import ROOT
from tests.test_configs import MODELS, shrink

CONF = ROOT / "conf"
SCRIPTS = ("train", "sample", "evaluate", "baselines")
GROUPS = {  # group -> the script that composes it
    **dict.fromkeys(("data", "optim", "logger", "callbacks", "model", "experiment"), "train"),
    **{"sampler": "sample", "extractor": "evaluate", "likelihood": "evaluate", "baseline": "baselines"},
}
VALUES = ("-1", "0", "1.5", "1e30", "nan", "inf", "null", "''", "[]", "[1,2]", "true", __file__)
FREE = {"hydra", "sweep"}  # Hydra's own, and settings whose values are those of other keys


def files():
    """(path, script, the file's content where the script has it)."""
    for path in sorted(CONF.rglob("*.yaml")):
        group, node = path.relative_to(CONF).parts[0], OmegaConf.load(path)
        if group in FREE or group == "metrics.yaml":  # nodes that names stand for
            continue
        for key in ("defaults", "hydra"):
            node.pop(key, None)
        if path.parent == CONF:
            yield path, path.stem, node
        elif group in ("model", "experiment"):
            yield path, "train", node
        else:
            yield path, GROUPS[group], OmegaConf.create({group: node})


def without_range(node, script):
    """Keys of a config that nothing is said of, those that refer to others included."""
    raw = OmegaConf.create(_plain(OmegaConf.to_container(node)))
    return [leaf.key for leaf in ranges.leaves(raw, script) if ranges.range_of(*leaf.names) is None]


def _plain(node):
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return "referred" if isinstance(node, str) and "${" in node else node


def test_every_key_of_every_config_has_a_range():
    missing = {
        str(path.relative_to(ROOT)): keys for path, script, node in files() if (keys := without_range(node, script))
    }
    assert not missing, f"give these a row in genai/ranges/table.py: {missing}"


def test_a_key_without_a_range_is_found():
    node = OmegaConf.create({"model": {"_target_": "genai.models.vae.vae.VAE", "wings": 3}})
    assert without_range(node, "train") == ["model.wings"]


def test_every_row_is_of_some_key():
    known = [
        leaf
        for _, script, node in files()
        for leaf in ranges.leaves(OmegaConf.create(_plain(OmegaConf.to_container(node))), script)
    ]
    known += [ranges.Leaf(f"sweep.{key}", (f"sweep.{key}",), 0) for key in SWEEP]
    part = {"_target_": "genai.models.vae.quantize.FiniteScalarQuantizer", "levels": [2]}
    distance = {"_target_": "genai.losses.perceptual.LPIPS", "net": "vgg"}
    teacher = {"_target_": "genai.checkpoint.pretrained", "frozen": False, "part": "net"}
    chosen = {"model": {"quantizer": part, "perceptual": distance, "teacher": teacher}}  # in no file, but by hand
    known += ranges.leaves(OmegaConf.create(chosen), "train")
    used = {"preview"}  # the place of a sampler in configs of some models
    for leaf in known:
        keys = [name.split(".") for name in leaf.names]
        used.add(next((row for row in RANGES if any(ranges.matches(row.split("."), key) for key in keys)), None))
    assert set(RANGES) - used == set()


SWEEP = (
    *("search", "direction", "name", "metric", "overrides", "trials", "batch", "seed"),
    *(f"over.optim.lr.{end}" for end in ("low", "high", "step", "log")),
)


@functools.cache
def base(model):
    return compose_config("train", [f"model={model}", *MODELS.get(model, [])])


def bases(models, groups=GROUPS):
    """(name, script, config) of all that is composed from the shipped files, each group once with all of its choices."""
    yield from ((name, "train", base(name)) for name in models)
    others = {name: compose_config(name, ["sampler=ddim"] if name == "sample" else []) for name in SCRIPTS}
    yield from ((name, name, others[name]) for name in SCRIPTS)
    for group in groups:
        if group not in ("model", "experiment", "callbacks"):
            for path in sorted(CONF.glob(f"{group}/*.yaml")):
                cfg = copy.deepcopy(others[GROUPS[group]])
                cfg[group] = OmegaConf.load(path)
                yield f"{group}={path.stem}", GROUPS[group], cfg


def cases(models, groups=GROUPS):
    """(name, script, config, key) of every key in every config, each once for each class that takes it."""
    seen = set()
    for name, script, cfg in bases(models, groups):
        raw = OmegaConf.create(_plain(OmegaConf.to_container(cfg)))
        for leaf in ranges.leaves(raw, script):
            owner = (script if "." not in leaf.key else "", *leaf.names)
            if owner not in seen and "[" not in leaf.key:
                seen.add(owner)
                yield name, script, cfg, leaf.key


@functools.cache
def override(key, text):
    return OverridesParser.create().parse_overrides([f"{key}={text}"])[0]


def changed(cfg: DictConfig, script: str, key: str, text: str) -> DictConfig:
    """The config with one value given on the command line, checked. Raises UserError."""
    mine, given = copy.deepcopy(cfg), override(key, text)
    apply(mine, given)
    ranges.check(mine, script, [given])
    return mine


FITS = {  # a model for each sampler that sample.py may choose
    "gan": "gan",
    "style_mix": "stylegan2",
    "generate": "gpt",
    "beam": "gpt",
    "speculative": "gpt",
    "prior": "vae",
    "reconstruct": "vae",
    "traverse": "vae",
    "interpolate": "vae",
    "random_latents": "vqvae",
    "heun": "edm",
    "midpoint": "edm",
    "euler": "edm",
    "euler_ancestral": "edm",
}


def tiny(cfg):
    """The same wiring, narrow, over data of a declared shape; the config as `train.run` resolves it."""
    cfg.data.shape = cfg.data.shape or ([5] if cfg.data.field == "tokens" else [3, 8, 8])
    if cfg.data.field == "tokens":
        cfg.data.levels = cfg.data.levels or 11
    if "source_levels" in cfg.data:
        cfg.data.source_levels = cfg.data.source_levels or 11
    shrink(cfg.model)
    if "sigma_data" in cfg.model and cfg.model.sigma_data is None:
        cfg.model.sigma_data = 0.5
    for node in (cfg.sampler, cfg.get("preview") or {}):
        if isinstance(node.get("steps"), int):
            node.steps = 2
    if "steps" in cfg.model.get("schedule", ()):
        cfg.model.schedule.steps = 2
    ranges.check_agreement(cfg)
    return OmegaConf.to_container(cfg, resolve=True)


def step_and_sample(cfg):
    """Build the model and its sampler, take a gradient of each loss, and draw two samples."""
    config = tiny(cfg)
    data = config["data"]
    batch = {
        k: torch.as_tensor(v) for k, v in synthetic_batch(data["shape"], data["field"], data["classes"], 4).items()
    }
    torch.manual_seed(0)
    model = build_typed(config["model"])
    sampler = build_typed(config["sampler"])
    assert isinstance(model, nn.Module)
    if isinstance(model, AdversarialModel):
        fake = model.generate(batch, 0)
        model.discriminator_loss(batch, {name: x.detach() for name, x in fake.items()}, 0).total.backward()
        model.generator_loss(batch, fake, 0).total.backward()
    else:
        model(batch, 0).total.backward()
    model.eval().requires_grad_(False)
    check_sampler(sampler, model)
    cond = {"label": batch["label"][:2]} if "label" in batch else None
    items = lambda split, index, *_: batch[data["field"]][index % 4]  # noqa: E731
    sampled = with_items(sampler, items)(model, rng.seed_range(0, 2), cond, lambda *_: None)
    assert all(len(value) == 2 for value in sampled.values())


def optimise(node):
    """One update of a small network by the optimiser of a node."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = build_typed(node)(net)
    net(torch.ones(1, 3)).sum().backward()
    set_lr(optimizer, 0)
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def built(name: str, script: str, cfg: DictConfig, key: str) -> None:
    """Build what a key belongs to and use it once. Raises UserError for what its range alone cannot tell."""
    head, config = key.partition(".")[0], OmegaConf.to_container(cfg)
    if head in ("model", "codec", "preview") or (head == "sampler" and script == "train"):
        if head == "preview":
            cfg.sampler = cfg.preview
        step_and_sample(cfg)
    elif head == "sampler":
        mine = copy.deepcopy(base(FITS.get(name.rpartition("=")[2], "ddpm_mlp")))
        mine.sampler = cfg.sampler
        step_and_sample(mine)
    elif head in ("optim", "discriminator_optim"):
        optimise(OmegaConf.to_container(cfg[head], resolve=True))
    elif head == "ema":
        ema = build_typed(config["ema"])(nn.Linear(2, 2))
        ema.update()
    elif head == "callbacks" and cfg.callbacks is not None:
        for node in OmegaConf.to_container(cfg, resolve=True)["callbacks"].values():
            build_typed(node) if node is not None else None
    elif head in ("data", "extractor", "likelihood", "baseline"):
        build_typed(OmegaConf.to_container(cfg[head], resolve=True)) if cfg[head] is not None else None


def tried(name, script, cfg, key, text):
    """ "built", or the sentence that one value of one key is refused with; any other exception is the test's."""
    try:
        mine = changed(cfg, script, key, text)
    except UserError as error:
        return str(error)
    try:
        built(name, script, mine, key)
    except UserError as error:
        return str(error)
    return "built"


def sentences(found):
    """How many were refused, each by one line that names the key (or one it belongs to)."""
    refused = [(key, said) for key, said in found if said != "built"]
    for key, said in refused:
        assert said and "\n" not in said, (key, said)
    return len(refused)


def test_a_sample_of_values_of_every_kind_is_refused_by_a_sentence_or_builds(tmp_path, monkeypatch):
    """The nightly test below takes all models and all values."""
    monkeypatch.chdir(tmp_path)
    every = list(cases(("ddpm_mlp", "gan", "gpt_nano", "vae"), ("optim", "sampler")))
    draw = random.Random(0)
    chosen = [(*case, text) for case in draw.sample(every, 90) for text in draw.sample(VALUES, 2)]
    found = [(case[3], tried(*case)) for case in chosen]
    assert 100 < sentences(found) < len(found) - 5


@pytest.mark.slow
def test_every_value_of_every_key_is_refused_by_a_sentence_or_builds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = list(cases([path.stem for path in sorted(CONF.glob("model/*.yaml"))]))
    found = [(case[3], tried(*case, text)) for case in every for text in VALUES]
    refused = sentences(found)
    print(f"{len(every)} keys, {len(found)} values: {refused} sentences, {len(found) - refused} built")
    assert len(found) > 8000 and refused > 7000


def test_no_number_of_any_config_may_be_nan_or_infinite_and_no_text_empty():
    many = [range_.each for range_ in RANGES.values() if isinstance(range_, Many)]
    rows = [range_ for range_ in (*RANGES.values(), *many) if isinstance(range_, Number | Text | Choice)]
    wrong = (float("nan"), float("inf"), float("-inf"), 1e30, 10**30, "", " ", [], {})
    assert not [(range_, value) for range_ in rows for value in wrong if range_.holds(value)]


REFUSED = {  # a command -> the sentence that refuses it
    "clip_norm=0": "clip_norm=0 must be a number greater than 0 and at most 10^6, or null",
    "clip_norm=-1": "clip_norm=-1 must be",
    "ema.power=nan": "ema.power=nan must be a number greater than 0",
    "ema.decay=1 ema.power=null": "ema.decay=1 with ema.power=null never moves",
    "optim.decay_steps=100": "optim.warmup_steps=100 must be below optim.decay_steps=100 steps",
    "optim.warmup_steps=5000": "optim.warmup_steps=5000 must be below optim.decay_steps=1200 steps",
    "optim.warmup_steps=-5": "optim.warmup_steps=-5 must be a whole number of steps, at least 0",
    "optim.warmup_steps=1.5": "optim.warmup_steps=1.5 must be a whole number of steps",
    "optim.lr_min=-1": "optim.lr_min=-1 must be a number at least 0",
    "optim.lr_min=0.1": "optim.lr_min=0.1 must be at most optim.lr=0.002",
    "optim.lr=nan": "optim.lr=nan must be a number greater than 0 and at most 1000",
    "optim.lr=1e9": "optim.lr=1000000000.0 must be a number",
    "optim.lr=null": "optim.lr=null must be a number",
    "optim.betas=[0.9]": "optim.betas=[0.9] must be a list like [a,b] of 2 values",
    "optim.betas=[0.9,1]": "each a number at least 0 and below 1",
    "callbacks.evaluate.n=0": "callbacks.evaluate.n=0 must be a whole number of items, at least 1",
    "callbacks.save.every_steps=-1": "must be a whole number of steps, at least 1 and at most 10^12, or null",
    "+callbacks.mine=5": "callbacks.mine=5 must be a node with a _target_",
    "model.clip=-1": "model.clip=-1 must be a number greater than 0",
    "model.net.blocks=0": "model.net.blocks=0 must be a whole number of blocks, at least 1",
    "model.net.channels=0": "model.net.channels=0 must be a whole number of channels",
    "model.net.multipliers=[]": "model.net.multipliers=[] must be a list",
    "model.classes=5": "model.classes=5 must be what data.classes is, 10: give both the same",
    "model.net.classes=null": "model.net.classes=null must be what model.classes is, 10",
    "model.net.shape=[1,9,9]": "model.net.shape=[1, 9, 9] must be what model.shape is, [1, 8, 8]",
    "model.field=nope": "model.field=nope must be what data.field is, image",
    "model.variance=medium": "model.variance=medium must be one of small, large",
    "max_steps=1e30": "max_steps=1e+30 must be a whole number of steps, at least 1 and at most 10^12",
    "data.batch_size=1e12": "data.batch_size=1000000000000 must be a whole number of items in memory",
    "seed=9223372036854775808": "seed=9223372036854775808 must be a whole number, at least 0 and at most 2^63 - 1",
    "run_dir=''": "run_dir= must be a path, or null",
    "init_from=5": "init_from=5 must be a path, or null",
    "trust=5": "trust=5 must be the name of a package",
    "+image=cat.jpg": "nothing reads image=cat.jpg: leave it out",
    "+trainer.strategy=ddp": "nothing reads trainer.strategy=ddp",
    "image=cat.jpg": "there is no key image (--help lists all)",
}


@pytest.mark.parametrize("command", REFUSED)
def test_wrong_numbers_are_refused_with_their_range(command, train_config):
    with pytest.raises(UserError) as refused:
        given_to(train_config, command.split(" "))
    assert REFUSED[command] in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model=seq2seq", "model.length=-1"], "model.length=-1 must be a whole number"),
        (["model=seq2seq", "model.length=1.5"], "model.length=1.5 must be a whole number"),
        (["model=gpt", "data.shape=null", "model.length=7"], "data.shape=null must be a list"),
    ],
    ids=str,
)
def test_a_value_in_place_of_what_the_data_is_still_to_say_is_checked(given, message):
    with pytest.raises(UserError, match=message):
        compose_config("train", given)


RIGHT = (
    *(
        "seed=9223372036854775807",
        "max_steps=10",
        "debug=true",
        "optim.decay_steps=null",
        "clip_norm=null",
        "ema.decay=1",
    ),
    *(
        "callbacks.save=null",
        "+model.net.depth=3",
        "model.net.attention_depths=[]",
        "max_steps=1e12",
        "++seed=1",
        "+seed=1",
    ),
    "+callbacks.mine={_target_: my_lab.Mine, width: 0.5}",
)


@pytest.mark.parametrize("command", RIGHT)
def test_right_numbers_are_not(command, train_config):
    given_to(train_config, [command])


@pytest.fixture(scope="module")
def train_config():
    return compose_config("train", [])


def given_to(cfg, lines):
    mine, parsed = copy.deepcopy(cfg), OverridesParser.create().parse_overrides(list(lines))
    before = set(keys(mine))
    for one in parsed:
        apply(mine, one)
    ranges.check(mine, "train", parsed, before)


def test_what_is_built_from_another_package_is_its_author_s_business():
    node = {"_target_": "my_lab.Net", "width": 0.5, "inner": {"layers": -1}}
    assert [leaf.key for leaf in ranges.leaves(OmegaConf.create({"model": node}), "train")] == ["model"]


def test_a_resumed_run_goes_on_with_what_it_began_with(train_config):
    mine = copy.deepcopy(train_config)
    mine.clip_norm, mine.resume = -1.0, "runs/old"
    ranges.check(mine, "train", [override("resume", "runs/old")])
    apply(mine, override("max_steps", "-3"))
    with pytest.raises(UserError, match="max_steps=-3"):
        ranges.check(mine, "train", [override("resume", "runs/old"), override("max_steps", "-3")])


def test_classes_are_compared_again_when_the_data_has_said_how_many(train_config):
    mine = copy.deepcopy(train_config)
    mine.data.classes, mine.model.classes, mine.model.net.classes = None, 5, 5
    ranges.check(mine, "train")
    mine.data.classes = 10
    with pytest.raises(UserError, match=r"model\.classes=5 must be what data\.classes is, 10"):
        ranges.check_agreement(mine)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, -1])
def test_a_number_is_finite_and_a_whole_one_fits_a_tensor(value):
    shown = repr(value)
    with pytest.raises(UserError, match=f"n={shown} must be"):
        number(value, "n", 0)
    with pytest.raises(UserError, match=f"n={shown} must be"):
        at_least(value, 0, "n")
    assert at_least(2**63 - 1, 0, "seed") == 2**63 - 1
    with pytest.raises(UserError, match=r"at most 2\^63 - 1"):
        at_least(2**63, 0, "seed")


def test_numbers_of_numpy_are_numbers_and_what_is_none_is_named_by_its_type():
    assert type(at_least(np.int64(2), 1, "n")) is int and type(number(np.float32(0.5), "n", 0)) is float
    assert number(np.int64(2), "n", 0) == 2
    for value in (np.array([1, 2]), torch.ones(2), nn.Sequential(*[nn.Linear(1, 1)] * 3)):
        with pytest.raises(UserError, match=r"n=.* must be a whole number"):
            at_least(value, 0, "n")
        with pytest.raises(UserError, match=r"n=.* must be a number"):
            number(value, "n", 0)
    with pytest.raises(UserError, match="n=a value of type Sequential must be"):
        at_least(nn.Sequential(nn.Linear(1, 1)), 1, "n")


def test_a_config_name_is_not_passed_over(refused):
    assert "--config-name and --config-path have no effect here" in refused("train.py", "--config-name", "nope")


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ({"low": 1e-4, "high": 1e-2, "log": True}, None),
        ({"low": 1e-2, "high": 1e-4}, "sweep.over.optim.lr.low=0.01 must be below its high=0.0001"),
        ({"low": float("nan"), "high": 1}, "sweep.over.optim.lr.low=nan must be a number"),
        ({"low": 0, "high": 1, "step": 0}, "sweep.over.optim.lr.step=0 must be a number greater than 0"),
    ],
)
def test_the_ends_of_an_axis_of_a_sweep(axis, said):
    cfg = OmegaConf.create({"sweep": {"name": "a", "search": "optuna", "over": {"optim.lr": axis}}})
    if said is None:
        return ranges.check(cfg, "train")
    with pytest.raises(UserError, match=re.escape(said)):
        ranges.check(cfg, "train")
