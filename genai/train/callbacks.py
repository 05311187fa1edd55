"""Callbacks that run between training steps, in this order: evaluate, sample, save, show progress, stop."""

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from genai import checkpoint, progress
from genai.checkpoint import Loaded
from genai.core import files, rng
from genai.core.errors import at_least
from genai.core.protocols import Batch, OnStep, Sampler, check_sampler, with_items
from genai.evaluation.features import Extractor
from genai.evaluation.plan import Plan
from genai.evaluation.run import check, evaluate
from genai.train.lit import LitModel
from genai.train.strategy import TIMEOUT, Ranks

Kind = TypeVar("Kind", bound=L.Callback)


class Between(L.Callback):
    """The base class of callbacks that do nothing within a step: Lightning skips a hook that is None."""

    on_train_batch_start = on_before_zero_grad = on_before_backward = on_after_backward = None  # type: ignore[assignment]
    on_before_optimizer_step = None  # type: ignore[assignment]


def callbacks(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the trainer's callbacks of one class."""
    return [c for c in trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]


def is_due(trainer: L.Trainer, every_steps: int | None) -> bool:
    """Return True if the step that has just ended is a multiple of every_steps, or the last one."""
    step = trainer.global_step
    return step == trainer.max_steps or (every_steps is not None and step % every_steps == 0)


def wait_for_first(trainer: L.Trainer, what: str) -> None:
    """Make the other ranks wait for rank zero, which works alone, without the time-out of a collective."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, Ranks):
        environment.wait_for_first(f"{what} of step {trainer.global_step}")


def _check_interval(every_steps: int | None, key: str) -> int | None:
    return None if every_steps is None else at_least(every_steps, 1, f"callbacks.{key}")


class Evaluate(Between):
    """Logs the averaged model's loss on fixed noise over the first `n` validation samples, at step 0 and then every
    `every_steps`: `val/loss`, its quartiles by noise level, and `ema/distance` from the live weights."""

    def __init__(self, every_steps: int | None, n: int | None = None):
        self.every_steps, self.n = _check_interval(every_steps, "evaluate.every_steps"), n
        self.loss, self.step = float("inf"), -1  # the latest val/loss, and its step

    def on_train_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        if trainer.global_step == 0:
            self.evaluate(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_: object) -> None:
        if is_due(trainer, self.every_steps):
            self.evaluate(pl_module)

    def evaluate(self, lit: LitModel) -> None:
        with progress.task("validation"):
            values = {f"val/{name}": value for name, value in lit.evaluate("val", self.n).items()}
        self.loss, self.step = values.get("val/loss", float("inf")), lit.trainer.global_step
        lit.record.log(lit.trainer.global_step, {**values, "ema/distance": lit.ema.distance().item()})


class Samples(Between):
    """Samples the averaged model every `every_steps` steps: `n` samples with seeds `seed`, `seed` + 1, ..., shown as the data
    shows its items."""

    def __init__(self, sampler: Sampler, every_steps: int | None, n: int = 100, seed: int = 0):
        self.sampler, self.every_steps, self.n, self.seed = (
            sampler,
            _check_interval(every_steps, "samples.every_steps"),
            n,
            seed,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        self.try_out(pl_module)

    def try_out(self, lit: LitModel, n: int = 1) -> None:
        """Make one network call for the last n samples: a sampler that cannot run raises at the start, not after hours."""

        def stop_at_once(i: int, n: int, state: Batch) -> None:
            raise _StopSampling

        check_sampler(self.sampler, lit.model)
        with contextlib.suppress(_StopSampling):
            self.sample(lit, n, stop_at_once, max(self.n - n, 0))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_: object) -> None:
        if is_due(trainer, self.every_steps):
            if trainer.is_global_zero:
                with progress.task("sampling", unit="steps") as task:
                    batch = self.sample(pl_module, self.n, progress.follow(task))
                shown = pl_module.data.show(batch, getattr(self.sampler, "keywords", {}).get("columns"))
                asked = list(dict.fromkeys(pl_module.data.describe_cond(self.n)))
                more = f", of {'; '.join(asked[:20])}{'; ...' if len(asked) > 20 else ''}" if asked else ""
                more += ", rows of originals above what the model makes of them" if "original" in batch else ""
                caption = f"seeds {self.seed} to {self.seed + self.n - 1}{more}"
                pl_module.record.samples(trainer.global_step, "samples", shown, caption)
            wait_for_first(trainer, "samples")

    def sample(self, lit: LitModel, n: int, on_step: OnStep = lambda *_: None, first: int = 0) -> Batch:
        """Return n samples of the averaged model, from number `first` on.

        There is always an on_step: without one a sampler may keep memory for CUDA graphs, which training needs.
        """
        sampler = with_items(self.sampler, lit.data.items)
        return sampler(lit.ema.module, rng.seed_range(self.seed + first, n), lit.data.cond(n), on_step)


class Cards(Between):
    """Measures the averaged model every `every_steps` steps as `evaluate.py` does; for the other arguments see
    evaluation.plan.Plan."""

    def __init__(
        self,
        every_steps: int | None,
        metrics: Sequence[Any] | None,
        split: str,
        n: int | None,
        repeats: int,
        extractor: Callable[..., Extractor],
        baselines: bool = True,
    ):
        self.every_steps = _check_interval(every_steps, "cards.every_steps")
        self.plan = Plan(metrics, split, n, repeats, extractor=extractor, baselines=baselines)

    def try_out(self, lit: LitModel, config: dict, trust: Sequence[str]) -> None:
        """Raise UserError at the start, and not after hours, for what cannot be measured.

        Args:
            trust: packages that the config's sampler may be built from.
        """
        self.trust = tuple(trust)
        if self.every_steps is not None:
            with torch.random.fork_rng(devices=[]):
                check(self.averaged_model(lit, config), lit.data, self.plan)

    def averaged_model(self, lit: LitModel, config: dict, step: int = 0) -> Loaded:
        """Return the averaged model as if it had been loaded from a checkpoint."""
        model, data, path = lit.ema.module, lit.data, lit.record.folder / "checkpoints" / "last.ckpt"
        conditions = checkpoint.model_conditions(model, config, data.conditions)
        return Loaded(model, config, data.modality, conditions, step, path, self.trust)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_: object) -> None:
        if self.every_steps is not None and is_due(trainer, self.every_steps):
            if trainer.is_global_zero:
                self.evaluate(trainer, pl_module)
            wait_for_first(trainer, "cards")

    def evaluate(self, trainer: L.Trainer, lit: LitModel) -> None:
        file: Any = trainer.strategy.checkpoint_io
        loaded = self.averaged_model(lit, file.config, trainer.global_step)
        lit.record.cards(trainer.global_step, evaluate(loaded, lit.data, self.plan)[1])


class _StopSampling(Exception):
    """An on_step raises this to leave a sampler early."""


class Save(Between):
    """Writes `last.ckpt` every `every_steps` steps and at the end, and keeps the one before as `previous.ckpt`.

    `best.ckpt` is the one of these with the lowest val/loss, and each multiple of `keep_every_steps` stays as `step_<k>.ckpt`.
    A run that is stopped writes `last.ckpt` alone, since an uninterrupted run would not have saved at that step.
    """

    def __init__(self, every_steps: int | None, keep_every_steps: int | None = None):
        self.every_steps = _check_interval(every_steps, "save.every_steps")
        self.keep_every_steps = _check_interval(keep_every_steps, "save.keep_every_steps")
        self.best = float("inf")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_: object) -> None:
        if is_due(trainer, self.every_steps):
            step, names = trainer.global_step, []
            fresh = [c.loss for c in callbacks(trainer, Evaluate) if c.step == step]
            if min(fresh, default=float("inf")) < self.best:
                self.best = min(fresh)
                names.append("best.ckpt")
            if self.keep_every_steps and step % self.keep_every_steps == 0:
                names.append(f"step_{step:07d}.ckpt")
            self.save(trainer, pl_module, names)

    def save(self, trainer: L.Trainer, lit: LitModel, names: Sequence[str] = ()) -> None:
        """Write last.ckpt, and link it under these names too.

        The file is renamed to last.ckpt at the end: a run that dies before that resumes from the previous one, and links again.
        """
        folder = lit.record.folder / "checkpoints"
        fresh, last = folder / ".last.ckpt.fresh.tmp", folder / "last.ckpt"
        try:
            with progress.task("saving"):
                trainer.save_checkpoint(fresh)
            if trainer.is_global_zero:
                for name in names:
                    checkpoint.link(fresh, name)
                if last.exists():
                    checkpoint.link(last, "previous.ckpt")
                files.replace(fresh, last)
        finally:
            if trainer.is_global_zero:
                fresh.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class Stop(Between):
    """Saves after the current step and exits with 143 or 130 on SIGTERM or SIGINT, whichever ranks they reach; a second SIGINT
    exits at once."""

    def __init__(self):
        self.signal: int | None = None
        self.group: Any = None
        self.pending: tuple[torch.Tensor, torch.distributed.Work] | None = None

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Restore the signal handlers on leaving, except in ranks above zero, which ignore signals while they end."""
        before = {number: signal.getsignal(number) for number in self.signals()}
        try:
            yield
        finally:
            if rank_zero_only.rank == 0:
                for number, handler in before.items():
                    signal.signal(number, handler)

    @staticmethod
    def signals() -> tuple[signal.Signals, ...]:
        """Return the signals that are handled: none outside the main thread, where Python allows no handlers."""
        return (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()

    def on_train_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        def remember(number: int, frame: object) -> None:
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        for number in self.signals():
            signal.signal(number, remember)
        if trainer.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_: object) -> None:
        number = self.signal if self.group is None else self.agree_on_signal()
        if number:
            for save in callbacks(trainer, Save):
                if not is_due(trainer, save.every_steps):
                    save.save(trainer, pl_module)
            if trainer.is_global_zero:
                again = f"python train.py resume={pl_module.record.folder}"
                print(
                    f"stopped by signal {number} after step {trainer.global_step}, saved; go on with {again}",
                    flush=True,
                )
            raise SystemExit(128 + number)

    def agree_on_signal(self) -> int:
        """Return the signal that any rank had received by the step before, 0 if none.

        The all-reduce that a step starts is read by the next one: it runs meanwhile, so no step waits for it.
        """
        number = 0
        if self.pending is not None:
            highest, work = self.pending
            work.wait()
            number = int(highest)
        highest, largest = torch.tensor(self.signal or 0, dtype=torch.int32), torch.distributed.ReduceOp.MAX
        self.pending = highest, torch.distributed.all_reduce(highest, largest, group=self.group, async_op=True)
        return number

    def on_train_end(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        if self.pending is not None:
            self.pending[1].wait()


class Progress(Between):
    """Shows step, steps/s, losses and the time left, as a bar or as lines (see `genai.progress`), with a line of its own after
    each validation; logs speed and memory on logging steps.
    """

    def __init__(self):
        self.board = progress.board
        self.task: progress.Task | None = None
        self.latest = ""

    def on_fit_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        if trainer.is_global_zero:
            self.task = self.board.open(progress.Task("step", trainer.max_steps), "stdout", kept=True)
            self.task.done = self.task.first = trainer.global_step

    def on_train_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        self.first = self.logged = trainer.global_step
        self.logged_at = self.looked_at = self.shown_at = self.board.clock()
        if self.task is not None:
            self.task.restart(self.logged_at, self.first)
            self.task.done = self.first
            self.task.note = self.losses(pl_module)
            if self.has_validated(trainer):
                self.board.tick(at_once=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_: object) -> None:
        now, step = self.board.clock(), trainer.global_step
        if step % pl_module.log_every_steps == 0:
            rate = (step - self.logged) / (now - self.logged_at)
            batch = pl_module.data.batch_size * pl_module.accumulate * trainer.world_size
            speed = {"perf/steps_per_second": rate, "perf/samples_per_second": rate * batch}
            pl_module.record.log(step, {**speed, "perf/peak_memory_bytes": peak_memory_bytes()})
            self.logged, self.logged_at = step, now
        if self.task is not None:
            self.show(trainer, pl_module, self.task, step, now)

    def show(self, trainer: L.Trainer, lit: LitModel, task: progress.Task, step: int, now: float) -> None:
        """Update the task after a step. Losses are read from the device at most every 5 seconds."""
        task.done = step
        validated = self.has_validated(trainer)
        if (
            step == self.first + 1 and step < trainer.max_steps
        ):  # the first step compiles kernels and starts workers: the rate leaves it out
            task.restart(now, step)
        if validated or step % lit.log_every_steps == 0 or now - self.looked_at > 5:
            self.looked_at, self.latest = now, self.losses(lit)
        if now - self.shown_at > 0.2 or validated or step == trainer.max_steps:
            rate = task.per_second(now)
            task.note = "  ".join(part for part in (f"{rate:.3g} steps/s" if rate else "", self.latest) if part)
            self.shown_at = now
        if validated or (step == trainer.max_steps and self.board.terminal):
            self.board.tick(at_once=True)

    def has_validated(self, trainer: L.Trainer) -> bool:
        return any(c.step == trainer.global_step for c in callbacks(trainer, Evaluate))

    def losses(self, lit: LitModel) -> str:
        """Return the training losses (their means since the last log, or the last log) and the latest validation losses."""
        found = {**lit.record.latest, **{name: total / weight for name, (total, weight) in lit.means.sums.items()}}
        shown = sorted(name for name in found if re.fullmatch(r"(train|val)/(\w+_)?loss", name))
        return "  ".join(f"{name} {float(found[name]):.4f}" for name in shown)

    def on_exception(self, trainer: L.Trainer, pl_module: LitModel, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning leaves out then

    def teardown(self, trainer: L.Trainer, pl_module: LitModel, stage: str) -> None:
        if self.task is not None:
            self.board.close(self.task)
            self.task = None


def peak_memory_bytes() -> int:
    """Return the peak memory in bytes: allocated on the GPU if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class File(CheckpointIO):
    """Converts between Lightning's checkpoint dictionary and the project's file, where sampling's part is on top and the rest
    below `trainer`.

    Args:
        modalities: see modalities.stored.nodes_of.
        train_split: number and checksum of the training items, which a resumed run must have again.
        found: (content, path) of the checkpoint that is resumed, so that it is not read twice.
    """

    def __init__(
        self,
        config: dict,
        modalities: dict,
        train_split: dict[str, Any] | None = None,
        found: tuple[dict, Path] | None = None,
    ):
        self.config, self.modalities, self.train_split, self.found = config, modalities, train_split, found

    def save_checkpoint(self, checkpoint_dict: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        own = dict(checkpoint_dict)
        content = {
            "step": own["global_step"],
            "config": self.config,
            "modalities": self.modalities,
            "model": own.pop("state_dict"),
            "ema": own.pop("ema"),
            "trainer": {**own, "train_split": self.train_split},
        }
        checkpoint.save(content, Path(path))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        found, self.found = self.found, None
        content = found[0] if found is not None and found[1] == Path(path) else checkpoint.read(Path(path))
        return {**content["trainer"], "state_dict": content["model"], "ema": content["ema"]}

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
