"""The ranks of a distributed run: how they are detected and started, agree, wait for each other and end."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import PrefixStore, TCPStore

from genai import progress
from genai.core.errors import UserError

# Time-outs in seconds.
START_SECONDS = 300  # for all ranks to find each other
WAIT_SECONDS = 6 * 3600  # for work that one rank does alone while the others wait: preparing data, samples, cards
TIMEOUT = 600  # for a collective, after which a rank counts as lost
END_SECONDS = 20  # for the other ranks to end once one has
LAUNCHER = "GENAI_LAUNCHER"  # the id of the process that started this one as one of its ranks

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))


class Ranks(ClusterEnvironment):
    """The processes of one run, as a context manager around training and as Lightning's ClusterEnvironment.

    Args:
        rank: of this process, among all.
        world: number of ranks.
        local: rank of this process on its machine.
        here: number of ranks on this machine.
        launcher: program that started them; "" for none, and `start` starts those above rank zero.

    Before the collectives of torch.distributed can be used, and where one rank works alone, ranks meet in a key-value
    store that rank zero (or torchrun) serves. On leaving the context, a UserError of any rank is raised by rank zero
    alone, and the others exit with code 2; an error that follows from a lost rank becomes one sentence and exit code 1.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, here: int = 1, launcher: str = ""):
        super().__init__()
        self.rank, self.world, self.local, self.here, self.launcher = rank, world, local, here, launcher
        self.store: Any = None
        self.decided = ""
        self.children: list[subprocess.Popen] = []
        self.ended = threading.Event()

    @property
    def first(self) -> bool:
        """True in rank zero, the only one that writes."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        rank_zero_only.rank = self.rank
        progress.board.silent = not self.first
        if self.launcher in ("genai", "torchrun"):
            threading.Thread(target=self._end_with_launcher, args=(os.getppid(),), daemon=True).start()
        if self.launcher and self.world > 1:
            self._join()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.ended.set()
        try:
            if self.store is not None and error is not None:
                self._explain(error)
            elif self.store is not None and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        finally:
            deadline = time.monotonic() + (END_SECONDS if error is None or isinstance(error, SystemExit) else 3)
            for child in self.children if error is not None else ():
                child.terminate()  # a rank that has agreed to stop ignores it
            for child in self.children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
                child.kill()

    def agree(self, decide: Callable[[], str]) -> str:
        """Return in every rank the string that rank zero decides; to be called before `start`."""
        if not self.first:
            return self._get("decided", WAIT_SECONDS, "rank 0 did not choose the run directory")
        self.decided = decide()
        if self.store is not None:
            self.store.set("decided", self.decided)
        return self.decided

    def start(self, gpu: bool) -> None:
        """Start the ranks of this machine unless a launcher did; returns when every rank is ready.

        Raises UserError if one of them fails before that.
        """
        if self.world == 1:
            return
        if not self.launcher:
            self._launch()
        self.store.set(f"ready/{self.rank}", "")
        for rank in range(self.world):
            self._get(f"ready/{rank}", WAIT_SECONDS, f"rank {rank} did not get ready to train")
        device = torch.device("cuda", self.local) if gpu else None
        if device is not None:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=TIMEOUT),
            device_id=device,
        )
        if self.children:
            threading.Thread(target=self._end_with_children, daemon=True).start()

    def wait_for_first(self, what: str) -> None:
        """Make the other ranks wait until rank zero calls this too; `what` is a name that is used once."""
        if self.first:
            self.store.set(what, "")
        else:
            self._get(what, WAIT_SECONDS, f"rank 0 has not finished {what}")

    def _launch(self) -> None:
        port = self._open("127.0.0.1", 0, serves=True)
        self.store.set("here/0", "")
        self.store.set("decided", self.decided)
        env = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            LAUNCHER: str(os.getpid()),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world),
        }
        # Children inherit the ignored SIGINT: until they train, a Ctrl-C reaches them through this process alone.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for rank in range(1, self.world):
                own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.children.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=own))
        finally:
            signal.signal(signal.SIGINT, before)

    def _join(self) -> None:
        host, port, deadline = self.main_address, self.main_port, time.monotonic() + START_SECONDS
        serves = self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not serves and not _answers(host, port):
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"error: rank {self.rank} waited {START_SECONDS} s, but rank 0 does not answer at {host}:{port}"
                )
            time.sleep(0.2)
        self._open(host, port, serves)
        self.store.set(f"here/{self.rank}", "")
        for rank in range(self.world):
            self._get(
                f"here/{rank}",
                START_SECONDS,
                f"{self.launcher} must start {self.world} processes, but rank {rank} is missing",
            )

    def _open(self, host: str, port: int, serves: bool) -> int:
        """Serve the store, or connect to it; returns its port."""
        store = TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.store = PrefixStore(f"genai/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        return store.port

    def _get(self, key: str, seconds: float, otherwise: str) -> str:
        """Wait for a value of the store and return it. Raises UserError if a rank reports an error meanwhile.

        It polls instead of waiting in the store's C++ code, where no signal handler of Python would run.
        """
        deadline, pause = time.monotonic() + seconds, 0.01
        while not self.store.check([key]):
            child = next((child for child in self.children if child.poll()), None)
            if self.store.check(["error"]):
                raise UserError(self.store.get("error").decode())
            if child is not None:
                raise SystemExit(
                    self._rank_failure(f"rank {self.children.index(child) + 1} ended with code {child.returncode}")
                )
            if time.monotonic() > deadline:
                raise SystemExit(self._rank_failure(f"{otherwise} within {seconds} s"))
            time.sleep(pause)
            pause = min(0.2, 2 * pause)
        return self.store.get(key).decode()

    def _explain(self, caught: BaseException) -> None:
        """Report an error of any rank once, by rank zero."""
        error = caught
        try:
            if _is_rank_failure(error):
                time.sleep(0.5)  # the lost rank may report its own error first
                if not self.store.check(["error"]):
                    reason = re.sub(r"^\[[^]]*\] ?", "", str(error).strip()).split(". ")[0].splitlines()[0][:200]
                    raise SystemExit(
                        self._rank_failure(f"another rank is gone or does not answer ({reason})")
                    ) from None
                error = UserError(self.store.get("error").decode())
            if not isinstance(error, UserError):
                return
            if not self.store.check(["error"]):
                self.store.set("error", str(error))
            if not self.first:
                self.store.add("error_read", 1)
                raise SystemExit(2) from None
            deadline = time.monotonic() + 3
            while self.store.add("error_read", 0) < self.world - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
        except torch.distributed.DistError:  # the store is gone too
            if _is_rank_failure(error):
                raise SystemExit(self._rank_failure("rank 0 is gone")) from None
        if error is not caught:
            raise error from None

    def _rank_failure(self, what: str) -> str:
        return f"error: {what}: rank {self.rank} ends too, and what was saved last is kept: resume= goes on from there"

    def _end_with_launcher(self, launcher: int) -> None:
        """Exit once the launcher is gone, even by SIGKILL."""
        if self.launcher == "genai":
            launcher = int(os.environ[LAUNCHER])
        while os.getppid() == launcher:
            time.sleep(0.5)
        print(f"error: rank {self.rank} ends, since the process that started it has", file=sys.stderr, flush=True)
        os._exit(1)

    def _end_with_children(self) -> None:
        """End this process if one that it started fails and this one, perhaps waiting for it, does not notice."""
        while not self.ended.wait(0.5):
            for rank, child in enumerate(self.children, 1):
                if child.poll() and not self.ended.wait(END_SECONDS):
                    print(
                        self._rank_failure(f"rank {rank} ended with code {child.returncode}"),
                        file=sys.stderr,
                        flush=True,
                    )
                    for other in self.children:
                        other.kill()
                    os._exit(1)

    # The interface of ClusterEnvironment

    creates_processes_externally = True  # type: ignore[assignment]

    @property
    def main_address(self) -> str:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
        own = SLURMEnvironment.resolve_root_node_address(nodes) if self.world > self.here else "127.0.0.1"
        return os.environ.get("MASTER_ADDR", own)

    @property
    def main_port(self) -> int:
        job = re.sub(r"\D", "", os.environ.get("SLURM_JOB_ID", ""))
        return integer_of(os.environ, "MASTER_PORT", 15000 + int(job[-4:]) if job else 29500)

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.local

    def node_rank(self) -> int:
        return self.rank // self.here


def detect_ranks(env: Mapping[str, str], devices: int) -> Ranks:
    """Return the ranks that a launcher started; without one, this process and devices - 1 that `start` will start.

    Raises UserError if the launcher's variables contradict each other or trainer.devices.
    """
    if all(name in env for name in TORCHRUN[:2]):
        launcher = "genai" if LAUNCHER in env else "torchrun"
        found = _ranks_of(env, *TORCHRUN)
    elif all(name in env for name in OPEN_MPI[:2]):
        launcher, found = "mpirun", _ranks_of(env, *OPEN_MPI)
    elif (tasks := _slurm_tasks(env)) > 1:
        nodes = integer_of(env, "SLURM_STEP_NUM_NODES", integer_of(env, "SLURM_NNODES", 1))
        here = tasks // max(1, nodes)
        rank = integer_of(env, "SLURM_PROCID", 0)
        launcher, found = "srun", (rank, tasks, integer_of(env, "SLURM_LOCALID", rank % max(1, here)), here)
    else:
        launcher, found = "", (0, 1, 0, 1)
    rank, world, local, here = found
    if world == 1 and launcher != "genai":
        if devices > 1 and hasattr(sys, "ps1"):
            raise UserError(f"trainer.devices={devices} starts processes, which a notebook cannot: use python train.py")
        return Ranks(world=devices, here=devices)
    if not 0 <= rank < world or not 0 <= local < here or world % here:
        raise UserError(
            f"{launcher} says that this is process {rank} of {world}, {local} of {here} on this machine: every machine must "
            "have as many"
        )
    if devices not in (1, here):
        raise UserError(
            f"trainer.devices={devices}, but {launcher} started {here} processes on this machine, and each is a device: "
            "leave trainer.devices out"
        )
    return Ranks(rank, world, local, here, launcher)


def _ranks_of(env: Mapping[str, str], rank: str, world: str, local: str, here: str) -> tuple[int, int, int, int]:
    """Return rank and number of ranks, and both on this machine; without the latter, each rank has a machine of its own."""
    ranks = integer_of(env, world, 1)
    on_this = integer_of(env, here, ranks if local in env else 1)
    return integer_of(env, rank, 0), ranks, integer_of(env, local, 0), on_this


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Return how many processes srun started with this one; 1 in the shell of an allocation or a batch script."""
    if "SLURM_PROCID" not in env:
        return 1
    if "SLURM_STEP_NUM_TASKS" in env:
        return integer_of(env, "SLURM_STEP_NUM_TASKS", 1)
    if "SLURM_STEP_ID" not in env:
        script = "SLURM_TASK_PID" in env or ("SLURM_NTASKS_PER_NODE" not in env and env["SLURM_PROCID"] == "0")
        if script or env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            return 1
    return integer_of(env, "SLURM_NTASKS", 1)


def integer_of(env: Mapping[str, str], name: str, default: int) -> int:
    """Return an environment variable as a whole number. Raises UserError if it is not one."""
    value = env.get(name, "").strip()
    if value and not value.isdecimal():
        raise UserError(f"the environment variable {name}={value} must be a whole number")
    return int(value) if value else default


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=2).close()
        return True
    return False


def _is_rank_failure(error: BaseException) -> bool:
    """Return True for the errors that torch.distributed raises when a rank is gone or does not answer."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|nccl|by peer|pair closure|timed out", str(error), re.I) is not None
    )
