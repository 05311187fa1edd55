"""The command line: overrides in, a checked config out, one sentence and exit code 2 for what the user can mend.

Nothing here imports torch, so that help and mistakes answer at once.
"""

import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai.core.errors import UserError
from genai.core.interrupt import answered
from genai.ranges import check as ranges

# A disk that is full or may not be written, wherever a package met it.
UNUSABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

Prepare = Callable[[DictConfig, list[Override]], list[Override]]


def conf_dir() -> str:
    """The folder of the configs: inside the package when installed as a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return str(next(c for c in (package / "conf", package.parent / "conf") if c.is_dir()))


def main(task: Callable[[DictConfig], Any], name: str, prepare: Prepare | None = None) -> None:
    """Run `task(cfg)` with the config `name` composed from sys.argv; see `composed` for `prepare`."""
    with answered():
        _main(task, name, prepare)


def _main(task: Callable[[DictConfig], Any], name: str, prepare: Prepare | None) -> None:
    # By default an OpenMP thread waits by spinning for long, and where another process wants its core, steps get 20 to
    # 40 times slower. Spinning briefly costs nothing on a quiet machine (102 against 108 ms a step), 3 times on a busy one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.getLogger("matplotlib").setLevel(
        logging.ERROR
    )  # it warns of a home that cannot be written, and does without
    args = get_args_parser().parse_args()
    sys.path.append(os.getcwd())  # where a user's own package may be

    def checked(cfg: DictConfig) -> Any:
        try:
            if HydraConfig.initialized():
                OmegaConf.set_struct(cfg, False)
                name_run(cfg, HydraConfig.get().runtime.choices)
            return task(cfg)
        except UserError as error:
            fail(error)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            fail(
                UserError(f"{error.filename or 'a file'} cannot be used ({error.strerror}): make room, or name another")
            )

    try:
        for option in ("config_name", "config_path", "experimental_rerun"):
            if getattr(args, option, None) not in (None, name):
                raise UserError(
                    f"--{option.replace('_', '-')} is not for this program, whose config is {name}.yaml: add a folder of your "
                    "own configs with --config-dir, and choose from it with key=value"
                )
        if not any((args.hydra_help, args.info, args.shell_completion)):
            if args.help and not args.overrides:
                prepare = None  # a run of one's own is only looked for where something was asked of it
            cfg = composed(name, args.overrides, prepare, args.multirun, args.config_dir)
            if args.help:
                return print(help_text(name, cfg, args.config_dir))
            if not args.multirun and not args.cfg:
                return checked(cfg)
    except UserError as error:
        fail(error)
    import hydra

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)(checked)()


def name_run(cfg: DictConfig, choices: Any) -> None:
    """A run without a name is called after its experiment, or its model and data."""
    if "name" in cfg and cfg.name is None:
        cfg.name = choices.experiment if choices.get("experiment") else f"{choices.model}_{choices.data}"


def fail(error: UserError) -> None:
    """Print the sentence and exit with code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def help_text(name: str, cfg: DictConfig, config_dir: str | None) -> str:
    """What --help prints: the template in the config `name` with $GROUPS and their choices, and $CONFIG, every key."""
    own: Any = OmegaConf.load(Path(conf_dir()) / f"{name}.yaml")
    groups = sorted(str(group) for node in own.defaults if OmegaConf.is_dict(node) for group in node)
    folders = config_folders(config_dir)
    lines = [f"  {group}: {', '.join(names)}" for group in groups if (names := choices_of(group, folders))]
    return own.hydra.help.template.replace("$GROUPS", "\n".join(lines)).replace("$CONFIG", OmegaConf.to_yaml(cfg))


def config_folders(config_dir: str | None) -> list[Path]:
    """Where configs are: the project's folder and the user's own."""
    return [Path(folder).absolute() for folder in (conf_dir(), config_dir) if folder]


