"""Run the jobs of a sweep: locks, processes and the journal."""

import contextlib
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from genai import progress
from genai.core import metrics_csv
from genai.core.errors import UserError
from genai.core.runs import Facts
from genai.progress import duration

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run that saved and stopped, see callbacks.Stop


STAMP = "%Y-%m-%dT%H:%M:%S"


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        key: name of its folder.
        overrides: all of its command line.
        values: of the swept keys.
    """

    key: str
    overrides: list[str]
    values: dict[str, str]


@dataclass
class Runner:
    """The function that a launcher calls for each job, here or in another process; the failure of a job does not raise."""

    folder: Path
    command: list[str]
    metric: str | None
    jobs: dict[str, Job]
    total: int = 0
    """Jobs of the whole sweep that were not finished when it began,"""
    began: float = 0.0
    """in seconds since the epoch."""

    def __call__(self, cfg: DictConfig) -> None:
        job = self.jobs[Path(cfg.run_dir).name]
        # The log is the lock: the job inherits it, so that one that outlives its sweep still holds it.
        with (
            (self.folder / f"{job.key}.log").open("ab") as log,
            hold_lock(log, f"{job.key} is still running: waiting for it"),
        ):
            if journal(self.folder).get(job.key, {}).get("status") == "finished":
                return
            start, code = time.monotonic(), 0
            if not is_complete(self.folder / job.key):
                note(self.folder, job, "started")
                print(f"{job.key}: started, see {log.name}", flush=True)
                code = self.train(job, log)
            status, reason = self.outcome(job, code)
            note(self.folder, job, status, reason=reason)
            took = duration(time.monotonic() - start)
            result = reason or self.describe_result(job)
            print(f"{job.key}: {status}, {result}, {took}{self.describe_sweep()}", flush=True)
        if status == "stopped":
            print("the same command goes on with it", flush=True)
            raise SystemExit(code)

    def describe_sweep(self) -> str:
        """Return the number of finished jobs and the time left for the others, for the report."""
        began = time.strftime(STAMP, time.localtime(self.began))
        records = journal(self.folder).values()
        done = sum(record["status"] in ("finished", "failed") and record["time"] >= began for record in records)
        if not 0 < done <= self.total:
            return ""
        left = (time.time() - self.began) / done * (self.total - done)
        return f"; {done} of {self.total} jobs done" + (f", {duration(left)} left" if done < self.total else "")

    def train(self, job: Job, log: Any) -> int:
        """Run a job, or resume it; returns the exit code. W&B groups the runs of a sweep."""
        run_dir = self.folder / job.key
        if (run_dir / "config.yaml").is_file():
            arguments = [f"resume={run_dir}", *(o for o in job.overrides if o.startswith("trust="))]
        else:
            named = any(o.startswith("name=") for o in job.overrides)
            arguments = [*job.overrides, f"run_dir={run_dir}", *([] if named else [f"name={job.key}"])]
        log.write(f"$ {' '.join([*self.command, *arguments])}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [*self.command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"WANDB_RUN_GROUP": self.folder.name, **os.environ},
            preexec_fn=stop_with_parent if sys.platform == "linux" else None,
        )
        try:
            with progress.task(job.key) as shown:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(timeout=1)
                    shown.note = last_line(Path(log.name))
        except KeyboardInterrupt:  # the job gets the signal too, and saves
            process.wait()
            return STOPPED[0]

    def outcome(self, job: Job, code: int) -> tuple[str, str | None]:
        """Return (status, reason) of a run that ended with an exit code."""
        if code in STOPPED:
            return "stopped", f"signal {code - 128}"
        if code < 0:
            return "failed", f"killed by signal {-code}"
        if code > 0:
            lines = (self.folder / f"{job.key}.log").read_text(errors="replace").strip().splitlines()
            errors = [line for line in lines if re.match(r"(\w+\.)*(\w*(Error|Exception)|error)\b", line)]
            return "failed", (errors or lines)[-1].removeprefix("error: ")
        value = None if self.metric is None else last_values(self.folder / job.key).get(self.metric)
        return ("finished", None) if value is None or math.isfinite(value) else ("failed", f"{self.metric} is {value}")

    def describe_result(self, job: Job) -> str:
        """Return a job's metric for the report."""
        if self.metric is None:
            return "not ranked"
        return f"{self.metric} {last_values(self.folder / job.key).get(self.metric)}"


def stop_with_parent() -> None:
    """Make Linux send this process SIGTERM, at which a run saves, when its parent dies."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def hold_lock(file: Any, waiting: str | None) -> Iterator[None]:
    """Hold the lock of an open file, which the system releases with its last process.

    If another process holds it, `waiting` is printed and waited for; raises BlockingIOError if `waiting` is None.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise
        print(waiting, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def last_line(log: Path) -> str:
    """Return the last line of a job's log, which shows its progress."""
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 500, 0))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1].strip()[:200] if lines else ""


def note(folder: Path, job: Job, status: str, **more: object) -> None:
    """Append a line to the journal in one write, and flush it to the disk."""
    record = {
        "job": job.key,
        "status": status,
        "time": time.strftime(STAMP),
        "values": job.values,
        **more,
    }
    with (folder / "journal.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\n")
        os.fsync(file.fileno())


def journal(folder: Path) -> dict[str, Facts]:
    """Read the last record of every job; an incomplete line is skipped."""
    records: dict[str, Facts] = {}
    if (path := folder / "journal.jsonl").exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
                record = json.loads(line)
                records[record["job"]] = record
    return records


def is_complete(run_dir: Path) -> bool:
    """Tell whether a run has reached its last step; it may have ended after its sweep was killed."""
    if not (run_dir / "checkpoints" / "last.ckpt").exists():
        return False
    from genai import checkpoint

    try:
        found = checkpoint.newest(run_dir)
    except UserError:
        return False  # the resumed job reports the error
    return found is not None and found[0]["step"] >= found[0]["config"]["max_steps"]


def last_values(run_dir: Path) -> dict[str, float]:
    """Return the last value of every metric of a run."""
    return {row.name: row.value for row in metrics_csv.rows(run_dir / "metrics.csv")}
