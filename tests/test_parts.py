"""Parts stand in for each other: every `_target_` of every model, changed on the command line to whatever fits its place."""

import collections.abc
import copy
import functools
import importlib
import inspect
import pkgutil
import random
import re
import types
import typing

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import nn

import genai
from genai import cli, nodes, sampling
from genai.checkpoint import Loaded
from genai.checkpoint.build import build_stored
from genai.cli import apply_all, compose_config, keys, new_keys, prepare_training
from genai.core.errors import UserError
from genai.modalities.image import Image
from genai.ranges import check as ranges
from tests.conftest import ROOT
from tests.ranges.test_ranges import base, step_and_sample

ROOMS = ("models", "nn", "losses")


def public():
    """Every public class and function of the rooms of parts, by its dotted name."""
    found = {}
    for module in pkgutil.walk_packages(genai.__path__, "genai."):
        if module.name.removeprefix("genai.").startswith(ROOMS) and "triton" not in module.name:
            for name, part in vars(importlib.import_module(module.name)).items():
                own = getattr(part, "__module__", None) == module.name and not name.startswith("_")
                if own and (inspect.isclass(part) or inspect.isfunction(part)):
                    found[f"{module.name}.{name}"] = part
    return found


PUBLIC = public()


def annotated(owner, argument):
    """What an argument is annotated to be, without None; of a callable what it returns."""
    function = owner.__init__ if inspect.isclass(owner) else owner
    hint = typing.get_type_hints(function).get(argument)
    kinds = [k for k in (typing.get_args(hint) if _is_union(hint) else [hint]) if k is not types.NoneType]
    (kind,) = kinds if len(kinds) == 1 else (None,)
    return typing.get_args(kind)[1] if typing.get_origin(kind) is collections.abc.Callable else kind


def _is_union(hint):
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def returned(function):
    try:
        return typing.get_type_hints(function).get("return")
    except NameError:  # a type that only a checker imports
        return None


@functools.cache
def inner(part):
    """What others of its module inherit from or make themselves: a base, a block, a helper, and no part that is chosen."""
    source = inspect.getsource(inspect.getmodule(part))
    made = re.search(rf"(?<!class )(?<!def )(?<![\w.]){part.__name__}\(", source)
    base = getattr(part, "_is_protocol", False) or "raise NotImplementedError" in inspect.getsource(part)
    return bool(made or (inspect.isclass(part) and base))


def used_as(part, partial):
    """How a part is used: the kind of thing, what it is built from where another part builds it, and what its call takes."""
    if inspect.isfunction(part):
        taken = [name for name, p in inspect.signature(part).parameters.items() if p.default is p.empty]
        return ("function", tuple(taken) if partial else (), str(inspect.signature(part).return_annotation))
    forward = inspect.signature(part.forward) if hasattr(part, "forward") else inspect.Signature()
    first = next(iter(nodes.parameters(f"{part.__module__}.{part.__qualname__}")), None) if partial else None
    return ("class", first, tuple(forward.parameters), str(forward.return_annotation))


def family(part):
    return ".".join(part.__module__.split(".")[: 3 if ".models." in part.__module__ else 2])


def fits(target, owner, argument, partial):
    """The public parts, other than `target`, that may stand where it does.

    Where the argument is annotated with a class or a protocol of the project: what is, returns or has all of that. Where it is
    any module or function: what is used alike and lies in the same family.
    """
    role, part = annotated(owner, argument), PUBLIC[target]
    ours = inspect.isclass(role) and role.__module__.startswith("genai.")
    for name, other in PUBLIC.items():
        if name == target or inner(other):
            continue
        if ours and getattr(role, "_is_protocol", False):
            members = {*vars(role).get("__annotations__", ()), *(k for k in vars(role) if not k.startswith("_"))}
            alike = inspect.isclass(other) and all(hasattr(other, member) for member in members)
        elif ours:
            made = other if inspect.isclass(other) else returned(other)
            alike = inspect.isclass(made) and issubclass(made, role) and inspect.isclass(other) == inspect.isclass(part)
        else:
            alike = family(other) == family(part) and used_as(other, partial) == used_as(part, partial)
        if alike:
            yield name