def choices_of(group: str, folders: Iterable[Path]) -> list[str]:
    """The names of a group's files; none if there is no such group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def composed(
    name: str,
    overrides: Sequence[str],
    prepare: Prepare | None = None,
    sweep: bool = False,
    config_dir: str | None = None,
) -> DictConfig:
    """Compose config `name`: groups first, then `prepare(cfg, overrides)`, then every value override, checked.

    `prepare` may change cfg and returns the overrides that remain; `config_dir` is a folder of the user's own configs.
    Raises UserError for a key, a choice or a type that does not exist, with what comes nearest.
    """
    folders = config_folders(config_dir)
    overrides = [quoted(override) for override in overrides]
    search = [f"hydra.searchpath=[file://{folder}]" for folder in folders[1:]]
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        GlobalHydra.instance().clear()
        groups, values = _split(parsed, folders, sweep)
        with initialize_config_dir(conf_dir(), version_base="1.3", job_name=name):
            lines = [*search, *(str(o.input_line) for o in groups)]
            cfg = compose(name, lines, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError("cannot compose the config: " + " ".join(str(error).split("\n")[:2])) from error
    choices = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    name_run(cfg, choices)
    if prepare is not None:
        values = [o for o in prepare(cfg, [*groups, *values]) if o not in groups]
    before = set(keys(cfg))
    for override in values:
        apply(cfg, override)
    ranges.check(cfg, name, values, before)
    return cfg


TEXTS = ("prompt", "negative_prompt", "stop")  # keys whose value is prose


def quoted(override: str) -> str:
    """Prose in quotes, so that its commas, spaces and braces are no syntax; lists and what has quotes stay."""
    key, _, value = override.partition("=")
    if key not in TEXTS or value in ("", "null") or value[0] in "['\"":
        return override
    value = re.sub(
        r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value
    )  # a backslash counts before a quote
    value = value.replace("${", "\\${")
    return f'{key}="{value}"'


def _split(parsed: Iterable[Override], folders: Sequence[Path], sweep: bool) -> tuple[list[Override], list[Override]]:
    """Group choices and value overrides; those of Hydra itself and those swept over are left out.

    Raises UserError for a choice that does not exist, or several of them without -m.
    """
    groups, values = [], []
    for override in parsed:
        key = override.key_or_group
        options = choices_of(key, folders)
        if key.startswith(("hydra.", "hydra/")):
            continue
        if override.is_sweep_override():
            if not sweep:
                raise UserError(f"{override.input_line} names several values: add -m to run them all")
        elif not options:
            values.append(override)
        else:
            choice = override.value()
            if choice is not None and str(choice) not in options:
                raise UserError(f"{key}={choice} is none of {', '.join(options)}{nearest(str(choice), options)}")
            groups.append(override)
    return groups, values


def apply(cfg: DictConfig, override: Override) -> None:
    """Set one value. Raises UserError if there is no such key or the value is of another type than the one there."""
    key = override.key_or_group
    if override.is_delete():
        raise UserError(f"{override.input_line} would remove a key: set it to null instead")
    known = list(keys(cfg))
    if not override.is_add() and key not in known:
        adds = f"; +{key}= adds one" if "." in key and ranges.read(cfg, key) else ""
        raise UserError(f"there is no key {key}{nearest(key, known)} (--help lists all{adds})")
    value = override.value()
    present = OmegaConf.select(cfg, key, throw_on_missing=False) if key in known else None
    OmegaConf.update(cfg, key, fitted(key, value, present), force_add=True, merge=True)


def fitted(key: str, value: Any, present: Any) -> Any:
    """The value, made to fit the type of the one present. Raises UserError if it cannot be."""
    if value is None or present is None:
        return value
    if isinstance(present, bool):
        ok, kind = isinstance(value, bool), "true or false"
    elif isinstance(present, int):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        ok, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif isinstance(present, float):
        ok, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif isinstance(present, str):
        value = str(value) if isinstance(value, int | float) else value
        ok, kind = isinstance(value, str), "a text"
    elif OmegaConf.is_list(present):
        ok, kind = isinstance(value, list), "a list like [1,2]"
    else:
        ok, kind = isinstance(value, dict), f"a group of keys ({', '.join(map(str, present))}): set one of them"
    if not ok:
        raise UserError(f"{key}={value} must be {kind}")
    return value


def keys(cfg: DictConfig, prefix: str = "") -> Iterable[str]:
    """Every dotted key below cfg."""
    for key in cfg:
        yield f"{prefix}{key}"
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from keys(node, f"{prefix}{key}.")


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value below a node by its dotted key; lists are values."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        key: value for name, part in node.items() for key, value in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def nearest(word: str, words: Iterable[str]) -> str:
    """ ", did you mean X?" where something comes near; a bare name matches the last part of a dotted key."""
    words = list(words)
    full = difflib.get_close_matches(word, words, 1, 0.75)
    tails = [w for w in words if w.rpartition(".")[2] == word.rpartition(".")[2]]
    close = difflib.get_close_matches(word, [w.rpartition(".")[2] for w in words], 1, 0.75)
    close = [w for w in words if close and w.rpartition(".")[2] == close[0]]
    found = next(iter([*tails, *full, *close]), None)
    return f", did you mean {found}?" if found else ""


PLAYERS = "optim", "discriminator_optim"
SCHEDULE = {"decay_steps": None, "lr_min": 0.0, "schedule": "cosine", "cooldown": 0.2}  # with what old runs mean
RESUMABLE = (
    "max_steps",
    "data.root",
    "data.path",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "logger",
    "trust",
    *(f"{player}.{key}" for player in PLAYERS for key in SCHEDULE),
)


def check_unchanged(config: Mapping[str, Any], stored: Mapping[str, Any], run: Path) -> None:
    """Raise UserError that names every value of a run's config.yaml that is not the one its checkpoint was trained with."""
    again: Any = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(dict(stored)))))
    now, then = flat(config), flat(again)  # as YAML keeps it
    free = {*RESUMABLE, *(f"loop.{key}" for key in RESUMABLE), "run_dir", "resume"}
    changed = [
        f"{key} is {now.get(key, 'not there')} and was {then.get(key, 'not there')}"
        for key in {**then, **now}
        if (key not in now or key not in then or repr(now[key]) != repr(then[key]))
        and not any(f"{key}.".startswith(f"{name}.") for name in free)
    ]
    if changed:
        raise UserError(
            f"{run / 'config.yaml'} is not what this run was trained with: {'; '.join(changed)}; put the old values back, or "
            f"train anew with init_from={run}"
        )


