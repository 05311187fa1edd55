"""The searches of a sweep: all combinations, or Optuna's trials."""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from genai.cli import nearest, quote
from genai.core.errors import UserError, at_least
from genai.sweeps.jobs import Job, journal, last_values

Check = Callable[[Sequence[str]], None]
Launch = Callable[[Sequence[Job]], None]


@dataclass
class Settings:
    """The settings of a sweep, as in the files of conf/sweep. Raises UserError for invalid ones."""

    name: str
    search: str = "basic"
    over: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    metric: str | None = "val/loss"
    direction: str = "minimize"
    trials: int = 20
    batch: int = 1
    seed: int = 0

    def __post_init__(self):
        for key, choices in {"search": ("basic", "optuna"), "direction": ("minimize", "maximize")}.items():
            if (value := getattr(self, key)) not in choices:
                raise UserError(
                    f"sweep.{key}={value} must be one of {', '.join(choices)}{nearest(str(value), choices)}"
                )
        if self.metric is None and self.search == "optuna":
            raise UserError("sweep.metric=null ranks nothing, and sweep.search=optuna needs a metric to choose by")
        for key, least in {"trials": 1, "batch": 1, "seed": 0}.items():
            at_least(getattr(self, key), least, f"sweep.{key}")
        for key, axis in self.over.items():
            ranged = self.search == "optuna" and isinstance(axis, dict)
            if not (isinstance(axis, list) and axis) and not (
                ranged and {"low", "high"} <= set(axis) <= {"low", "high", "log", "step"}
            ):
                more = " or {low, high, log, step}" if self.search == "optuna" else " with sweep.search=basic"
                raise UserError(f"sweep.over.{key}={axis} must be a list of values{more}")


def literal(value: object) -> str:
    """Format a value for Hydra's command line."""
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, str):
        return quote(value)
    return repr(value) if isinstance(value, float) else json.dumps(value)


def slug(text: str, length: int = 60) -> str:
    """Return a text as a folder's name: characters that a shell would need quotes for become dashes."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[:length]


def name_value(value: str) -> str:
    """Format a value for a folder's name without losing its sign: 1e+30 is 1e30, -1 is minus1."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "minus", value.replace("e+", "e"))


def digest(*parts: object) -> str:
    """Return the first 8 digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def fixed_overrides(parsed: Sequence[Override]) -> dict[str, str]:
    """Return the overrides by key; a later one replaces an earlier one."""
    return {o.get_key_element(): f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in parsed}


class Basic:
    """The search over all combinations of the axes. Raises UserError if a job's config cannot be composed."""

    def __init__(self, settings: Settings, parsed: Sequence[Override], check: Check):
        try:
            combinations = BasicSweeper.split_arguments(list(parsed), None)[0]
        except HydraException as error:
            raise UserError(f"the values of a sweep cannot be listed ({error}): write key=a,b,c") from error
        if not combinations:
            raise UserError("there is nothing to run: a key of the sweep has no values")
        swept = [o.get_key_element() for o in parsed if o.is_sweep_override() or o.key_or_group in settings.over]
        self.jobs = []
        for overrides in combinations:
            check(overrides)
            values = dict(o.split("=", 1) for o in overrides if o.split("=", 1)[0] in swept)
            name = "_".join(f"{key.rpartition('.')[2]}-{name_value(value)}" for key, value in values.items())
            self.jobs.append(Job(f"{slug(name) or 'job'}_{digest(overrides)[:6]}", overrides, values))
        self.identity, self.total = digest(combinations), len(self.jobs)

    def run(self, folder: Path, launch: Launch) -> list[str]:
        """Launch the jobs that are not finished; returns the keys of those that are not finished afterwards."""
        records = journal(folder)
        for job in self.jobs:  # a job in the journal keeps its name, which older versions formed without signs
            job.key = next((key for key in records if key.rpartition("_")[2] == job.key.rpartition("_")[2]), job.key)
        left = [job for job in self.jobs if records.get(job.key, {}).get("status") != "finished"]
        print(f"{folder}: {len(self.jobs)} jobs, {len(self.jobs) - len(left)} of them finished before", flush=True)
        if left:
            launch(left)
        else:
            print(f"nothing is left to run; without {folder} they would run again")
        records = journal(folder)
        return [job.key for job in self.jobs if records.get(job.key, {}).get("status") != "finished"]