def places(node, path="model", owner=None):
    """(path, target, the class or function it is an argument of, its name there, whether it is partial)."""
    for name, value in node.items_ex(resolve=False):
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            target = value.get("_target_")
            if owner is not None and target in PUBLIC:
                yield f"{path}.{name}", target, owner, name, bool(value.get("_partial_"))
            yield from places(value, f"{path}.{name}", PUBLIC.get(target))


STAGE = "{_target_: genai.models.vae.quantize.VectorQuantizer, codes: 8, dim: 16}"
NEEDS = {  # a part -> what a person types besides its name, where @ is its path
    "diffusion.process.schedules.zero_terminal_snr": [
        "@.schedule._target_=genai.models.diffusion.process.schedules.cosine",
        "@.schedule.steps=2",
        "model.parameterization=v",
    ],
    "diffusion.nets.dit.DiT": ["@.patch=2", "@.width=24", "@.layers=2", "@.heads=2"],
    "gan.stylegan2_nets.Discriminator": ["@.widths=[8]", "@.group=1"],
    "diffusion.nets.unet.UNet": ["@.channels=8", "@.multipliers=[1]", "@.blocks=1"],
    "vae.quantize.FiniteScalarQuantizer": ["@.levels=[4,3,2]", "model.map_shape=[3,2,2]", "model.encoder.outputs=3"],
    "vae.quantize.ResidualQuantizer": [f"@.stages=[{STAGE},{STAGE}]"],
    "vae.likelihoods.Bernoulli": ["model.decoder.outputs=1"],
    "vae.likelihoods.Gaussian": ["model.decoder.outputs=1", "model.levels=null", "data.levels=null"],
    "vae.likelihoods.DiscretizedLogistic": [
        "@.levels=17",
        "model.decoder.outputs=2",
        "model.levels=17",
        "data.levels=17",
    ],
    "vae.likelihoods.Categorical": ["@.levels=17", "model.decoder.outputs=17", "model.levels=17", "data.levels=17"],
    "nn.attention.LearnedPositions": ["@.length=4096"],
    "nn.attention.PeriodicPositions": ["@.period=16"],
    "nn.transformer.MLP": ["@.activation._target_=genai.nn.transformer.GELU"],
}


def swaps(models):
    """(model, path, the part's present target, a target that fits there) of every part of these models."""
    for name in models:
        cfg = base(name)
        for path, target, owner, argument, partial in places(cfg.model, owner=PUBLIC[cfg.model._target_]):
            for other in fits(target, owner, argument, partial):
                yield name, path, target, other


def outcome(model, path, target):
    """ "built" where the model with another part takes a step and is sampled, else the sentence that it is refused with.

    With no more typed than the part's name, or else with all that it needs; any other exception is the test's.
    """
    needs = NEEDS.get(target.removeprefix("genai.").removeprefix("models."), [])
    for typed in ([], needs) if needs else ([],):
        mine = copy.deepcopy(base(model))
        overrides = [f"{path}._target_={target}", *(text.replace("@", path) for text in typed)]
        overrides = OverridesParser.create().parse_overrides(overrides)
        before = set(keys(mine))
        try:
            apply_all(mine, overrides, {})
            ranges.check(mine, "train", overrides, before)
            step_and_sample(mine)
        except UserError as error:
            said = str(error)
            assert said and "\n" not in said
        else:
            return "built"
    return said


ALL = [file.stem for file in sorted((ROOT / "conf" / "model").glob("*.yaml"))]


@pytest.mark.slow
def test_every_part_of_every_model_gives_way_to_whatever_fits_or_says_why_not():
    """And no part is out of reach: each is built in some place."""
    found = [(*swap, outcome(swap[0], swap[1], swap[3])) for swap in swaps(ALL)]
    built = {row[3] for row in found if row[4] == "built"}
    n = sum(row[4] == "built" for row in found)
    print(f"{len(found)} swaps: {n} built, {len(found) - n} refused by a sentence")
    assert {row[3] for row in found} - built - {row[2] for row in found} == set()
    assert len(found) > 130 and n > 90


NAMED = {  # parts that no file of conf/ chooses, or not in this place
    "ddpm": ("model.schedule", "genai.models.diffusion.process.schedules.zero_terminal_snr"),
    "vqvae": ("model.quantizer", "genai.models.vae.quantize.FiniteScalarQuantizer"),
    "vae": ("model.likelihood", "genai.models.vae.likelihoods.Gaussian"),
    "vae_binary": ("model.likelihood", "genai.models.vae.likelihoods.DiscretizedLogistic"),
    "gpt_nano": ("model.net.transformer.mlp", "genai.nn.transformer.SwiGLU"),
    "gpt": ("model.net.transformer.position", "genai.nn.attention.LearnedPositions"),
}


