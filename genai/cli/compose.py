"""Composes a config with Hydra: groups first, then values, which are checked."""

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai import nodes
from genai.cli.errors import nearest
from genai.cli.overrides import PATHS, check_empty, parse_override, quote_override
from genai.cli.values import apply_all, keys
from genai.core.errors import UserError
from genai.core.spellings import SPELLINGS, canonical
from genai.ranges import check as ranges

Prepare = Callable[[DictConfig, list[Override]], list[Override]]


def conf_dir() -> str:
    """Return the folder of the configs: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return str(next(c for c in (package / "conf", package.parent / "conf") if c.is_dir()))


def config_folders(config_dir: str | None) -> list[Path]:
    """Return the folders with configs: the project's, then the user's own if there is one."""
    return [Path(folder).absolute() for folder in (conf_dir(), config_dir) if folder]


def group_choices(group: str, folders: Iterable[Path]) -> list[str]:
    """Return the names of a group's files; an empty list if there is no such group."""
    if len(group) > 255:  # which no folder's name can be
        return []
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def group_defaults(name: str) -> dict[str, str | None]:
    """Return the groups of config `name`, each with its default choice."""
    own: Any = OmegaConf.load(Path(conf_dir()) / f"{name}.yaml")
    nodes = [node for node in own.defaults if OmegaConf.is_dict(node)]
    return {str(group): choice for node in nodes for group, choice in node.items()}


def name_run(cfg: DictConfig, choices: Any) -> None:
    """Name a run that has no name after its experiment, or else its model and data."""
    if "name" in cfg and cfg.name is None:
        cfg.name = choices.experiment if choices.get("experiment") else f"{choices.model}_{choices.data}"


