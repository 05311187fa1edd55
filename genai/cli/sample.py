"""The configs of `sample.py` and `evaluate.py`: puts the sampler of a checkpoint in, and resolves bare arguments of it."""

import os
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from genai import nodes
from genai.cli.errors import nearest
from genai.cli.overrides import PATHS, parse_override, quote
from genai.cli.stored import stored_config
from genai.core.errors import UserError


def prepare_sampling(cfg: DictConfig, overrides: list[Override]) -> list[Override]:
    """Put the sampler of the run that ckpt= names into cfg, unless sampler= chose one.

    Returns:
        the overrides, in which a bare argument of the sampler, such as steps=, has become sampler.steps=.

    Raises:
        UserError: there is no such run, or the sampler does not take an argument.
    """
    given = {o.key_or_group: o for o in overrides}
    if cfg.get("sampler") is None:
        cfg.ckpt, stored = _stored_config(given["ckpt"].value() if "ckpt" in given else None)
        kept = parse_override(f"ckpt={quote(str(cfg.ckpt))}")
        overrides = [kept if o.key_or_group == "ckpt" else o for o in overrides]
        theirs = {key: None if key in PATHS else value for key, value in stored["sampler"].items()}
        cfg.sampler = OmegaConf.create(theirs)  # a stored sampler may not name files
    node: Any = cfg.sampler
    own = nodes.arguments(node)
    remaining = []
    for override in overrides:
        key, (_, _, value) = override.key_or_group, str(override.input_line).partition("=")
        name = key.removeprefix("sampler.")
        bare = key == name and key not in cfg and not override.is_add()
        if name in own and (bare or key != name):
            (override,) = OverridesParser.create().parse_overrides([f"sampler.{own[name]}={value}"])
        elif (key == "guidance" and name not in own) or (
            key != name and name.removesuffix("._target_") not in own.values()
        ):
            raise UserError(
                f"the sampler {nodes.name_of(node)} has no {name}; it has {', '.join(own)}{nearest(name, own)}"
            )
        remaining.append(override)
    return remaining


def prepare_evaluation(cfg: DictConfig, overrides: list[Override]) -> list[Override]:
    """Do as `prepare_sampling` does if the overrides choose a sampler or set an argument of one; else it stays null."""
    roots = {o.key_or_group.partition(".")[0] for o in overrides if not o.is_add()}
    return prepare_sampling(cfg, overrides) if "sampler" in roots or not roots <= {*cfg} else overrides


def _stored_config(ckpt: Any) -> tuple[str, dict[str, Any]]:
    """Return the run or file that `ckpt` names (default: the newest run), and its config, for a run directory without torch."""
    ckpt = None if ckpt is None else os.path.expanduser(str(ckpt))
    if ckpt is not None and os.path.isfile(path := Path(ckpt) / "config.yaml"):
        return ckpt, stored_config(path)
    from genai import checkpoint

    content, found = checkpoint.locate(ckpt)
    return str(found), content["config"]