@pytest.mark.parametrize("model", NAMED)
def test_parts_are_chosen_by_their_name_and_what_they_need(model):
    assert outcome(model, *NAMED[model]) == "built"


def test_a_sample_of_swaps_builds_or_says_why_not():
    """The nightly test above takes all."""
    every = list(swaps(["ddpm", "vqvae", "vae", "gan"]))
    assert (
        "vqvae",
        "model.quantizer",
        "genai.models.vae.quantize.VectorQuantizer",
        "genai.models.vae.quantize.ResidualQuantizer",
    ) in every
    chosen = random.Random(0).sample(every, 10)
    assert sum(outcome(model, path, target) == "built" for model, path, _, target in chosen) >= 5


# How a node is replaced

Q, S = "genai.models.vae.quantize", "genai.models.diffusion.process.schedules"
WIDE = {"_target_": f"{S}.karras", "steps": 200, "rho": 5}
REPLACED = [  # what is typed -> what becomes of a node
    ([f"model.schedule._target_={S}.karras", "model.schedule.rho=5"], "model.schedule", WIDE),
    (["model.schedule.rho=5", f"model.schedule._target_={S}.karras"], "model.schedule", WIDE),
    ([f"model.schedule={{_target_: {S}.karras, rho: 5}}"], "model.schedule", WIDE),
    (
        [f"model.schedule={{_target_: {S}.cosine, beta_max: 0.9}}"],
        "model.schedule",
        {"_target_": f"{S}.cosine", "steps": 200, "beta_max": 0.9},
    ),
    (
        [
            "model.schedule.schedule.steps=9",
            f"model.schedule.schedule._target_={S}.cosine",
            f"model.schedule._target_={S}.zero_terminal_snr",
        ],
        "model.schedule",
        {"_target_": f"{S}.zero_terminal_snr", "schedule": {"_target_": f"{S}.cosine", "steps": 9}},
    ),
    (
        ["model=vqvae", f"model.quantizer._target_={Q}.FiniteScalarQuantizer", "model.quantizer.levels=[5,5]"],
        "model.quantizer",
        {"_target_": f"{Q}.FiniteScalarQuantizer", "levels": [5, 5]},
    ),
    (
        [
            "model=autoencoder",
            "model.perceptual.layers=2",
            "model.perceptual.shape=[1,8,8]",
            "model.perceptual._target_=genai.losses.perceptual.RandomFeatures",
        ],
        "model.perceptual",
        {"_target_": "genai.losses.perceptual.RandomFeatures", "layers": 2, "shape": [1, 8, 8]},
    ),
]


@pytest.mark.parametrize(("typed", "path", "node"), REPLACED, ids=str)
def test_a_changed_target_replaces_the_node(typed, path, node):
    assert OmegaConf.to_container(OmegaConf.select(compose_config("train", typed), path)) == node