def resumed(cfg: DictConfig, overrides: list[Override]) -> list[Override]:
    """With resume=<run>, put that run's own config in the place of cfg; few keys may differ from it.

    Raises UserError if there is no such run or another key is given.
    """
    given = {o.key_or_group: o for o in overrides}
    resume = given["resume"].value() if "resume" in given else None
    if resume is None:
        return overrides
    path = Path(str(resume)) / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume={resume} is no run directory: there is no {path}")
    for key in given:
        if key not in (*RESUMABLE, "resume") and not key.startswith("logger."):
            raise UserError(f"{key}= cannot change when a run is resumed, only {', '.join(RESUMABLE)} can")
    stored: Any = OmegaConf.create(stored_config(path))
    stored.trust = None  # what a run may build is for the user to say, each time
    if "logger" in given:
        stored.logger = cfg.logger
    _completed(stored, given, cfg)
    cfg.clear()
    cfg.update(stored)
    return overrides


CONFIG_BYTES = 2**22


def stored_config(path: Path) -> dict[str, Any]:
    """The config.yaml of a run, which somebody else may have written. Raises UserError unless it holds plain values."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise UserError(f"{path} is no config of a run: it has more than {CONFIG_BYTES // 2**20} MiB")
        text = path.read_text()
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        if "${" in text or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise UserError(
                f"{path} is refused: it has values that stand for others (${{...}} or *), which no run writes"
            )
        found = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read ({str(error).strip().splitlines()[0]}): a checkpoint of its folder has the config too, name "
            "that with ckpt="
        ) from error
    for part in ("model", "data", "sampler"):
        node = found.get(part) if isinstance(found, dict) else None
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise UserError(f"{path} is no config of a run: its {part} must be a group of keys with a _target_")
    return found  # type: ignore[return-value]


def _completed(stored: DictConfig, given: Iterable[str], cfg: DictConfig) -> None:
    """Add to a run's stored config the keys that are given now and that it is too old to have, as they were meant then."""
    logger = stored.get("logger")
    if logger is not None and logger._target_ == cfg.logger._target_:
        for key in (key.removeprefix("logger.") for key in given if key.startswith("logger.")):
            if key in cfg.logger:
                logger.setdefault(key, cfg.logger[key])
    loop = stored.get("loop") or {}
    for player, key in (key.split(".") for key in given if key in RESUMABLE and key.startswith(tuple(PLAYERS))):
        if player in stored:
            stored[player].setdefault(key, SCHEDULE[key])
            if loop.get(player) is not None:  # it was stored twice
                loop[player] = f"${{{player}}}"


def with_sampler(cfg: DictConfig, overrides: list[Override]) -> list[Override]:
    """Put the run's own sampler into cfg unless sampler= chose one; bare names of its arguments become sampler.name.

    Raises UserError for an argument that the sampler lacks.
    """
    given = {o.key_or_group: o for o in overrides}
    if cfg.get("sampler") is None:
        cfg.ckpt, stored = _stored_config(given["ckpt"].value() if "ckpt" in given else None)
        cfg.sampler = OmegaConf.create(stored["sampler"])
    own = [str(k) for k in cfg.sampler if not str(k).startswith("_")]
    remaining = []
    for override in overrides:
        key = override.key_or_group
        if key not in cfg and not override.is_add() and key in own:
            (override,) = OverridesParser.create().parse_overrides([f"sampler.{override.input_line}"])
        elif key == "guidance" or key.startswith("sampler."):
            name = key.rpartition(".")[2]
            if name not in own:
                sampler = cfg.sampler._target_.rpartition(".")[2]
                raise UserError(f"the sampler {sampler} has no {name}; it has {', '.join(own)}{nearest(name, own)}")
        remaining.append(override)
    return remaining


def _stored_config(ckpt: Any) -> tuple[str, dict[str, Any]]:
    """The run or file that `ckpt` names and its config: a run directory's is read without torch, that of a checkpoint
    file or of the newest run with it."""
    if ckpt is not None and (path := Path(str(ckpt)) / "config.yaml").is_file():
        return str(ckpt), stored_config(path)
    from genai import checkpoint

    content, found = checkpoint.locate(None if ckpt is None else str(ckpt))
    return str(found), content["config"]
