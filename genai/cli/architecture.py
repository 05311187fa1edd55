"""The architecture of the run that a new one starts from with init_from=, so that its weights fit."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from genai import nodes
from genai.cli.overrides import PATHS, parse_override, quote
from genai.cli.stored import find_run, stored_config
from genai.core.errors import UserError
from genai.core.stored import PRETRAINED

GROUPS = "model", "codec", "loop", "sampler"
ADVERSARIAL = "optim", "discriminator_optim", "clip_norm"
"""Keys that are inherited as well from a run with two optimisers, which the defaults for one optimiser do not suit."""
CHOICES = ("tokenizer", "vocab_size", "shape"), ("size", "channels"), ("length",)
"""Keys of data that determine the shapes of weights. Those of one tuple are inherited if the new data has all of them."""


def inherit_architecture(cfg: DictConfig, overrides: list[Override]) -> list[Override]:
    """Put the model, loop and sampler of the run or checkpoint that init_from= names into cfg.

    Nothing is done without init_from=, or if model=, model._target_= or experiment= is given. Keys of data that determine the
    shapes of weights are inherited as well. Other keys of the command line are applied later and win.

    Returns:
        the overrides, of which init_from= now names a run directory or file.

    Raises:
        UserError: there is no such run, it names a class that a file may not build, or it was trained on another data set and
            data= is not given.
    """
    given = {o.key_or_group: o for o in overrides}
    source = given["init_from"].value() if "init_from" in given else None
    if source is None or {"model", "model._target_", "experiment"} & given.keys():
        return overrides
    source = os.path.expanduser(str(source))
    if os.path.isdir(source) and (run := find_run(Path(source), "init_from")) is not None:
        source = str(run)
    stored = _source_config(source)
    if "data" not in given and stored["data"]["_target_"] != cfg.data.get("_target_"):
        was, now = (node.get("_target_", "").rpartition(".")[2] for node in (stored["data"], cfg.data))
        raise UserError(f"init_from={source} was trained on {was}, and the default here is {now}: give data=")
    from genai.checkpoint.build import MODELS, RUN, check_stored
    from genai.checkpoint.load import trusted_packages

    inherited = _inherited_keys(stored)
    trust = trusted_packages(given["trust"].value() if "trust" in given else None)
    for key, value in inherited.items():
        check_stored(value, trust, (MODELS,) if key in ("model", "codec") else (MODELS, RUN))
    for key, value in inherited.items():
        cfg[key] = OmegaConf.create(value) if isinstance(value, dict) else value
    _interpolate_duplicates(cfg)
    for keys in CHOICES:
        if all(key in cfg.data and key in stored["data"] for key in keys):
            cfg.data.update({key: stored["data"][key] for key in keys})
    if "name" not in given and stored.get("name"):
        cfg.name = stored["name"]
    kept = parse_override(f"init_from={quote(source)}")
    return [kept if o.key_or_group == "init_from" else o for o in overrides]


def _source_config(source: str) -> dict[str, Any]:
    """Return the config of a run directory, read without torch, or of a checkpoint file."""
    path = Path(source)
    home = path.parent.parent if path.parent.name == "checkpoints" and path.is_file() else path
    if (home / "config.yaml").is_file():
        return stored_config(home / "config.yaml", ("model", "data", "sampler", "loop"))
    from genai import checkpoint

    return checkpoint.locate(source, "init_from")[0]["config"]


def _inherited_keys(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the nodes of a stored config that a new run inherits, without the names of files."""
    names = [*GROUPS, *(ADVERSARIAL if "discriminator_optim" in stored else ())]
    found = {name: stored[name] for name in names if name in stored}
    if stored.get("codec"):  # its weights are in the source
        found["codec"] = {**stored["codec"], "ckpt": None, "cache": None}
    for node in _first_stages(found["model"]):
        node["ckpt"] = None
    found["sampler"] = {key: None if key in PATHS else value for key, value in found["sampler"].items()}
    return found


def _first_stages(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the nodes within a node that load another checkpoint."""
    if isinstance(node, dict):
        if node.get("_target_") == PRETRAINED:
            yield node
        for value in node.values():
            yield from _first_stages(value)


def _interpolate_duplicates(cfg: DictConfig) -> None:
    """Replace values that a run stores twice with interpolations, so that setting one key changes both."""
    first_stage = OmegaConf.select(cfg, "model.latent.codec")
    if "codec" in cfg and nodes.target_of(first_stage) == PRETRAINED:
        first_stage.update(
            {key: f"${{codec.{key}}}" for key in ("ckpt", "sha256", "shape", "model") if key in cfg.codec}
        )
    if "discriminator_optim" in cfg and "discriminator_optim" in cfg.loop:
        cfg.loop.discriminator_optim = "${discriminator_optim}"
