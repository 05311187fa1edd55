"""One thread and a cache of its own for every test, and the few things that tests share."""

import atexit
import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="genai-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    part: {"_target_": f"genai.models.{part}"} for part in ("model", "data", "sampler")
}  # the least of a checkpoint's
SHARED = ROOT.parent / "shared" / "data"


@contextlib.contextmanager
def fake_device():
    """Within, tensors on `cuda` exist on every machine, without numbers; yields what passed between a GPU and the host.

    That is the operations with tensors on both sides, and those that wait to read a number.
    """
    traffic = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if len({t.device.type for t in tensors}) > 1 or func is torch.ops.aten._local_scalar_dense.default:
                traffic.append(str(func))
            return out

    with FakeTensorMode(), Watch():
        yield traffic


def compiled_for_gpus(script, cases):
    """case -> (PTX, resource usage), by a script that prints them as JSON for the cases that are its argument.

    In a process of its own, for Triton does not compile where it interprets.
    """
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(done.stdout), strict=True))


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


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a script in this process and an empty folder; returns the sentence it was refused with."""

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2, printed
        assert len(lines) == 1, printed.err
        assert "Traceback" not in printed.err + printed.out
        assert sorted(tmp_path.rglob("*")) == before, "a refused command left files behind"
        return lines[0].removeprefix("error: ")

    return run
