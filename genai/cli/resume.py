"""The config of a resumed run: its own, in which only a few keys may change."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from genai import nodes
from genai.cli.architecture import inherit_architecture
from genai.cli.overrides import parse_override, quote
from genai.cli.stored import find_run, stored_config
from genai.cli.values import flatten
from genai.core.errors import UserError
from genai.core.stored import PRETRAINED

OPTIMIZERS = "optim", "discriminator_optim"
# Keys of an optimiser's schedule, with their values in older runs, whose configs lack them.
SCHEDULE = {
    "decay_steps": None,
    "lr_min": 0.0,
    "schedule": "cosine",
    "cooldown": 0.2,
}
RESUMABLE = (
    "max_steps",
    "data.root",
    "data.path",
    "data.paths",
    "data.num_workers",
    "codec.ckpt",
    "codec.cache",
    "trainer.accelerator",
    "trainer.devices",
    "logger",
    "trust",
    *(f"{name}.{key}" for name in OPTIMIZERS for key in SCHEDULE),
)
PART_FILE = re.compile(r"model\..+\.ckpt")
"""Keys that name the checkpoint of a part of the model, whose weights a resumed run has in its own checkpoints."""


def check_unchanged(config: Mapping[str, Any], stored: Mapping[str, Any], run: Path) -> None:
    """Raise UserError if a run's config.yaml was edited since its checkpoint was written, except in keys that may change.

    Args:
        config: the content of config.yaml.
        stored: the config in the checkpoint.
        run: the run directory.
    """
    again: Any = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(dict(stored)))))
    now, then = flatten(config), flatten(again)  # as YAML keeps it
    free = {*RESUMABLE, *(f"loop.{key}" for key in RESUMABLE), "run_dir", "resume"}
    changed = [
        f"{key} is {now.get(key, 'not there')} and was {then.get(key, 'not there')}"
        for key in {**then, **now}
        if (key not in now or key not in then or repr(now[key]) != repr(then[key]))
        and not any(f"{key}.".startswith(f"{name}.") for name in free)
        and not PART_FILE.fullmatch(key)
    ]
    if changed:
        raise UserError(
            f"{run / 'config.yaml'} was changed since this run was trained: {'; '.join(changed)}; restore the old values, or "
            f"start a new run with init_from={run}"
        )


def prepare_training(cfg: DictConfig, overrides: list[Override]) -> list[Override]:
    """Replace cfg with the config of the run that resume= names, or of the newest run in that folder; see also
    `inherit_architecture`, for init_from=.

    Returns:
        the overrides, of which resume= now names a run directory.

    Raises:
        UserError: there is no such run, its config is damaged, or an override changes a key that may not change.
    """
    given = {o.key_or_group: o for o in overrides}
    resume = given["resume"].value() if "resume" in given else None
    if resume is None:
        return inherit_architecture(cfg, overrides)
    resume = os.path.expanduser(str(resume))
    run = find_run(Path(resume), "resume") if os.path.isdir(resume) else None
    if run is None:
        raise UserError(
            f"resume={resume} is neither a run directory nor a folder of them: there is no {resume}/config.yaml"
        )
    path, kept = run / "config.yaml", parse_override(f"resume={quote(str(run))}")
    overrides = [kept if o.key_or_group == "resume" else o for o in overrides]
    for key in given:
        if key not in (*RESUMABLE, "resume") and not key.startswith("logger.") and not PART_FILE.fullmatch(key):
            raise UserError(f"{key}= cannot change when a run is resumed: only {', '.join(RESUMABLE)} can")
    stored: Any = OmegaConf.create(stored_config(path, RUN_GROUPS))
    stored.trust = None  # what a run may build is for the user to say, each time
    missing = [key for key in NEEDED if OmegaConf.select(stored, key) is None]
    if missing:
        raise UserError(f"{path} is not a config of a run (it has no {', '.join(missing)}): restore the file")
    if "logger" in given:
        stored.logger = cfg.logger
    _complete_old_config(stored, given, cfg)
    cfg.clear()
    cfg.update(stored)
    return overrides


NEEDED = (  # values that no run can be resumed without
    "name",
    "max_steps",
    "seed",
    "debug",
    "accumulate",
    "log_every_steps",
    "trainer.devices",
    "trainer.accelerator",
    "trainer.precision",
)
RUN_GROUPS = ("model", "data", "loop", "optim", "sampler", "trainer", "callbacks")


def _complete_old_config(stored: DictConfig, given: Iterable[str], cfg: DictConfig) -> None:
    """Add keys that are given now to the stored config of a run that is older than they are, with the values it ran with."""
    logger = stored.get("logger")
    if logger is not None and cfg.logger is not None and logger._target_ == cfg.logger._target_:
        for key in (key.removeprefix("logger.") for key in given if key.startswith("logger.")):
            if key in cfg.logger:
                logger.setdefault(key, cfg.logger[key])
    first_stage = OmegaConf.select(stored, "model.latent.codec")
    if "codec" in stored and nodes.target_of(first_stage) == PRETRAINED:  # its source is stored there too
        first_stage.update({key: f"${{codec.{key}}}" for key in ("ckpt", "sha256") if key in stored.codec})
    loop = stored.get("loop") or {}
    for name, key in (key.split(".") for key in given if key in RESUMABLE and key.startswith(tuple(OPTIMIZERS))):
        if name in stored:
            stored[name].setdefault(key, SCHEDULE[key])
            if loop.get(name) is not None:  # older runs store the optimiser in the loop too
                loop[name] = f"${{{name}}}"
