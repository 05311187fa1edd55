"""The command line: overrides in, a checked config out, one sentence and exit code 2 for what the user can mend.

Nothing here imports torch, so that help and mistakes answer at once.
"""

import argparse
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai import nodes
from genai.core.errors import UserError
from genai.core.interrupt import raise_on_signal
from genai.core.stored import PRETRAINED, RENAMED_OVERRIDES, up_to_date
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
    with raise_on_signal():
        _main(task, name, prepare)


def _main(task: Callable[[DictConfig], Any], name: str, prepare: Prepare | None) -> None:
    # By default an OpenMP thread waits by spinning for long, and where another process wants its core, steps get 20 to
    # 40 times slower. Spinning briefly costs nothing on a quiet machine (102 against 108 ms a step), 3 times on a busy one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logging.getLogger("matplotlib").setLevel(
        logging.ERROR
    )  # it warns of a home that cannot be written, and does without
    args = arguments()
    sys.path.append(os.getcwd())  # where a user's own package may be

    def checked(cfg: DictConfig) -> Any:
        try:
            if HydraConfig.initialized():  # one of several jobs, whose command is checked as one alone is
                cfg = composed(name, HydraConfig.get().overrides.task, prepare, config_dir=args.config_dir)
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
        check_flags(args, name)
        if not any((args.hydra_help, args.info, args.shell_completion)):
            if args.help and not args.overrides:
                prepare = None  # a run of one's own is only looked for where something was asked of it
            cfg = composed(name, args.overrides, prepare, args.multirun, args.config_dir)
            if args.help:
                return print(help_text(name, cfg, args.config_dir))
            if args.cfg == "job" and not args.package:
                return print(OmegaConf.to_yaml(cfg, resolve=args.resolve), end="")
            if not args.multirun and not args.cfg:
                return checked(cfg)
    except UserError as error:
        fail(error)
    import hydra

    given = {override: quoted(override, args.multirun) for override in args.overrides}
    if args.multirun:
        given |= {override: f"++{given[override]}" for override in new_keys(name, args.overrides, args.config_dir)}
    sys.argv = [given.get(argument, argument) for argument in sys.argv]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)(checked)()
    except (ConfigCompositionException, OverrideParseException, MissingConfigException) as error:
        fail(UserError("cannot compose the config: " + " ".join(str(error).split())))


def name_run(cfg: DictConfig, choices: Any) -> None:
    """A run without a name is called after its experiment, or its model and data."""
    if "name" in cfg and cfg.name is None:
        cfg.name = choices.experiment if choices.get("experiment") else f"{choices.model}_{choices.data}"


def arguments() -> argparse.Namespace:
    """Hydra's arguments in sys.argv; exits with a sentence for a flag that there is not."""
    parser = get_args_parser()
    parser.error = refuse_flags  # type: ignore[method-assign]
    return parser.parse_args()


def refuse_flags(message: str) -> NoReturn:
    """Exit with one sentence instead of argparse's usage, with the key=value that a --key=value should be."""
    wrong = next((a for a in sys.argv[1:] if re.match(r"-{1,2}[a-z]\w*(-\w+)*=", a)), None)
    hint = f": write {wrong.lstrip('-').replace('-', '_')}" if wrong else ": keys are written key=value, without dashes"
    fail(UserError(f"the command line is not understood, {message}{hint} (--help lists all keys)"))


def check_flags(args: argparse.Namespace, name: str) -> None:
    """Raise UserError for flags of Hydra that would change nothing here, and for what is no text."""
    for argument in sys.argv:
        if any("\ud800" <= c <= "\udfff" for c in argument):
            raise UserError(f"{argument!r} holds bytes that are no UTF-8: rename the file or folder, and name it again")
    if args.config_name not in (None, name) or args.config_path:
        raise UserError("--config-name and --config-path change nothing here: choose experiment=, or add --config-dir")
    if args.experimental_rerun or (args.package and not args.cfg):
        raise UserError(
            "--experimental-rerun and --package are flags of Hydra that change nothing here: leave them out"
        )
    if not (args.multirun or args.cfg or args.info or args.hydra_help or args.shell_completion):
        for override in args.overrides:
            if re.match(r"[+~]*hydra[./]", override):
                raise UserError(f"{override} changes nothing without -m: leave it out")
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir} is no folder: name the one with your own configs")


