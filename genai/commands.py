"""The commands train, sample, evaluate, compare and baselines, from the console (`genai train`) and from a checkout's scripts.

Nothing here imports torch or Hydra before a command needs it, so that `genai --help` answers at once.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import genai
from genai.core import interrupt, streams

HELP = """\
Train, sample and measure generative models:  genai <command> [key=value ...]

  genai train model=ddpm data=digits     train a model; the run goes to runs/
  genai sample label=7                   sample from the newest run
  genai evaluate metrics=[frechet]       measure the newest run
  genai compare runs/                    compare finished runs in a table and a page
  genai baselines data=digits            measure trivial models of a data set

genai <command> --help lists every key of a command, genai --version prints the version.
Completion of commands and keys:  eval "$(genai -sc install=bash)", or zsh; fish: genai -sc install=fish | source
"""


def start() -> None:
    """Begin a command, before its imports, which take long."""
    interrupt.exit_on_signal()
    streams.protect_output()


def main() -> None:
    """Run the command that the first argument of `genai` names; exits with code 2 and a sentence if there is no such command."""
    start()
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name in COMMANDS:
        sys.argv = [f"genai {name}", *rest]
        COMMANDS[name]()
    elif name in ("", "-h", "--help"):
        print(HELP, end="")
        raise SystemExit(0 if name else 2)
    elif name == "--version":
        print(f"genai {genai.__version__}")
    elif name in ("-sc", "--shell-completion"):
        complete()
    else:
        from genai.cli import fail, nearest
        from genai.core.errors import UserError

        names = ", ".join(COMMANDS)
        fail(UserError(f"the command must be one of {names}, got {name}{nearest(name, COMMANDS)} (genai --help)"))


def complete() -> None:
    """Print Hydra's completion script for a shell, or answer its query with commands or with the keys of the typed command."""
    _, name, *rest = [*os.environ.get("COMP_LINE", "").split(" "), "", ""]
    sys.argv[0] = "genai"
    if not any(argument.startswith("query=") for argument in sys.argv):
        train()
    elif not any(rest[:-2]) and name not in COMMANDS:
        print(*COMMANDS)
    elif name in COMMANDS and name != "compare":  # whose arguments are folders, which the shell knows
        os.environ["COMP_LINE"] = " ".join(["genai", *rest[:-2]])
        COMMANDS[name]()


def train() -> None:
    """Train a model: `python train.py`, `genai train`."""
    start()
    from genai import sweeps
    from genai.cli import fail, main
    from genai.core.errors import UserError

    dry = "--dry-run" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--dry-run"]

    def task(cfg: Any) -> None:
        from genai.train.run import dry_run, run

        sweeps.refuse_alone(cfg)
        (dry_run if dry else run)(cfg)

    if dry and {"-m", "--multirun"} & {*sys.argv}:
        fail(UserError("--dry-run is for one run: leave -m out"))
    sweeps.register()
    main(task, "train", sweeps.prepare)


def sample() -> None:
    """Sample from a checkpoint: `python sample.py`, `genai sample`."""
    start()
    from genai.cli import main, prepare_sampling

    def task(cfg: Any) -> None:
        from genai.sampling import converse, run

        (converse if cfg.prompt == "-" else run)(cfg)

    main(task, "sample", prepare_sampling)


def evaluate() -> None:
    """Measure a checkpoint: `python evaluate.py`, `genai evaluate`."""
    start()
    from genai.cli import main, prepare_evaluation

    def task(cfg: Any) -> None:
        from genai.evaluation.run import run, tracked_run

        result = run(cfg)
        folder = tracked_run(result["cards"]) if cfg.track else None
        if folder is not None:
            from genai.train.trackers import log_cards

            log_cards(folder, result["cards"])

    main(task, "evaluate", prepare_evaluation)


def compare() -> None:
    """Compare finished runs: `genai compare`, `python -m genai.compare`."""
    start()
    from genai.compare.__main__ import main

    with interrupt.raise_on_signal():
        main()


def baselines() -> None:
    """Measure trivial models of a data set: `genai baselines`, `python -m genai.evaluation.baselines`."""
    start()
    from genai.evaluation.baselines.__main__ import main

    main()


COMMANDS: dict[str, Callable[[], None]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "compare": compare,
    "baselines": baselines,
}
