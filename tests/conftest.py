"""One thread for every test, and the few things that tests share."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def shared():
    """The folder of real data beside the checkout; tests that need one of its files skip by name."""

    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not in ../shared/data")
        return SHARED / name

    return path


@pytest.fixture(scope="session")
def command():
    """Run one of the repository's scripts as a user would: command("train.py", "max_steps=3", cwd=...)."""

    def run(script: str, *arguments: str, cwd: Path = ROOT, env: dict | None = None, timeout: float = 300):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
