"""Experiment trackers: functions of a run directory, a title and a config. They never prompt, hang or stop a run."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from genai import progress
from genai.cli import stored_config
from genai.core import metrics_csv
from genai.core.errors import UserError
from genai.core.runs import Card
from genai.evaluation.cards import direction, table
from genai.train.wandb_start import first_line, restore_home, start_run

Tracker = Callable[[Path, str, dict], Logger | None]


def none(folder: Path, title: str, config: dict) -> None:
    """Track nothing; metrics.csv is written all the same."""


def tensorboard(folder: Path, title: str, config: dict) -> Logger:
    """Write event files below the run directory.

    Raises UserError without the package tensorboard.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from error


def wandb(
    folder: Path,
    title: str,
    config: dict,
    *,
    project: str = "genai",
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] | None = None,
    notes: str | None = None,
    artifacts: bool = False,
    timeout_seconds: float = 10,
) -> Logger | None:
    """Track with Weights & Biases: online if the machine is logged in and the server answers, offline otherwise.

    The run's id lies in the directory's `wandb_id`, so that a resumed run goes on under the same id.

    Args:
        title: the run's name if `name` is None, followed by the last part of its directory.
        project, entity, group, tags, notes: as W&B's own; a group of None is that of WANDB_RUN_GROUP.
        artifacts: whether the last and the best checkpoint are uploaded at the end.
        timeout_seconds: for the server to accept the run.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    shown = name or os.environ.get("WANDB_NAME") or (title if folder.name == title else f"{title} {folder.name}")
    run = start_run(
        folder,
        timeout_seconds,
        project=project,
        entity=entity,
        group=group,
        name=shown[:128],
        tags=tags,
        notes=notes,
        config=config,
    )
    if run is None:
        return None
    with _report_errors("the run's summary"):
        run.define_metric("*", step_metric="trainer/global_step")
        if "parameters" in config:
            run.summary["parameters"] = config["parameters"]
    return WandB(run, folder, artifacts)


class WandB(WandbLogger):
    """Lightning's logger, which also keeps the best values so far in the run's summary, as best/<metric>, and uploads checkpoints
    as artifacts."""

    def __init__(self, run: Any, folder: Path, artifacts: bool):
        super().__init__(experiment=run)
        self.run, self.folder, self.artifacts = run, folder, artifacts
        self.best: dict[str, float] = {}
        for row in metrics_csv.rows(folder / "metrics.csv"):  # a resumed run's
            self.keep_best({row.name: row.value})

    def keep_best(self, metrics: Mapping[str, float]) -> None:
        """Write values that are better than all before them to the summary; nan is never better."""
        for key, value in metrics.items():
            better = direction(self.folder, key.removeprefix("card/")) if key.startswith("card/") else None
            if key == "val/loss" or better is not None:
                sign = -1 if better == "higher" else 1
                if sign * value < sign * self.best.get(key, sign * float("inf")):
                    self.best[key] = value
                    self.run.summary[f"best/{key}"] = value

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        super().log_metrics(metrics, step)
        self.keep_best(metrics)

    def log_checkpoints(self) -> None:
        """Upload the last and the best checkpoint as artifacts of type model, if `artifacts` is true."""
        import wandb

        for which in ("last", "best") if self.artifacts else ():
            path = self.folder / "checkpoints" / f"{which}.ckpt"
            if path.exists() and not path.is_symlink():
                artifact = wandb.Artifact(f"{self.run.id}-{which}", type="model")
                artifact.add_file(str(path))
                self.run.log_artifact(artifact)


def check(tracker: Any) -> Tracker:
    """Return the tracker as a partial function that is not yet called.

    Raises UserError for a key that it does not take; the ranges of values are in genai/ranges.
    """
    partial = tracker if isinstance(tracker, functools.partial) else functools.partial(tracker)
    keywords: dict[str, Any] = partial.keywords
    known = [p.name for p in inspect.signature(partial.func).parameters.values()][3:]
    for key in keywords:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"the logger {getattr(partial.func, '__name__', partial.func)} has no key {key}: {has}")
    return partial


@contextlib.contextmanager
def _report_errors(what: str) -> Iterator[None]:
    """Print an exception of a tracker as one line instead of raising it."""
    try:
        yield
    except Exception as error:
        print(f"wandb: {what} could not be logged ({first_line(error)})")


def finish(failed: bool, logger: Logger | None = None) -> None:
    """Close the tracker's run, as crashed if it failed; otherwise upload its checkpoints if they were asked for."""
    import sys

    if isinstance(logger, WandB) and not failed:
        with _report_errors("checkpoints"):
            logger.log_checkpoints()
    if (module := sys.modules.get("wandb")) is not None and module.run is not None:
        with _report_errors("the run's end"), progress.task("finishing the tracker's run"):
            module.finish(exit_code=int(failed))
    restore_home()


def log_cards(folder: Path, found: Sequence[Card]) -> None:
    """Log cards as a table of the W&B run of a run directory, which is opened again for it."""
    config = stored_config(folder / "config.yaml")
    arguments = {key: value for key, value in config["logger"].items() if key != "_target_" and key != "_partial_"}
    logger = check(functools.partial(wandb, **arguments))(folder, config["name"], config)
    if isinstance(logger, WandB):
        with _report_errors("the table of cards"):
            logger.log_table("cards", *table(list(found)))  # type: ignore[arg-type]
            logger.keep_best({f"card/{card['metric']}": card["value"] for card in found})
        finish(False)


def log_comparison(rows: Sequence[Mapping[str, object]], page: Path, project: str) -> None:
    """Log the table of `genai.compare` and its page as one W&B run."""
    check(functools.partial(wandb, project=project))
    run = start_run(page.parent, 10, project=project, name="compare", job_type="compare")
    if run is not None:
        import wandb as module

        with _report_errors("the comparison"):
            run.log({"comparison": module.Table(list(rows[0]), [[row.get(name) for name in rows[0]] for row in rows])})
            run.log({"report": module.Html(page.read_text(encoding="utf-8"), inject=False)})
        finish(False)
