"""The function `genai.compose`: composes a config from Python, with the checks of the command line."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genai.cli.compose import check_interpolations, compose_config
from genai.cli.errors import nearest
from genai.cli.overrides import refuse_hydra_keys
from genai.cli.resume import NEEDED, RUN_GROUPS, prepare_training
from genai.cli.sample import prepare_evaluation, prepare_sampling
from genai.cli.values import keys
from genai.core.errors import UserError, show
from genai.ranges import check as ranges

PREPARE = {"train": prepare_training, "sample": prepare_sampling, "evaluate": prepare_evaluation, "baselines": None}


def compose(overrides: Sequence[str] = (), config: str = "train", config_dir: str | Path | None = None) -> DictConfig:
    """Return the config that a command would run with, checked as the command line checks it.

    Keys can be set afterwards, `cfg.max_steps = 100`; a key that is not there raises.

    Args:
        overrides: as typed after a command, `["model=edm", "max_steps=100"]`.
        config: the command: train, sample, evaluate or baselines.
        config_dir: a folder of the user's own configs.

    Raises:
        UserError: a key, a choice, a type or a value that does not exist or is out of its range.
    """
    if config not in [*PREPARE]:
        raise UserError(f"config={config!r} must be one of {', '.join(PREPARE)}{nearest(str(config), PREPARE)}")
    listed = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not listed or not all(isinstance(override, str) for override in overrides):
        raise UserError(
            f"overrides must be a list of strings such as ['model=edm', 'max_steps=100'], got {show(overrides)}"
        )
    if config_dir is not None and not (isinstance(config_dir, str | Path) and Path(config_dir).is_dir()):
        raise UserError(f"config_dir={config_dir} is not a folder: name the one with your own configs")
    refuse_hydra_keys(overrides)
    cfg = compose_config(
        config, [*overrides], PREPARE[config], config_dir=None if config_dir is None else str(config_dir)
    )
    if "sweep" in cfg:
        raise UserError("sweep= names several runs, which only the command genai train -m starts: leave it out")
    OmegaConf.set_struct(cfg, True)
    return cfg


def check_training(cfg: DictConfig) -> DictConfig:
    """Return a copy of a config of training that may have been edited since `compose`, with its paths as strings.

    Raises:
        UserError: it lacks a key, has one that nothing reads, or refers to one that is not there.
    """
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_struct(cfg, False)
    raw: Any = OmegaConf.to_container(cfg) or {}
    if raw.get("resume") is None:
        default = compose_config("train", [])
        needed = [*default, *keys(default.trainer, "trainer.")]
    else:
        needed = [*NEEDED, *RUN_GROUPS, "trust"]
    present = [*keys(cfg)] if raw else []
    if missing := [key for key in needed if key not in present]:
        raise UserError(
            f"this is not a config of training, it has no {missing[0]}: compose it with genai.compose([...])"
        )
    check_interpolations(cfg)
    for key in present:
        if isinstance(value := OmegaConf.select(cfg, key, throw_on_resolution_failure=False), Path):
            OmegaConf.update(cfg, key, str(value))
    if not isinstance(cfg.get("resume"), str | None):
        raise UserError(f"resume={show(cfg.resume)} must be a path, or null")
    if not isinstance(cfg.name, str):
        raise UserError(
            f"name={show(cfg.name)} must be a name, such as ddpm_digits: it is also that of the run's folder"
        )
    ranges.check(cfg, "train")
    for leaf in ranges.leaves(cfg, "train"):
        if cfg.resume is None and ranges.range_of(*leaf.names) is None and not ranges.is_read(cfg, leaf.key):
            raise UserError(f"nothing reads {leaf.key}: leave it out")
    return cfg
