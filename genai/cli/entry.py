"""The entry point of every command: runs a task with the config composed from sys.argv."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from genai.cli.compose import Prepare, compose_config, conf_dir, config_folders, group_choices, group_defaults, new_keys
from genai.cli.errors import fail, one_sentence
from genai.cli.overrides import quote_override, refuse_hydra_keys
from genai.core.errors import UserError
from genai.core.interrupt import raise_on_signal


def main(task: Callable[[DictConfig], Any], name: str, prepare: Prepare | None = None) -> None:
    """Run `task(cfg)` with the config `name` composed from sys.argv; see `compose_config` for `prepare`.

    A UserError, or a disk that is full or cannot be written, is printed as one sentence and exits with code 2.
    """
    with raise_on_signal():
        _main(task, name, prepare)


def _main(task: Callable[[DictConfig], Any], name: str, prepare: Prepare | None) -> None:
    # By default OpenMP threads spin for a long time while they wait, and where another process wants the core, steps get 20
    # to 40 times slower. With brief spinning they get 3 times slower there, and no slower on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # matplotlib warns of a home directory that cannot be written, and works without one.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    args = arguments()

    def run_checked(cfg: DictConfig) -> Any:
        with one_sentence():
            if HydraConfig.initialized():  # a job of a sweep, which is checked as a single run is
                cfg = compose_config(name, HydraConfig.get().overrides.task, prepare, config_dir=args.config_dir)
            return task(cfg)

    with one_sentence():
        try:
            sys.path.append(os.getcwd())  # where a user's own package may be
        except OSError as error:
            raise UserError(f"the working directory cannot be used ({error.strerror}): cd to another one") from error
        check_flags(args, name)
        if not any((args.hydra_help, args.info, args.shell_completion)):
            if args.help and not args.overrides:
                prepare = None  # --help alone describes the defaults, and looks for no run
            cfg = compose_config(name, args.overrides, prepare, args.multirun, args.config_dir)
            if args.help:
                return print(help_text(name, cfg, args.config_dir))
            if args.cfg == "job" and not args.package:
                return print(OmegaConf.to_yaml(cfg, resolve=args.resolve), end="")
            if not args.multirun and not args.cfg:
                return run_checked(cfg)
    import hydra

    given = {override: quote_override(override, args.multirun) for override in args.overrides}
    if args.multirun:
        given |= {override: f"++{given[override]}" for override in new_keys(name, args.overrides, args.config_dir)}
    sys.argv = [given.get(argument, argument) for argument in sys.argv]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)(run_checked)()
    except (ConfigCompositionException, OverrideParseException, MissingConfigException) as error:
        fail(UserError("cannot compose the config: " + " ".join(str(error).split())))


def arguments() -> argparse.Namespace:
    """Return Hydra's arguments in sys.argv; an unknown flag exits with one sentence."""
    parser = get_args_parser()
    parser.error = lambda message: refuse_flags(message, parser)  # type: ignore[method-assign]
    return parser.parse_args()


def refuse_flags(message: str, parser: argparse.ArgumentParser) -> NoReturn:
    """Exit with one sentence instead of argparse's usage; for --key=value it names key=value, for a flag its values."""
    flags = parser._option_string_actions
    typed = [a for a in sys.argv[1:] if a.partition("=")[0] not in flags]
    wrong = next((a for a in typed if re.match(r"-{1,2}[a-z]\w*(-\w+)*=", a)), None)
    flag = re.match(r"argument (-[\w-]+)", message)
    if flag is not None and wrong is None:
        action = flags[flag[1]]
        value = "no value" if action.nargs == 0 else "a folder" if action.dest == "config_dir" else "a name"
        value = f"one of {', '.join(action.choices)}" if action.choices else value
        fail(UserError(f"the command line cannot be parsed, {message}: give {flag[1]} {value}"))
    hint = f": write {wrong.lstrip('-').replace('-', '_')}" if wrong else ": keys are written key=value, without dashes"
    fail(UserError(f"the command line cannot be parsed, {message}{hint} (--help lists all keys)"))


def check_flags(args: argparse.Namespace, name: str) -> None:
    """Raise UserError for flags of Hydra that have no effect here, and for arguments that are not UTF-8."""
    for argument in sys.argv:
        if any("\ud800" <= c <= "\udfff" for c in argument):
            raise UserError(f"{argument!r} is not valid UTF-8: rename the file or folder")
    if args.config_name not in (None, name) or args.config_path:
        raise UserError("--config-name and --config-path have no effect here: choose experiment=, or add --config-dir")
    if args.experimental_rerun or (args.package and not args.cfg):
        raise UserError(
            "--experimental-rerun and --package are flags of Hydra that have no effect here: leave them out"
        )
    if args.resolve and not args.cfg:
        raise UserError("--resolve has no effect without --cfg: add --cfg job, or leave it out")
    if args.multirun and name != "train":
        raise UserError(
            f"genai {name} has no sweeps: leave -m out, and repeat the command in a loop of the shell, "
            f"for s in 0 1; do genai {name} seed=$s; done"
        )
    if not (args.multirun or args.cfg or args.info or args.hydra_help or args.shell_completion):
        refuse_hydra_keys(args.overrides)
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir} is not a folder: name the one with your own configs")


def help_text(name: str, cfg: DictConfig, config_dir: str | None) -> str:
    """Return the text of --help: the template in config `name` with its $GROUPS, their choices, and its $CONFIG, every key."""
    own: Any = OmegaConf.load(Path(conf_dir()) / f"{name}.yaml")
    groups = sorted(group_defaults(name))
    folders = config_folders(config_dir)
    lines = [f"  {group}: {', '.join(names)}" for group in groups if (names := group_choices(group, folders))]
    return own.hydra.help.template.replace("$GROUPS", "\n".join(lines)).replace("$CONFIG", OmegaConf.to_yaml(cfg))
