"""A lock so that only one process at a time writes to a run directory."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from genai.core import files
from genai.core.errors import UserError

ELSEWHERE = "make room, or name another folder with run_dir="
FOLDERS = "checkpoints", "samples", "cards", "tensorboard", "wandb"  # subfolders of a run that training writes to
LEFT = (  # temporary files that a killed training process leaves behind; no other process writes these
    "checkpoints/.*.ckpt.*.tmp",
    "samples/.samples_*.tmp",
    ".config.yaml*.tmp",
    ".metrics.csv.*.tmp",
    ".git.diff.*.tmp",
)


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is created if need be; it is released however the process dies.

    Half-written files that a kill left behind are deleted. Raises UserError if another process holds the lock, or if
    the directory cannot be written.
    """
    path = run / ".lock"
    with files.check_writable(path, ELSEWHERE):
        files.make_folder(run)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = path.read_text(errors="replace").strip() or "another process"
            raise UserError(f"{run} is in use by {holder}: wait until that ends, or stop it") from None
    try:
        with files.check_writable(path, ELSEWHERE):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            for name in FOLDERS:
                files.check_inside(run / name, run)
            for pattern in LEFT:
                for temporary in run.glob(pattern):
                    temporary.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # the disk may be full or gone
            path.unlink(missing_ok=True)
        lock.release()
