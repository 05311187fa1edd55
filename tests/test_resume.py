"""A run killed anywhere and resumed equals one that never stopped, bit for bit."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from genai import checkpoint
from genai.cli import composed, resumed
from genai.core.errors import UserError
from tests.conftest import ROOT

TINY = [
    "max_steps=24", "accumulate=2", "log_every_steps=5", "logger=none", "data.batch_size=4", "optim.warmup_steps=3",
    "model.net.channels=8", "model.net.dropout=0.1", "model.schedule.steps=20", "sampler.steps=2", "callbacks.samples.n=2",
    "callbacks.samples.every_steps=12", "callbacks.evaluate.every_steps=4", "callbacks.evaluate.n=16",
    "callbacks.save.every_steps=6", "callbacks.save.keep_every_steps=12",
]  # fmt: skip

context = multiprocessing.get_context("forkserver")
PRELOAD = ["genai.train.run", "genai.data.images", "genai.models.diffusion.samplers", "sklearn.datasets"]
context.set_forkserver_preload(PRELOAD)


def child(overrides, kill_at, log):
    """Train in this process; die by SIGKILL at a kind of moment and its step, such as ("save", 6) or ("forward", step, call)."""
    sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a real run
    from genai.models.diffusion.ddpm import DDPM
    from genai.train.callbacks import Evaluate
    from genai.train.run import run

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    kind, at, *rest = kill_at or (None, None)
    if kind == "forward":
        inner, calls = DDPM.forward, []

        def forward(self, batch, step):
            if self.training and step == at:
                calls.append(step)
                if len(calls) == rest[0]:
                    die()
            return inner(self, batch, step)

        DDPM.forward = forward
    if kind == "deceive":  # a game between the updates of its players
        from genai.models.gan.gan import GAN

        inner_loss = GAN.generator_loss

        def generator_loss(self, batch, fake, step):
            if self.training and step == at:
                die()
            return inner_loss(self, batch, fake, step)

        GAN.generator_loss = generator_loss
    if kind == "evaluate":
        inner_evaluate = Evaluate.evaluate

        def evaluate(self, lit):
            if lit.trainer.global_step == at:
                lit.record.log(at, {"half": 1.0})
                lit.evaluate("val", 4)
                die()
            inner_evaluate(self, lit)

        Evaluate.evaluate = evaluate
    if kind == "save":
        inner_save = torch.save

        def save(content, file):
            inner_save(content, file)
            if content["step"] == at:
                file.truncate(file.tell() // 2)
                file.flush()
                die()

        torch.save = save
    run(composed("train", overrides, resumed))


def train(
    folder: Path, *overrides: str, kill_at=None, kill_after: float | None = None, new: bool = True, base=TINY
) -> int:
    """One process that trains or resumes in `folder`; returns its exit code."""
    arguments = [*base, f"run_dir={folder}"] if new else [f"resume={folder}"]
    log = folder.with_suffix(".log")
    process = context.Process(target=child, args=([*arguments, *overrides], kill_at, str(log)))
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        if process.is_alive():
            process.kill()
    process.join(120)
    assert process.exitcode is not None, "still running"
    if process.exitcode not in (0, -signal.SIGKILL):
        pytest.fail(log.read_text()[-3000:])
    return process.exitcode


def rows(folder: Path) -> list[str]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line for line in lines if ",perf/" not in line]


def assert_equal(a, b, path="checkpoint"):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(a: Path, b: Path) -> None:
    one, two = (checkpoint.read(folder / "checkpoints" / "last.ckpt") for folder in (a, b))
    for content in (one, two):
        del content["config"]["run_dir"]
        content["config"]["data"].pop("num_workers")
        # Lightning's counters of how often it was started again; no state of the run.
        del content["trainer"]["loops"]
    assert_equal(one, two)
    assert rows(a) == rows(b)
    assert {p.name for p in (a / "checkpoints").iterdir()} == {p.name for p in (b / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "whole"
    assert train(folder) == 0
    return folder


def test_an_uninterrupted_run_writes_what_it_says(uninterrupted):
    names = {p.name for p in (uninterrupted / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "best.ckpt", "step_0000012.ckpt", "step_0000024.ckpt"}
    assert {p.name for p in (uninterrupted / "samples").iterdir()} == {"samples_0000012.png", "samples_0000024.png"}
    steps = {int(line.split(",")[0]) for line in rows(uninterrupted)[1:] if "val/loss," in line}
    assert steps == {0, 4, 8, 12, 16, 20, 24}
    assert (uninterrupted / "config.yaml").exists()


def test_number_of_workers_changes_nothing(uninterrupted, tmp_path):
    assert train(tmp_path / "run", "data.num_workers=2") == 0
    assert_same_run(uninterrupted, tmp_path / "run")


AIMED = {
    "twice from one step, inside its accumulation": [("forward", 8, 2), ("forward", 8, 2)],
    "before the first save": [("forward", 3, 1)],
    "during evaluation": [("evaluate", 12), ("evaluate", 16)],
    "during a checkpoint write": [("save", 6), ("save", 18)],
    "right after a save, twice": [("forward", 12, 1), ("forward", 12, 1)],
}


# With loader processes only the hardest case is run every time.
KILLS = [pytest.param(0, kills, id=name) for name, kills in AIMED.items()]
KILLS += [
    pytest.param(2, kills, id=f"{name}, 2 workers", marks=[] if "twice from" in name else pytest.mark.slow)
    for name, kills in AIMED.items()
]


@pytest.mark.parametrize(("workers", "kills"), KILLS)
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, kills, workers):
    folder = tmp_path / "run"
    for i, kill_at in enumerate(kills):
        assert (
            train(folder, *[f"data.num_workers={workers}"] * (i == 0), kill_at=kill_at, new=i == 0) == -signal.SIGKILL
        )
    assert train(folder, new=False) == 0
    assert_same_run(uninterrupted, folder)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_moments(uninterrupted, tmp_path, workers):
    folder, draw, kills = tmp_path / "run", random.Random(workers), 0
    # The first dies before it has written anything; until config.yaml is there, there is nothing to resume.
    delay = 0.1
    while not (folder / "config.yaml").exists():
        kills += train(folder, f"data.num_workers={workers}", kill_after=delay) != 0
        delay = 1.3 * delay + 0.2 * draw.random()  # a slow machine gets there too
    for _ in range(8):
        if not (folder / "checkpoints" / "step_0000024.ckpt").exists():
            kills += train(folder, kill_after=draw.uniform(0.2, 1.5), new=False) != 0
    if not (folder / "checkpoints" / "step_0000024.ckpt").exists():
        assert train(folder, new=False) == 0
    assert kills > 0
    assert_same_run(uninterrupted, folder)


GAME = [
    "model=biggan", "max_steps=14", "log_every_steps=4", "logger=none", "data.batch_size=4", "loop.critic_steps=2",
    "model.share_fake=false", "model.generator.channels=4", "model.discriminator.channels=4", "callbacks.samples.n=2",
    "callbacks.samples.every_steps=6", "callbacks.evaluate.every_steps=4", "callbacks.evaluate.n=16",
    "callbacks.save.every_steps=6",
]  # fmt: skip


def test_a_game_killed_between_its_players_equals_one_that_was_not(tmp_path):
    """Both optimisers, the average, batch norms and spectral vectors come back."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *GAME, base=[]) == 0
    assert train(folder, *GAME, kill_at=("deceive", 8), base=[]) == -signal.SIGKILL
    assert train(folder, kill_at=("save", 12), new=False) == -signal.SIGKILL
    assert train(folder, new=False) == 0
    assert_same_run(whole, folder)