def compose_config(
    name: str,
    overrides: Sequence[str],
    prepare: Prepare | None = None,
    sweep: bool = False,
    config_dir: str | None = None,
) -> DictConfig:
    """Compose the config `name` of a command: groups first, then `prepare`, then every value, checked.

    Args:
        name: train, sample, evaluate or baselines.
        overrides: key=value, as typed.
        prepare: called with the config and the overrides; may change the config, and returns the overrides that remain.
        sweep: whether values may be lists of choices (-m), which are left out.
        config_dir: a folder of the user's own configs.

    Raises:
        UserError: a key, a choice, a type or a value that is not allowed, with the nearest name that is.
    """
    folders = config_folders(config_dir)
    overrides = [quote_override(override, sweep) for override in overrides]
    search = [f"hydra.searchpath=[file://{folder}]" for folder in folders[1:]]
    theirs = GlobalHydra.instance().hydra  # of a notebook or script that uses Hydra itself
    try:
        parsed = [parse_override(override) for override in overrides]
        GlobalHydra.instance().clear()
        for o in parsed:
            check_empty(o)
        groups, values = _split(parsed, folders, sweep, name)
        with initialize_config_dir(conf_dir(), version_base="1.3", job_name=name):
            lines = [*search, *(str(o.input_line) for o in groups)]
            hydra: Any = GlobalHydra.instance().hydra
            hydra.config_loader = loader = Loader(hydra.config_loader.config_search_path)
            cfg = compose(name, lines, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        if misplaced := re.match(r"Could not override '(\w+)@(\w+)'", str(error)):
            group, place = misplaced.groups()
            raise UserError(
                f"{group}@{place}= has no effect, for this config has no {place}: write {group}="
            ) from error
        raise UserError("cannot compose the config: " + " ".join(str(error).split("\n")[:2])) from error
    finally:
        GlobalHydra.instance().hydra = theirs
    choices = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    name_run(cfg, choices)
    if prepare is not None:
        values = [o for o in prepare(cfg, [*groups, *values]) if o not in groups]
    before = set(keys(cfg))
    apply_all(cfg, values, loader.changed)
    _expand_metrics(cfg, folders[1:])
    _expand_home(cfg)
    for key in SPELLINGS:
        if (value := OmegaConf.select(cfg, key)) is not None:
            OmegaConf.update(cfg, key, canonical(key, value))
    check_interpolations(cfg)
    ranges.check(cfg, name, values, before)
    return cfg


def resolved(cfg: DictConfig) -> Any:
    """Return a config as plain values, with the shape of data that are still to say it as [1, 1, 1]."""
    if OmegaConf.is_dict(cfg.get("data")) and cfg.data.get("shape", ()) is None:
        cfg = copy.deepcopy(cfg)
        cfg.data.shape = [1, 1, 1]
    return OmegaConf.to_container(cfg, resolve=True)


def check_interpolations(cfg: DictConfig) -> None:
    """Raise UserError for a key whose interpolation cannot be resolved, whatever shape the data will have."""
    try:
        resolved(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be read: {str(error).splitlines()[0]}") from error


class Loader(ConfigLoaderImpl):
    """Hydra's composition, except that a file that gives a node another `_target_` replaces the node; see `genai.nodes`.

    Attributes:
        changed: paths of the nodes that were replaced.
    """

    def __init__(self, config_search_path: ConfigSearchPath):
        super().__init__(config_search_path)
        self.changed: dict[str, None] = {}

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        cfg = OmegaConf.create()
        for default in defaults:
            part: Any = self._load_single_config(default, repo).config
            own = OmegaConf.select(part, default.package or "") if default.package else part
            if not str(default.config_path).startswith("hydra/"):
                own.pop("defaults", None)
                self.changed |= dict.fromkeys(nodes.drop_stale_keys(cfg, part))
            cfg.merge_with(part)
        return cfg


def _expand_home(cfg: DictConfig) -> None:
    """Replace ~ at the start of every path with the home directory."""
    for key in list(keys(cfg)):
        if key.rpartition(".")[2] in PATHS:
            value = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
            if isinstance(value, str) and value.startswith("~"):
                OmegaConf.update(cfg, key, os.path.expanduser(value))


def _expand_metrics(cfg: DictConfig, folders: Iterable[Path]) -> None:
    """Replace names in metrics= with {name: node} where the user's own metrics.yaml defines them.

    Raises UserError if that file cannot be read.
    """
    for path in (folder / "metrics.yaml" for folder in folders):
        if not path.is_file():
            continue
        try:
            own: Any = OmegaConf.to_container(OmegaConf.load(path))
        except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(own, dict):
            raise UserError(f"{path} must map names to nodes, brightness: {{_target_: my_lab.brightness.Brightness}}")
        for key in [key for key in keys(cfg) if key.rpartition(".")[2] == "metrics"]:
            value = OmegaConf.select(cfg, key)
            names = [value] if isinstance(value, str) else value
            if OmegaConf.is_list(names) or isinstance(names, list):
                expanded = [{one: own[one]} if isinstance(one, str) and one in own else one for one in names]
                OmegaConf.update(cfg, key, expanded)


def _split(
    parsed: Iterable[Override], folders: Sequence[Path], sweep: bool, name: str
) -> tuple[list[Override], list[Override]]:
    """Return the overrides that choose from a group, and those that set a value; without Hydra's own and swept ones.

    Raises UserError for a choice that does not exist, an empty one where there is a default, or several without -m.
    """
    groups, values = [], []
    for override in parsed:
        key = override.key_or_group
        options = group_choices(key, folders)
        if key.startswith(("hydra.", "hydra/")):
            continue
        if override.is_sweep_override():
            if not sweep:
                once = f"genai {name} takes one, so repeat the command in a loop of the shell"
                raise UserError(
                    f"{override.input_line} names several values: {'add -m to run them all' if name == 'train' else once}"
                )
        elif not options:
            values.append(override)
        else:
            _check_group(override, name)
            choice = override.value()
            if choice is None and group_defaults(name).get(key) is None:
                continue
            if choice is None:
                off = f"; {key}=none turns it off" if "none" in options else ""
                raise UserError(f"{key}= cannot be left empty: choose one of {', '.join(options)}{off}")
            if str(choice) not in options:
                raise UserError(f"{key}={choice} must be one of {', '.join(options)}{nearest(str(choice), options)}")
            groups.append(override)
    return groups, values


def _check_group(override: Override, name: str) -> None:
    """Raise UserError for a group of another command, or a + before one of this command's own."""
    key, commands = override.key_or_group, ("train", "sample", "evaluate", "baselines")
    if key in group_defaults(name):
        if override.is_add() or override.is_force_add():
            line = str(override.input_line)
            raise UserError(f"{line} would add a second {key}: write {line.lstrip('+')}")
    elif others := [f"genai {other}" for other in commands if key in group_defaults(other)]:
        own = key in group_defaults("train") and name != "baselines"
        why = ", as the run that ckpt= names has its own" if own else ""
        raise UserError(
            f"{key}= is not a key of genai {name}, but of {' and '.join(others)}: leave it out{why} (--help lists all keys)"
        )


def new_keys(name: str, overrides: Sequence[str], config_dir: str | None) -> Iterator[str]:
    """Yield the overrides of a sweep whose keys exist only with a changed `_target_`; Hydra itself would refuse them."""
    folders = config_folders(config_dir)
    chosen = [
        o for o in overrides if (key := o.partition("=")[0]) in group_defaults(name) and group_choices(key, folders)
    ]
    known = set(keys(compose_config(name, chosen, sweep=True, config_dir=config_dir)))
    for override in overrides:
        key = override.partition("=")[0]
        if re.fullmatch(r"\w+(\.\w+)+", key) and not key.startswith("hydra.") and key not in known:
            yield override
