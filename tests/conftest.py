"""One thread and a cache of its own for every test, and the few things that tests share."""

import atexit
import contextlib
import copy
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="genai-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genai import progress
from genai.cli import compose as composing

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job, whose children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    part: {"_target_": f"genai.models.{part}"} for part in ("model", "data", "sampler")
}  # the least of a checkpoint's
SHARED = ROOT.parent / "shared" / "data"

# Packages take seconds of a core to load: processes whose start is not the point are forked from one that has them.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "genai.train.run",
        "genai.sampling",
        "genai.evaluation.run",
        "genai.sweeps",
        "genai.data.images",
        "genai.models.diffusion.sampling.samplers",
        "hydra.main",
        "sklearn.datasets",
        "pytest",
        "tests.conftest",
    ]
)


def python(*arguments: str | Path, cwd: Path = ROOT, env: dict | None = None, timeout: float = 300):
    """Run `python *arguments` (a script, `-m` module or `-c` string) in a fork that has the packages loaded."""
    given = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=as_python, args=([*map(str, arguments)], str(cwd), given, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def as_python(arguments: list[str], cwd: str, env: dict, folder: str) -> None:
    """In a new process of `context`: `python *arguments`, which writes the files stdout and stderr in a folder."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores it
    multiprocessing.set_start_method("fork", force=True)  # as where nothing was forked
    torch.set_num_threads(1)
    sys.orig_argv = [sys.executable, *arguments]
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


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


# What these files compute takes long, or runs in processes of its own.
LONG = (
    "commands",
    "cuda_graph",
    "gpt",
    "kernels",
    "likelihood",
    "metrics_samples",
    "norm",
    "parts",
    "docs",
    "samplers",
    "stylegan2",
)


def pytest_collection_modifyitems(items):
    """Mark as fast what asks for no folder, without which no run is trained and no command started, and is in no LONG file."""
    for item in items:
        folder = any(name.startswith("tmp_path") for name in item.fixturenames)
        long = item.path.stem.removeprefix("test_") in LONG
        if not (folder or long or item.get_closest_marker("slow") or item.get_closest_marker("gpu")):
            item.add_marker("fast")


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    """Let Hydra merge the project's own files once for the same choices of groups; every test has a copy of its own."""
    made, compose = {}, composing.compose

    def cached(name, choices, **given):
        if any("hydra.searchpath" in choice for choice in choices):  # a user's own files
            return compose(name, choices, **given)
        loader: Any = GlobalHydra.instance().hydra.config_loader  # type: ignore[union-attr]
        key = (composing.conf_dir(), name, *choices)
        if key not in made:
            made[key] = compose(name, choices, **given), loader.changed
        cfg, changed = made[key]
        loader.changed = dict(changed)
        return copy.deepcopy(cfg)

    composing.compose = cached
    yield
    composing.compose = compose


@pytest.fixture
def shared():
    """The folder of real data next to the checkout; tests that need one of its files skip by name."""

    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not in ../shared/data")
        return SHARED / name

    return path


@pytest.fixture(scope="session")
def command():
    """Run one of the repository's scripts as a user would: command("train.py", "max_steps=3", cwd=...)."""

    def run(script: str, *arguments: str, cwd: Path = ROOT, env: dict | None = None, timeout: float = 300):
        return python(ROOT / script, *arguments, cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout)

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


@pytest.fixture
def waits(monkeypatch):
    """The names of the tasks that progress was shown of, in order."""
    names = []

    class Noted(progress.Task):
        def __init__(self, what, *arguments):
            names.append(what)
            super().__init__(what, *arguments)

    monkeypatch.setattr(progress, "Task", Noted)
    return names
