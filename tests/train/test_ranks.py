"""Several ranks: whoever launches them, one writes; whichever a signal reaches, all stop; and none outlives the others."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genai import checkpoint
from genai.cli import compose_config, fail, prepare_training
from genai.core.errors import UserError
from genai.train import strategy
from genai.train.strategy import Ranks, detect_ranks
from tests.conftest import ROOT, context
from tests.train.test_resume import TINY, assert_equal, rows

SMALL = [*TINY, "log_every_steps=1", "trainer.accelerator=cpu"]
SECONDS = 120  # for what takes two on a quiet machine


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(rank: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def srun(rank: int, port: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_PORT": port,
    }


def task(overrides, env, log, folder, pace, limit):
    """One rank in this process, as a launcher that sets `env` would start it; a step takes `pace` seconds or more."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    os.environ.update(env)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores it
    torch.set_num_threads(1)
    strategy.TIMEOUT = limit
    from genai.models.diffusion.ddpm import DDPM
    from genai.train.run import run

    forward = DDPM.forward

    def paced(self, batch, step):
        time.sleep(pace)
        return forward(self, batch, step)

    DDPM.forward = paced
    try:
        run(compose_config("train", overrides, prepare_training))
    except UserError as error:
        fail(error)


class Launched:
    """Two ranks (or as many as there are environments) that are gone when the context is left."""

    def __init__(self, folder: Path, *overrides: str, env=torchrun, n: int = 2, pace: float = 0.0, limit: int = 60):
        port = free_port()
        self.logs = [folder / f"rank{rank}.log" for rank in range(n)]
        self.processes = [
            context.Process(target=task, args=(list(overrides), env(rank, port), str(log), str(folder), pace, limit))
            for rank, log in enumerate(self.logs)
        ]

    def __enter__(self):
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def codes(self, seconds: float = SECONDS) -> list[int | None]:
        """Exit codes; None stands for a rank that still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + SECONDS
        while not path.exists():
            assert time.monotonic() < deadline, self.text()
            assert all(process.is_alive() for process in self.processes), self.text()
            time.sleep(0.02)

    def text(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


def assert_one_writer(folder: Path, steps: int) -> None:
    found = [tuple(line.split(",")[:2]) for line in (folder / "metrics.csv").read_text().splitlines()]
    assert len(found) == len(set(found)), "rows twice"
    assert sum(name == "train/loss" for _, name in found) == steps
    assert not list(folder.rglob(".*.tmp"))


def assert_same_run(a: Path, b: Path) -> None:
    one, other = (checkpoint.read(folder / "checkpoints" / "last.ckpt") for folder in (a, b))
    for part in ("step", "model", "ema"):
        assert_equal(one[part], other[part], part)
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """Two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("twin")
    with Launched(folder, *SMALL, "run_dir=run") as ranks:
        assert ranks.codes() == [0, 0], ranks.text()
    assert_one_writer(folder / "run", 24)
    return folder / "run"


# Launchers

STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("env", "devices", "found"),
    [
        ({}, 1, (0, 1, 0, 1, "")),
        ({}, 3, (0, 3, 0, 3, "")),
        ({"LOCAL_RANK": "1"}, 1, (0, 1, 0, 1, "")),  # a launcher says more than that
        (torchrun(1, "1"), 1, (1, 2, 1, 2, "torchrun")),
        (torchrun(1, "1") | {"WORLD_SIZE": "6", "RANK": "5"}, 2, (5, 6, 1, 2, "torchrun")),
        (torchrun(1, "1") | {"WORLD_SIZE": "1", "RANK": "0"}, 1, (0, 1, 0, 1, "")),
        ({"RANK": "2", "WORLD_SIZE": "4"}, 1, (2, 4, 0, 1, "torchrun")),  # one process a pod
        (torchrun(1, "1") | srun(0, "1"), 1, (1, 2, 1, 2, "torchrun")),
        (srun(1, "1"), 1, (1, 2, 1, 2, "srun")),
        (srun(6, "1") | STEP | {"SLURM_LOCALID": "2"}, 1, (6, 8, 2, 4, "srun")),
        (srun(0, "1") | {"SLURM_STEP_NUM_TASKS": "1"}, 1, (0, 1, 0, 1, "")),  # srun -n1 in a larger allocation
        (srun(0, "1") | {"SLURM_TASK_PID": "9"}, 1, (0, 1, 0, 1, "")),  # a batch script without srun
        (srun(0, "1") | {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "4"}, 1, (0, 1, 0, 1, "")),
        (srun(0, "1") | STEP | {"SLURM_JOB_NAME": "interactive"}, 1, (0, 8, 0, 4, "srun")),  # srun within salloc
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, 1, (0, 1, 0, 1, "")),  # the shell of salloc
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 2, (0, 2, 0, 2, "")),
        (
            {
                f"OMPI_COMM_WORLD_{k}": v
                for k, v in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()
            },
            1,
            (3, 4, 1, 2, "mpirun"),
        ),
    ],
)
def test_ranks_are_what_the_launcher_says(env, devices, found):
    ranks = detect_ranks(env, devices)
    assert (ranks.rank, ranks.world, ranks.local, ranks.here, ranks.launcher) == found