def test_resuming_past_the_end_keeps_the_floor_of_the_learning_rate(uninterrupted, tmp_path):
    import shutil

    shutil.copytree(uninterrupted, tmp_path / "run")
    assert train(tmp_path / "run", "max_steps=30", new=False) == 0
    content = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert content["step"] == 30
    assert content["trainer"]["optimizer_states"][0]["param_groups"][0]["lr"] == 0.0
    old = checkpoint.read(uninterrupted / "checkpoints" / "last.ckpt")
    assert_equal(old["model"], content["model"])  # at a learning rate of zero


def test_a_truncated_last_checkpoint_is_named_and_the_previous_one_used(uninterrupted, tmp_path, capsys):
    import shutil

    shutil.copytree(uninterrupted, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size * 2 // 3])
    content, path = checkpoint.newest(tmp_path / "run")
    assert path.name == "previous.ckpt"
    assert content["step"] == 18
    assert f"{last} is torn" in capsys.readouterr().out
    with pytest.raises(UserError, match="is torn"):
        checkpoint.read(last)


def test_a_flipped_byte_is_detected(uninterrupted, tmp_path):
    data = bytearray((uninterrupted / "checkpoints" / "last.ckpt").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "bad.ckpt").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits(tmp_path, number, code):
    """Through the real command line; then the run goes on."""
    import subprocess

    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"run_dir={folder}", "max_steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    step = checkpoint.read(folder / "checkpoints" / "last.ckpt")["step"]
    assert f"stopped by signal {number.value} after step {step}, saved" in output
    assert max(int(line.split(",")[0]) for line in rows(folder)[1:]) <= step