def fail(error: UserError) -> NoReturn:
    """Print the sentence and exit with code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def help_text(name: str, cfg: DictConfig, config_dir: str | None) -> str:
    """What --help prints: the template in the config `name` with $GROUPS and their choices, and $CONFIG, every key."""
    own: Any = OmegaConf.load(Path(conf_dir()) / f"{name}.yaml")
    groups = sorted(defaults_of(name))
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
    overrides = [quoted(override, sweep) for override in overrides]
    search = [f"hydra.searchpath=[file://{folder}]" for folder in folders[1:]]
    try:
        parsed = [parsed_override(override) for override in overrides]
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
        raise UserError("cannot compose the config: " + " ".join(str(error).split("\n")[:2])) from error
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
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be read: {str(error).splitlines()[0]}") from error
    ranges.check(cfg, name, values, before)
    return cfg


class Loader(ConfigLoaderImpl):
    """Hydra's composition, in which a file that gives a node another `_target_` replaces it: see `genai.nodes`.

    `changed` holds the paths of those nodes.
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


# Last parts of keys whose value is a path, and of those whose value is prose: both are taken as they were typed.
PATHS = (
    "run_dir", "resume", "init_from", "ckpt", "root", "path", "file", "out", "cache", "draft", "weights", "image", "mask",
    "autoguidance",
)  # fmt: skip
PROMPTS = "prompt", "negative_prompt", "stop"  # where even ${ is text, for they are in no stored config
PROSE = *PROMPTS, "label", "name", "project", "notes", "url"
LISTS = "prompt", "negative_prompt", "label"


def quoted(override: str, sweep: bool = False) -> str:
    """A path or prose in quotes, so that its commas, spaces and brackets are no syntax; what has quotes of its own stays.

    In a sweep a comma separates values, as of any key, and choice() and the like choose.
    """
    override = RENAMED_OVERRIDES.get(override, override)
    key, _, value = override.partition("=")
    last = key.lstrip("+").rpartition(".")[2]
    if last not in PATHS + PROSE or value in ("", "null"):
        return override
    literally = last in PROMPTS
    if last in LISTS and re.fullmatch(r"\[.*\]", value, re.DOTALL):
        if last == "label":
            value = f"[{','.join(quote(part.strip()) for part in _parts(value[1:-1]))}]"
        return f"{key}={value}"
    if not sweep:
        return f"{key}={quote(value, literally)}"
    if re.fullmatch(r"(choice|shuffle|sort|tag|glob)\(.*\)", value):
        return override
    return f"{key}={','.join(part if part == 'null' else quote(part, literally) for part in _parts(value))}"


QUOTED = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""


def _parts(value: str) -> list[str]:
    """A value cut at the commas outside of quotes; of an empty one nothing."""
    return re.findall(rf"(?:{QUOTED}|[^,])+", value, re.DOTALL)


def quote(value: str, literally: bool = False) -> str:
    """A string as Hydra's grammar writes it, `literally` with ${ as text; one that is in quotes already stays."""
    if re.fullmatch(QUOTED, value, re.DOTALL):
        return value
    value = re.sub(
        r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value
    )  # a backslash counts before a quote
    if literally:
        value = value.replace("${", "\\${")
    return f'"{value}"'