@pytest.mark.parametrize(
    ("env", "devices", "sentence"),
    [
        (torchrun(0, "1"), 4, "trainer.devices=4, but torchrun started 2 processes"),
        (srun(0, "1"), 3, "trainer.devices=3, but srun started 2 processes"),
        (torchrun(0, "1") | {"RANK": "7"}, 1, "process 7 of 2"),
        (torchrun(0, "1") | {"RANK": "x"}, 1, "RANK=x must be a whole number"),
        (srun(0, "1") | STEP | {"SLURM_STEP_NUM_TASKS": "5"}, 1, "every machine must have as many"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(env, devices, sentence):
    with pytest.raises(UserError, match=sentence):
        detect_ranks(env, devices)


def test_the_address_of_the_first_node_and_the_port_follow_from_the_job(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NODELIST", "gpu[07-09]")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    assert (Ranks(1, 8, 1, 4, "srun").main_address, Ranks(1, 8, 1, 4, "srun").main_port) == ("gpu07", 19567)
    assert Ranks(1, 4, 1, 4, "srun").main_address == "127.0.0.1"


def test_more_processes_than_cores_are_refused_before_any_starts(refused, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    most = max(2, os.cpu_count() or 1)
    sentence = refused("train.py", "trainer.devices=1000", "trainer.accelerator=cpu")
    assert sentence.startswith("trainer.devices=1000") and f"use at most {most}" in sentence


def test_slurm_tasks_share_one_run_of_one_writer(tmp_path):
    """The folder's name holds the time, which ranks read at different moments."""
    with Launched(tmp_path, *SMALL, "max_steps=3", "optim.warmup_steps=0", env=srun) as ranks:
        assert ranks.codes() == [0, 0], ranks.text()
    (folder,) = tmp_path.glob("runs/*/*")
    assert_one_writer(folder, 3)
    assert "2 ranks that srun started" in ranks.text()
    assert "devices: 2" in (folder / "config.yaml").read_text()


def test_one_process_of_an_interactive_allocation_trains_alone(tmp_path):
    def interactive(rank, port):
        return {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "sh"}

    with Launched(
        tmp_path, *SMALL, "max_steps=3", "optim.warmup_steps=0", "run_dir=run", env=interactive, n=1
    ) as ranks:
        assert ranks.codes() == [0], ranks.text()
    assert_one_writer(tmp_path / "run", 3)


def test_what_one_rank_refuses_all_refuse_in_one_sentence(tmp_path, twin):
    with Launched(tmp_path, *SMALL, f"run_dir={twin}") as ranks:
        assert ranks.codes() == [2, 2], ranks.text()
    assert ranks.text().count("error: ") == 1, ranks.text()
    assert f"run_dir={twin} already holds a run" in ranks.logs[0].read_text()
    assert "Traceback" not in ranks.text()


@pytest.mark.slow
def test_torchrun_starts_twenty_times(tmp_path):
    """As it is: of two ranks one used to find the folder that the other had just made."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / "train.py"),
    ]
    for i in range(20):
        where = [f"run_dir={tmp_path / str(i)}"] if i % 2 else []
        process = subprocess.Popen(
            [*command, *SMALL, "max_steps=2", "optim.warmup_steps=0", *where],
            cwd=tmp_path,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with ended(process):
            output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        folder = tmp_path / str(i) if i % 2 else max(tmp_path.glob("runs/*/*"))
        assert_one_writer(folder, 2)
    assert len(list(tmp_path.glob("runs/*/*"))) == 10


# Signals


@pytest.mark.parametrize(
    ("signals", "apart", "code"),
    [
        ([None, signal.SIGTERM], 0.0, 143),
        pytest.param([signal.SIGINT, None], 0.0, 130, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM, signal.SIGTERM], 0.3, 143, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGINT], 0.3, 130, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT, signal.SIGTERM], 0.02, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_stops_all_at_one_step(tmp_path, twin, signals, apart, code):
    folder = tmp_path / "run"
    with Launched(tmp_path, *SMALL, "run_dir=run", pace=0.1) as ranks:
        ranks.wait_for(folder / "checkpoints" / "last.ckpt")
        for process, number in zip(ranks.processes, signals, strict=True):
            if number is not None:
                with contextlib.suppress(ProcessLookupError):  # it has followed the other already
                    os.kill(process.pid, number)
                time.sleep(apart)
        assert ranks.codes() == [code, code], ranks.text()
    assert "Traceback" not in ranks.text()
    step = checkpoint.read(folder / "checkpoints" / "last.ckpt")["step"]
    assert ranks.text().count(f"after step {step}, saved; go on with") == 1
    assert 6 <= step < 24
    with Launched(tmp_path, "resume=run") as ranks:
        assert ranks.codes() == [0, 0], ranks.text()
    assert_same_run(folder, twin)
    assert_one_writer(folder, 24)


def test_a_killed_rank_takes_the_others_along_in_one_sentence(tmp_path):
    with Launched(tmp_path, *SMALL, "max_steps=100000", "run_dir=run") as ranks:
        ranks.wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt")
        ranks.processes[1].kill()
        assert ranks.codes(60) == [1, -signal.SIGKILL], ranks.text()
    assert ranks.text().count("error: another rank is gone or does not answer") == 1, ranks.text()
    assert "Traceback" not in ranks.text()


@pytest.mark.slow
def test_a_rank_that_answers_no_more_is_not_waited_for_for_ever(tmp_path):
    with Launched(tmp_path, *SMALL, "max_steps=100000", "run_dir=run", limit=10) as ranks:
        ranks.wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt")
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        ranks.processes[0].join(60)
        assert ranks.codes(0) == [1, None], ranks.text()
    assert ranks.text().count("error: another rank is gone or does not answer") == 1, ranks.text()


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """Its whole session is gone afterwards."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("whom", ["launcher", "child"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ranks_that_the_command_started_end_together(tmp_path, twin, number, whom):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *SMALL,
        "trainer.devices=2",
        f"run_dir={folder}",
        "max_steps=100000",
    ]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with ended(process):
        deadline = time.monotonic() + SECONDS
        while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (child,) = children(process.pid)
        os.kill({"launcher": process.pid, "child": child}[whom], number)
        output = process.communicate(timeout=60)[0]  # which returns once nobody holds the pipe: the child is gone too
        left = Path(f"/proc/{child}/stat")
        assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z"  # whom nobody has waited for
    if number == signal.SIGKILL:
        assert process.returncode == (-signal.SIGKILL if whom == "launcher" else 1), output
        assert output.count("error: ") == 1, output
    else:
        assert process.returncode == 128 + number, output
        assert output.count("saved; go on with") == 1, output
    assert "Traceback" not in output
