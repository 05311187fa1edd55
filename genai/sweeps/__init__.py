"""Sweeps: many runs by one command, `python train.py -m seed=0,1,2` or `-m sweep=<a file of conf/sweep>`.

Each job is a `train.py` in a process of its own, started through Hydra's launcher (one after the other, joblib, submitit), so
that a failure in one job does not affect the others. `runs/sweeps/<name>-<hash of the command>/` contains the runs, their logs
and `journal.jsonl`. The same command finds that folder again: it skips finished jobs, resumes stopped ones, and starts failed
ones once more.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from genai.cli import (
    arguments,
    compose_config,
    conf_dir,
    fail,
    nearest,
    parse_override,
    prepare_training,
    quote_override,
)
from genai.core import files
from genai.core.errors import UserError
from genai.sweeps.comparison import Comparison
from genai.sweeps.jobs import Job, Runner, hold_lock, journal
from genai.sweeps.search import Basic, Optuna, Settings, literal, slug
from genai.sweeps.summary import summarise

RUNS = Path("runs/sweeps")


def prepare(cfg: DictConfig, overrides: list[Override]) -> list[Override]:
    """Prepare a config as `cli.prepare_training` does; with sweep= complete that node, as each job checks all other keys."""
    if "sweep" not in cfg and not any(o.key_or_group.startswith("sweep.") for o in overrides):
        return prepare_training(cfg, overrides)
    given: Any = OmegaConf.to_container(cfg.sweep) if "sweep" in cfg else {}
    chosen = next((str(o.value()) for o in overrides if o.key_or_group == "sweep"), cfg.name)
    for key in given:
        if key not in Settings.__dataclass_fields__:
            raise UserError(f"sweep={chosen} has a key {key}{nearest(key, Settings.__dataclass_fields__)}")
    cfg.sweep = OmegaConf.create(asdict(Settings(**{"name": chosen, **given})))
    return [o for o in overrides if o.key_or_group.startswith("sweep.")]


def refuse_alone(cfg: DictConfig) -> None:
    """Raise UserError for sweep= without -m."""
    if "sweep" in cfg:
        raise UserError(f"sweep={cfg.sweep.name} names several runs: add -m to run them all")


def register() -> None:
    """Register the sweeper with Hydra, which accepts plugins only under names below `hydra_plugins`: conf/hydra/sweeper.

    With -m only Hydra's own overrides are left for Hydra. All others belong to the jobs, whose config may have other keys.
    """
    Plugins.instance().class_name_to_class["hydra_plugins.genai.JournalSweeper"] = JournalSweeper
    args = arguments()
    if args.multirun and not (args.help or args.hydra_help or args.cfg or args.info):
        JournalSweeper.given = [o for o in args.overrides if not re.match(r"[+~]*hydra[./]", o)]
        sys.argv = [a for a in sys.argv if a not in JournalSweeper.given]


def train_command() -> list[str]:
    """Return the command line that starts one training: a checkout's train.py, or the command of an installed package."""
    script = Path(conf_dir()).parent / "train.py"
    return [sys.executable, *([str(script)] if script.is_file() else ["-P", "-m", "genai", "train"])]


class JournalSweeper(Sweeper):
    """Hydra's sweeper for train.py; the launcher is chosen by hydra/launcher=."""

    given: Sequence[str] = ()  # the command line's overrides, without Hydra's own

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.options = hydra_context, config
        self.config_dir = arguments().config_dir

    def sweep(self, arguments: list[str]) -> None:
        try:
            self.run(list(self.given))
        except UserError as error:
            fail(error)

    def run(self, given: list[str]) -> None:
        """Run all jobs and write the summary. Raises UserError if the command is wrong or a job failed."""
        cfg = compose_config("train", given, prepare, sweep=True, config_dir=self.config_dir)
        chosen: Any = OmegaConf.to_container(cfg.sweep) if "sweep" in cfg else {"name": cfg.name}
        settings = Settings(**chosen)
        lines = [o for o in settings.overrides if o.partition("=")[0] not in settings.over]
        lines += [quote_override(a, True) for a in given if not re.match(r"sweep[.=]", a)]  # the command line wins
        if settings.search == "basic":
            lines = [*(f"{k}={','.join(map(literal, v))}" for k, v in settings.over.items()), *lines]
        parsed = [parse_override(line) for line in lines]
        for override in parsed:
            if override.key_or_group in ("run_dir", "resume"):
                raise UserError(f"{override.input_line}: a sweep names the folders of its runs itself")
        axes = [*settings.over, *(o.get_key_element() for o in parsed if o.is_sweep_override())]
        self.comparison = Comparison(settings.metric, axes)
        search = (
            Optuna(settings, parsed, self.check) if settings.search == "optuna" else Basic(settings, parsed, self.check)
        )
        folder = RUNS / f"{slug(settings.name)}-{search.identity}"
        with files.check_writable(folder, "run it where runs/ can be written"):
            files.make_folder(folder)
            file = (folder / ".lock").open("ab")
        with file as lock:
            try:
                with hold_lock(lock, None):
                    finished = sum(record["status"] == "finished" for record in journal(folder).values())
                    self.total, self.began = search.total - finished, time.time()
                    unfinished = search.run(folder, lambda jobs: self.launch(folder, settings.metric, jobs))
                    summarise(folder, settings, unfinished)
            except BlockingIOError as error:
                raise UserError(f"this sweep is running already, in {folder}") from error

    def check(self, overrides: Sequence[str]) -> None:
        """Raise UserError for an invalid override, or a job whose metric is not comparable with the others'."""
        self.comparison.add(compose_config("train", overrides, prepare_training, config_dir=self.config_dir))

    def launch(self, folder: Path, metric: str | None, jobs: Sequence[Job]) -> None:
        """Run jobs through Hydra's launcher; their outcomes are in the journal."""
        own = ["--config-dir", str(Path(self.config_dir).absolute())] if self.config_dir else []
        command = [*train_command(), *own]
        runner = Runner(folder, command, metric, {job.key: job for job in jobs}, self.total, self.began)
        launcher = Plugins.instance().instantiate_launcher(self.context, runner, self.options)
        try:
            launcher.launch([[f"run_dir={folder / job.key}"] for job in jobs], initial_job_idx=0)
        except Exception as error:  # a lost node or worker must not lose the results of other jobs
            print(f"the launcher failed: {type(error).__name__}: {error}", file=sys.stderr)