def parsed_override(override: str) -> Override:
    """Raises UserError for what is no key=value."""
    if not re.match(r"[^=]+=|~", override):
        raise UserError(f"{override!r} is no key=value: write both, such as max_steps=100 (--help lists all keys)")
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"{override!r} cannot be read: write key=value without spaces around =, and a value with characters other than "
            "letters, digits and -_./ in quotes of its own, 'key=\"value\"'"
        ) from error


def check_empty(override: Override) -> None:
    """Raise UserError for a path or a name that is empty, which would mean the folder one stands in."""
    key = override.key_or_group
    if override.value() == "" and key.rpartition(".")[2] in (*PATHS, "name"):
        raise UserError(f"{key}= is empty: give a value, or null for the default")


def defaults_of(name: str) -> dict[str, str | None]:
    """The groups of config `name` and what is chosen in each where the command line chooses nothing."""
    own: Any = OmegaConf.load(Path(conf_dir()) / f"{name}.yaml")
    nodes = [node for node in own.defaults if OmegaConf.is_dict(node)]
    return {str(group): choice for node in nodes for group, choice in node.items()}


def _expand_home(cfg: DictConfig) -> None:
    """Let ~ begin a path, wherever it was written."""
    for key in list(keys(cfg)):
        if key.rpartition(".")[2] in PATHS:
            value = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
            if isinstance(value, str) and value.startswith("~"):
                OmegaConf.update(cfg, key, os.path.expanduser(value))