REFUSED = {
    f"model.schedule._target_={S}.zero_terminal_snr": (
        f"model.schedule._target_={S}.zero_terminal_snr needs schedule: add model.schedule.schedule="
    ),
    f"model.schedule._target_={S}.karras model.schedule.offset=1": "there is no key model.schedule.offset",
    f"model.schedule={{_target_:{S}.karras,offset:1}}": f"model.schedule.offset is nothing that {S}.karras takes: it takes",
    f"model.schedule._target_={S}.karas": f"model.schedule._target_={S}.karas cannot be found",
    f"model.schedule._target_={S}": f"model.schedule._target_={S} is not a class or function",
    "model.schedule._target_=3": "model.schedule._target_=3 must be the dotted name",
    f"resume=runs/x model.schedule._target_={S}.karras": "resume=runs/x is neither a run directory nor",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_a_part_lacks_or_does_not_take_is_one_sentence(typed):
    with pytest.raises(UserError) as refused:
        compose_config("train", typed.split(), prepare_training)
    assert REFUSED[typed] in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_change_a_target_replace_the_node_too(tmp_path):
    """An experiment over a model, and a model over another, both of one's own."""
    for name, text in {
        "experiment/tokens": f"""
            # @package _global_
            defaults: [{{override /model: vqvae}}]
            model: {{quantizer: {{_target_: {Q}.FiniteScalarQuantizer, levels: [8, 5]}}}}
            """,
        "model/tall": f"""
            # @package _global_
            defaults: [ddpm, _self_]
            model: {{schedule: {{_target_: {S}.karras, rho: 3}}}}
            """,
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(inspect.cleandoc(text))
    tokens = compose_config("train", ["experiment=tokens"], config_dir=str(tmp_path))
    assert tokens.model.quantizer == {"_target_": f"{Q}.FiniteScalarQuantizer", "levels": [8, 5]}
    tall = compose_config("train", ["model=tall", "model.schedule.sigma_max=9"], config_dir=str(tmp_path))
    assert tall.model.schedule == {"_target_": f"{S}.karras", "steps": 200, "rho": 3, "sigma_max": 9}
    loss = compose_config("train", ["experiment=dcgan_mnist"]).model.loss
    assert loss == {"_target_": "genai.losses.adversarial.Relativistic"}


def test_the_config_that_is_printed_is_the_one_that_trains(monkeypatch, capsys):
    typed = ["model=vqvae", f"model.quantizer._target_={Q}.FiniteScalarQuantizer", "model.quantizer.levels=[5,5]"]
    monkeypatch.setattr("sys.argv", ["train.py", *typed, "--cfg", "job"])
    cli.main(lambda cfg: pytest.fail("trained"), "train", prepare_training)
    assert OmegaConf.create(capsys.readouterr().out) == compose_config("train", typed, prepare_training)


def test_a_sweep_takes_keys_of_a_changed_target():
    typed = [
        "model=vqvae",
        f"model.quantizer._target_={Q}.FiniteScalarQuantizer",
        "model.quantizer.levels=[8,5]",
        "seed=0,1",
    ]
    assert compose_config("train", typed, sweep=True).model.quantizer.levels == [8, 5]
    assert list(new_keys("train", typed, None)) == ["model.quantizer.levels=[8,5]"]
    job = ["model=vqvae", typed[1], "++model.quantizer.levels=[8,5]", "seed=1"]
    assert compose_config("train", job).model.quantizer.levels == [8, 5]


# Which models a sampler is for


def test_every_sampler_says_which_models_it_is_for():
    for name, part in PUBLIC.items():
        if inspect.isfunction(part) and list(inspect.signature(part).parameters)[:4] == [
            "model",
            "seeds",
            "cond",
            "on_step",
        ]:
            assert part.model_types, name


SAMPLERS = """
from __future__ import annotations
from typing import TYPE_CHECKING
from genai.core.protocols import for_models
if TYPE_CHECKING:
    from genai.models.diffusion.base import Diffusion
from genai.models.vae.vae import VAE

def plain(model: Diffusion, seeds, cond=None, on_step=None, items=None):
    return {"image": model.field}

class Callable:
    def __init__(self, steps: int = 1):
        self.steps = steps

    def __call__(self, model: Diffusion, seeds, cond=None, on_step=None):
        return {"image": (model.field, self.steps)}

@for_models(VAE)
def marked(model, seeds, cond=None, on_step=None):
    return {}

@for_models(VAE)
class Marked(Callable):
    pass
"""


def test_samplers_of_ones_own(tmp_path, monkeypatch):
    """Functions whose types only a checker imports, objects that are called, partials of both; admitted by trust=."""
    (tmp_path / "my_samplers.py").write_text(SAMPLERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = nn.Linear(1, 1)
    model.field = "image"
    loaded = Loaded(model, {"data": {}}, Image(), {}, 0, tmp_path / "x.ckpt", ("my_samplers",))
    nodes_ = {"plain": {"_partial_": True}, "Callable": {"steps": 3}}
    for name, more in nodes_.items():
        node = {"_target_": f"my_samplers.{name}", **more}
        with pytest.raises(UserError, match="add trust=my_samplers"):
            build_stored(node)
        sampled = sampling.bind(loaded, node, {})(model, torch.arange(2))["image"]
        assert sampled == ("image" if name == "plain" else ("image", 3))
    for name, more in {"marked": {"_partial_": True}, "Marked": {}}.items():
        with pytest.raises(UserError, match=f"the sampler {name} is for a VAE, and this model is a Linear"):
            sampling.bind(loaded, {"_target_": f"my_samplers.{name}", **more}, {})
