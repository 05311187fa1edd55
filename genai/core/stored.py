"""Stored configs: MOVED maps the targets of older files to those of today, and a flag is set while objects are built
from a file.

An object built from a file only reads what exists: it downloads nothing, and writes nothing where the file says.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

Node = dict[str, Any]
"""A config node as plain values, with a `_target_` where it builds an object."""
PRETRAINED = "genai.checkpoint.pretrained"
"""Target of the one node for a module whose weights are another checkpoint's."""


DIFFUSION = "genai.models.diffusion"


def solver_node(solver: str, own: Node, **old_defaults: object) -> Callable[[Node], Node]:
    """Return a value of MOVED that turns the node of an old sampler function into the one sampler with that solver.

    `own` holds the solver's keys with their old defaults, and `old_defaults` those of keys that an older file may lack.
    """
    times = {"rho": 7.0, "shift": 1.0, "sigma_min": None, "sigma_max": None}
    target = {"_target_": f"{DIFFUSION}.sampling.tables.{solver}", "_partial_": True}

    def move(node: Node) -> Node:
        rest = {key: value for key, value in node.items() if key not in own}
        options = {**target, **{key: node.get(key, value) for key, value in own.items()}}
        return {**old_defaults, **times, **rest, "_target_": f"{DIFFUSION}.sampling.samplers.sample", "solver": options}

    return move


MOVED: dict[str, str | Callable[[Node], Node]] = {
    f"{DIFFUSION}.samplers.ddim": solver_node("ddim", {"eta": 0.0}, steps=50, spacing="trailing"),
    f"{DIFFUSION}.samplers.ddpm": solver_node("ddpm", {"variance": "small"}, steps=None, spacing="trailing"),
    f"{DIFFUSION}.samplers.heun": solver_node("heun", {"space": "sigma"}, steps=20, spacing="karras"),
    f"{DIFFUSION}.samplers.midpoint": solver_node("midpoint", {"space": "flow"}, steps=20, spacing="trailing"),
    f"{DIFFUSION}.samplers.dpmpp_2m": solver_node("dpmpp_2m", {"eta": 0.0}, steps=20, spacing="log_snr"),
    **{f"{DIFFUSION}.{name}": f"{DIFFUSION}.process.{name}" for name in ("paths", "schedules", "weightings")},
    **{f"{DIFFUSION}.{name}": f"{DIFFUSION}.nets.{name}" for name in ("dit", "levels", "mlp", "unet")},
    **{f"{DIFFUSION}.{name}": f"{DIFFUSION}.sampling.{name}" for name in ("samplers", "tables")},
    f"{DIFFUSION}.ode": f"{DIFFUSION}.likelihood.ode",
    f"{DIFFUSION}.text": "genai.nn.text_encoder",
    f"{DIFFUSION}.latent": "genai.nn.latent_space",
    "genai.models.gan.nets.BatchNorm": "genai.nn.norm.BatchNorm",
    "genai.models.autoregressive.gpt.Decoder": "genai.nn.token_transformer.TokenTransformer",
    "genai.nn.attention.Learned": "genai.nn.attention.LearnedPositions",
    "genai.nn.attention.Rotary": "genai.nn.attention.RotaryPositions",
    "genai.data.tokenizers": "genai.modalities.tokenizers",
    "genai.extractors": "genai.evaluation.features",
    "genai.evaluation.features.judge": "genai.evaluation.features.classifier",
}
"""Old `_target_` -> its name today or, where its keys change too, a function from the old node to the new, as `solver_node`
makes one; old module -> its name today, for every target in it that has no row of its own. Rows are never removed: old
files stay readable."""


RENAMED_OVERRIDES = {
    "extractor=judge": "extractor=classifier",
    "baseline=copier": "baseline=training_copy",
    "judge=network": "features=classifier",
    "judge=null": "features=null",
    "sampler=flow_euler": "sampler=ddim",
    "sampler=flow_heun": "sampler=heun",
    "sampler=flow_midpoint": "sampler=midpoint",
}
"""Old spelling of an override, on the command line or in a sweep's file -> its spelling today."""


def new_target(target: str) -> str | Callable[[Node], Node] | None:
    """Return the entry of MOVED for a target, None if there is none."""
    module, _, name = target.rpartition(".")
    found = MOVED.get(module)
    return MOVED.get(target, f"{found}.{name}" if isinstance(found, str) else None)


def up_to_date(node: object) -> Any:
    """Return a stored config, or a part of one, with every node translated by MOVED, inner nodes first; it is not
    changed."""
    if isinstance(node, list):
        return [up_to_date(value) for value in node]
    if not isinstance(node, dict):
        return node
    node, passed = {key: up_to_date(value) for key, value in node.items()}, set()
    while (
        type(target := node.get("_target_")) is str
        and target not in passed
        and (move := new_target(target)) is not None
    ):
        passed.add(target)  # a move may change keys and keep the target: it must not be applied twice
        node = move(node) if callable(move) else {**node, "_target_": move}
    return _name_first_stage(node) if "codec" in node and "model" in node else node


def _name_first_stage(config: Node) -> Node:
    """Return a run's config with the first stage named in its latent space; up to format 2 only `codec` named it."""
    codec, model = config["codec"], config["model"]
    latent = model.get("latent") if isinstance(model, dict) else None
    if not (isinstance(codec, dict) and isinstance(model, dict) and isinstance(latent, dict)):
        return config
    built = latent.get("codec")
    if not isinstance(built, dict) or built.get("_target_") == PRETRAINED:
        return config
    said = {key: codec.get(key) for key in ("ckpt", "sha256", "shape")}
    node = {"_target_": PRETRAINED, **said, "weights": "ema", "model": built}
    return {**config, "model": {**model, "latent": {**latent, "codec": node}}}


_building = ContextVar("building from a file", default=False)


@contextlib.contextmanager
def build_context() -> Iterator[None]:
    """Return a context in which `is_building` is true: objects built inside it come from a file."""
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def is_building() -> bool:
    """Return True if the caller is being built from a file, and not from what the user typed."""
    return _building.get()