def _expand_metrics(cfg: DictConfig, folders: Iterable[Path]) -> None:
    """Give each name in metrics= that the user's own metrics.yaml has the node that it stands for, {name: node}."""
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
    """Group choices and value overrides; those of Hydra itself and those swept over are left out.

    Raises UserError for a choice that does not exist, none where there is a default, or several of them without -m.
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
            if choice is None and defaults_of(name).get(key) is None:
                continue
            if choice is None:
                off = f"; {key}=none turns it off" if "none" in options else ""
                raise UserError(f"{key}= cannot be left empty: choose one of {', '.join(options)}{off}")
            if str(choice) not in options:
                raise UserError(f"{key}={choice} is none of {', '.join(options)}{nearest(str(choice), options)}")
            groups.append(override)
    return groups, values


def new_keys(name: str, overrides: Sequence[str], config_dir: str | None) -> Iterator[str]:
    """The overrides of a sweep that are of a changed `_target_` alone, so that Hydra, which merges, would not know their keys."""
    folders = config_folders(config_dir)
    chosen = [o for o in overrides if (key := o.partition("=")[0]) in defaults_of(name) and choices_of(key, folders)]
    known = set(keys(composed(name, chosen, sweep=True, config_dir=config_dir)))
    for override in overrides:
        key = override.partition("=")[0]
        if re.fullmatch(r"\w+(\.\w+)+", key) and not key.startswith("hydra.") and key not in known:
            yield override


def apply_all(cfg: DictConfig, overrides: Iterable[Override], parts: dict[str, None]) -> None:
    """Set values in an order in which what changes a node's `_target_` goes before the keys of that node, see `apply`; the
    nodes at `parts` then have what their targets need. Raises UserError."""

    def order(override: Override) -> tuple[bool, int]:
        key, value = override.key_or_group, override.value()
        changes = key.endswith("._target_") or (isinstance(value, dict) and "_target_" in value)
        return not changes, key.count(".") if changes else 0

    for override in sorted(overrides, key=order):
        apply(cfg, override, parts)
    nodes.check(cfg, parts)


def apply(cfg: DictConfig, override: Override, parts: dict[str, None] | None = None) -> None:
    """Set one value; the nodes that it gives a `_target_`, see `genai.nodes`, join `parts`.

    Raises UserError if there is no such key or the value is of another type than the one there.
    """
    key, parts = override.key_or_group, {} if parts is None else parts
    node, _, name = key.rpartition(".")
    if override.is_delete():
        raise UserError(f"{override.input_line} would remove a key: set it to null instead")
    known = list(keys(cfg))
    free = name == "_target_" and (node in known or _takes(cfg, node, parts)) and not _at(cfg, node)
    if not override.is_add() and key not in known and not free and not _takes(cfg, key, parts):
        adds = f"; +{key}= adds one" if "." in key and ranges.is_read(cfg, key) else ""
        raise UserError(f"there is no key {key}{nearest(key, known)} (--help lists all{adds})")
    value = override.value()
    present = OmegaConf.select(cfg, key, throw_on_missing=False) if key in known else None
    change = OmegaConf.create()
    OmegaConf.update(change, key, value, force_add=True)
    parts |= dict.fromkeys(nodes.drop_stale_keys(cfg, change))
    if name == "_target_" or (isinstance(value, dict) and "_target_" in value):
        parts[node if name == "_target_" else key] = None
    OmegaConf.update(cfg, key, fitted(key, value, present), force_add=True, merge=True)


def _takes(cfg: DictConfig, key: str, parts: Iterable[str]) -> bool:
    """True if `key` is an argument of the new `_target_` of one of the nodes at `parts`."""
    node, _, name = key.rpartition(".")
    target = nodes.target_of(_at(cfg, node)) if node in parts else ""
    return target != "" and bool(nodes.parameters(target).keys() & {name, "**"})


def _at(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_missing=False, throw_on_resolution_failure=False)


def fitted(key: str, value: Any, present: Any) -> Any:
    """The value, made to fit the type of the one present. Raises UserError if it cannot be."""
    if value is None and isinstance(present, DictConfig) and "." not in key:
        raise UserError(
            f"{key}=null would leave nothing of a group of keys ({', '.join(map(str, present))}): set one of them"
        )
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


SYNONYMS = {  # what other projects call a key
    **dict.fromkeys(
        ("epochs", "max_epochs", "num_epochs", "n_epochs", "iterations", "num_steps", "steps"), "max_steps"
    ),
    **dict.fromkeys(("learning_rate", "optim.learning_rate"), "optim.lr"),
    **dict.fromkeys(("gpus", "devices", "num_gpus"), "trainer.devices"),
    **dict.fromkeys(("checkpoint", "ckpt_path", "model", "run", "run_dir"), "ckpt"),
    **dict.fromkeys(("output", "out_dir", "output_dir", "outdir"), "out"),
    **dict.fromkeys(("num_samples", "n_samples", "samples", "count"), "n"),
    **dict.fromkeys(("dataset", "datasets"), "data"),
    "cfg_scale": "guidance",
    "class": "label",
    "data_dir": "data.root",
    "output_folder": "run_dir",
}


def nearest(word: str, words: Iterable[str]) -> str:
    """ ", did you mean X?" where something comes near; a bare name matches the last part of a dotted key."""
    words = list(words)
    if SYNONYMS.get(word) in words:
        return f", did you mean {SYNONYMS[word]}?"
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
    "codec.ckpt",
    "codec.cache",
    "trainer.accelerator",
    "trainer.devices",
    "logger",
    "trust",
    *(f"{player}.{key}" for player in PLAYERS for key in SCHEDULE),
)
PART_FILE = re.compile(r"model\..+\.ckpt")
"""Where the file of a part lies, whose weights a run that goes on has in its own checkpoints."""


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
        and not PART_FILE.fullmatch(key)
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
    resume = os.path.expanduser(str(resume))
    path = Path(resume) / "config.yaml"
    if not os.path.isfile(path):
        runs = sorted(Path(resume).glob("*/config.yaml")) if os.path.isdir(resume) else []
        hint = f", did you mean resume={runs[-1].parent}?" if runs else ""
        raise UserError(f"resume={resume} is no run directory: there is no {path}{hint}")
    for key in given:
        if key not in (*RESUMABLE, "resume") and not key.startswith("logger.") and not PART_FILE.fullmatch(key):
            raise UserError(f"{key}= cannot change when a run is resumed, only {', '.join(RESUMABLE)} can")
    stored: Any = OmegaConf.create(stored_config(path, RUN_GROUPS))
    stored.trust = None  # what a run may build is for the user to say, each time
    missing = [key for key in NEEDED if OmegaConf.select(stored, key) is None]
    if missing:
        raise UserError(f"{path} is no config of a run (it has no {', '.join(missing)}): bring the file back")
    if "logger" in given:
        stored.logger = cfg.logger
    _completed(stored, given, cfg)
    cfg.clear()
    cfg.update(stored)
    return overrides


CONFIG_BYTES = 2**22
NEEDED = (  # values without which nothing goes on
    "name", "max_steps", "seed", "debug", "accumulate", "log_every_steps",
    "trainer.devices", "trainer.accelerator", "trainer.precision",
)  # fmt: skip
RUN_GROUPS = ("model", "data", "loop", "optim", "sampler", "trainer", "callbacks")


def stored_config(path: Path, groups: Sequence[str] = ("model", "data", "sampler")) -> dict[str, Any]:
    """The config.yaml of a run, which somebody else may have written, brought up to date by MOVED.

    Raises UserError unless it can be read, holds plain values alone, and has these groups of keys.
    """
    try:
        reason = "" if path.stat().st_size <= CONFIG_BYTES else f"it has more than {CONFIG_BYTES // 2**20} MiB"
        text = "" if reason else path.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        if "${" in text or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            reason = "it has values that stand for others (${...} or *), which no run writes"
        found: Any = {} if reason else up_to_date(OmegaConf.to_container(OmegaConf.create(text)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason, found = " ".join(str(error).split())[:200], {}
    if not reason and not (isinstance(found, dict) and found):
        reason = "it holds no keys"
    for group in groups if not reason else ():
        node = found.get(group)
        if not isinstance(node, dict):
            reason = f"it has no {group}"
        elif group in ("model", "data", "sampler") and not isinstance(node.get("_target_"), str):
            reason = f"its {group} has no _target_"
        if reason:
            break
    logger = found.get("logger") if not reason else None
    if logger is not None and not (isinstance(logger, dict) and isinstance(logger.get("_target_"), str)):
        reason = "its logger has no _target_"
    if reason:
        raise UserError(
            f"{path} is no config of a run ({reason}): bring the file back, or name a checkpoint file below it with ckpt="
        )
    return found


def _completed(stored: DictConfig, given: Iterable[str], cfg: DictConfig) -> None:
    """Add to a run's stored config the keys that are given now and that it is too old to have, as they were meant then."""
    logger = stored.get("logger")
    if logger is not None and cfg.logger is not None and logger._target_ == cfg.logger._target_:
        for key in (key.removeprefix("logger.") for key in given if key.startswith("logger.")):
            if key in cfg.logger:
                logger.setdefault(key, cfg.logger[key])
    first_stage = OmegaConf.select(stored, "model.latent.codec")
    if "codec" in stored and nodes.target_of(first_stage) == PRETRAINED:  # where it is from was stored twice
        first_stage.update({key: f"${{codec.{key}}}" for key in ("ckpt", "sha256") if key in stored.codec})
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
        theirs = {key: None if key in PATHS else value for key, value in stored["sampler"].items()}
        cfg.sampler = OmegaConf.create(theirs)  # a file names no other files
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


def _stored_config(ckpt: Any) -> tuple[str, dict[str, Any]]:
    """The run or file that `ckpt` names and its config: a run directory's is read without torch, that of a checkpoint
    file or of the newest run with it."""
    ckpt = None if ckpt is None else os.path.expanduser(str(ckpt))
    if ckpt is not None and os.path.isfile(path := Path(ckpt) / "config.yaml"):
        return ckpt, stored_config(path)
    from genai import checkpoint

    content, found = checkpoint.locate(ckpt)
    return str(found), content["config"]