class Optuna:
    """The search by Optuna's TPE sampler; its study is in the sweep's folder, so that the same command continues it."""

    def __init__(self, settings: Settings, parsed: Sequence[Override], check: Check):
        try:
            self.optuna: Any = importlib.import_module("optuna")
        except ModuleNotFoundError as error:
            raise UserError('sweep.search=optuna needs the package optuna: pip install "genai-lab[sweeps]"') from error
        for override in parsed:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: with sweep.search=optuna only sweep.over names several values")
        self.settings, self.fixed, self.total = settings, fixed_overrides(parsed), settings.trials
        over = {key: axis for key, axis in settings.over.items() if key not in self.fixed}
        if not over:
            raise UserError("sweep.over is empty: Optuna has nothing to choose")
        self.space = {key: self.distribution(key, axis) for key, axis in over.items()}
        for i in (0, -1):
            ends = {
                k: axis[i] if isinstance(axis, list) else (axis["low"], axis["high"])[i] for k, axis in over.items()
            }
            check([*self.fixed.values(), *(f"{key}={literal(value)}" for key, value in ends.items())])
        for key, axis in over.items():
            for value in axis[1:-1] if isinstance(axis, list) else ():
                check([*self.fixed.values(), *(f"{k}={literal(v)}" for k, v in {**ends, key: value}.items())])
        whole = {k: v for k, v in asdict(settings).items() if k not in ("trials", "batch", "over", "overrides")}
        self.identity = digest(whole, over, self.fixed)

    def distribution(self, key: str, axis: Any) -> Any:
        kinds = self.optuna.distributions
        if isinstance(axis, list):
            return kinds.CategoricalDistribution([literal(value) for value in axis])
        low, high, step, log = axis["low"], axis["high"], axis.get("step"), bool(axis.get("log"))
        try:
            if all(isinstance(value, int) for value in (low, high, step or 1)):
                return kinds.IntDistribution(low, high, log=log, step=step or 1)
            return kinds.FloatDistribution(low, high, log=log, step=step)
        except (TypeError, ValueError) as error:
            raise UserError(f"sweep.over.{key}={axis} is not a range: {error}") from error

    def run(self, folder: Path, launch: Launch) -> list[str]:
        """Run trials until `trials` have finished or failed, stopped ones first; returns the keys of the failed ones."""
        states, failed = self.optuna.trial.TrialState, []
        study = self.study(folder)
        while (left := self.settings.trials - len(failed) - len(study.get_trials(states=(states.COMPLETE,)))) > 0:
            jobs = self.ask(study, min(left, self.settings.batch))
            launch(list(jobs.values()))
            records = journal(folder)
            for number, job in jobs.items():
                status = records.get(job.key, {}).get("status")
                if status == "finished":
                    study.tell(number, metric_value(folder / job.key, str(self.settings.metric)))
                else:
                    failed.append(job.key)
                    study.tell(number, state=states.FAIL)
        return failed

    def study(self, folder: Path) -> Any:
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        backend = self.optuna.storages.journal.JournalFileBackend(str(folder / "study.jsonl"))
        storage = self.optuna.storages.JournalStorage(backend)
        study = self.optuna.create_study(
            storage=storage, study_name=folder.name, direction=self.settings.direction, load_if_exists=True
        )
        finished = len(study.get_trials(states=(self.optuna.trial.TrialState.COMPLETE,)))
        print(f"{folder}: {self.settings.trials} trials, {finished} of them finished before", flush=True)
        return study

    def ask(self, study: Any, n: int) -> dict[int, Job]:
        """Return up to n trials by number, stopped ones first; new ones depend only on the seed and the trials so far."""
        states = self.optuna.trial.TrialState
        trials = study.get_trials()
        asked = {
            t.number: t.params for t in trials if t.state == states.RUNNING and t.params.keys() == self.space.keys()
        }
        for trial in trials:
            if trial.state == states.RUNNING and trial.number not in asked:
                study.tell(trial.number, state=states.FAIL)  # the sweep was killed while this trial was made
        study.sampler = self.optuna.samplers.TPESampler(seed=self.settings.seed + len(trials))
        for _ in range(n - len(asked)):
            trial = study.ask(self.space)
            asked[trial.number] = trial.params
        return {number: self.job(number, asked[number]) for number in sorted(asked)[:n]}

    def job(self, number: int, params: dict[str, Any]) -> Job:
        values = {key: value if isinstance(value, str) else literal(value) for key, value in params.items()}
        return Job(f"trial-{number:03d}", [*self.fixed.values(), *(f"{k}={v}" for k, v in values.items())], values)


def metric_value(run_dir: Path, metric: str) -> float:
    """Return a finished run's last value of a metric. Raises UserError if the run does not have it."""
    values = last_values(run_dir)
    if metric not in values:
        raise UserError(
            f"sweep.metric={metric} is not a metric of {run_dir}{nearest(metric, values)}; it has {', '.join(sorted(values))}"
        )
    return values[metric]
