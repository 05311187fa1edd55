"""What a run says where there is no terminal: a line at least every 30 seconds, by the clock."""

import itertools
import re
import subprocess
import sys
import time

import pytest

from genai import checkpoint, progress
from genai.cli import compose_config, prepare_training
from genai.train.lit import LitModel
from genai.train.run import run
from tests.conftest import ROOT
from tests.test_progress import Clock, seconds

SMALL = [
    "logger=none",
    "max_steps=30",
    "data.batch_size=4",
    "callbacks.evaluate.n=4",
    "callbacks.evaluate.every_steps=12",
    "callbacks.save.every_steps=12",
    "callbacks.samples.n=2",
    "callbacks.samples.every_steps=20",
    "trainer.accelerator=cpu",
]
NET = ["model.net.channels=8", "model.net.multipliers=[1]", "sampler.steps=2"]
FAMILIES = {
    "diffusion": (["model=ddpm", *NET], "train/loss"),
    "autoregressive": (
        ["experiment=gpt_digits", "model.net.transformer.width=16", "model.net.transformer.layers=1"],
        "train/loss",
    ),
    "vae": (["model=vae"], "train/loss"),
    "gan": (["model=gan"], "train/discriminator_loss"),
}


@pytest.mark.parametrize("given, loss", FAMILIES.values(), ids=FAMILIES)
def test_a_run_has_a_line_every_thirty_seconds(given, loss, tmp_path, monkeypatch, capsys):
    """Steps take 5 s, a validation, a file and samples 70 s; loss and speed are said before the first logging step too."""
    board = progress.Board(Clock(), threaded=False)
    monkeypatch.setattr(progress, "board", board)
    said = []

    def note(_):
        said.extend((board.clock.now, line) for line in capsys.readouterr().out.splitlines())

    def slow(owner, name, duration):
        original = getattr(owner, name)

        def slowed(*arguments, **more):
            seconds(board, duration, note)
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, slowed)

    slow(LitModel, "finish_step", 5)
    slow(LitModel, "evaluate", 70)
    slow(checkpoint, "save", 70)
    slow(progress, "follow", 70)
    run(compose_config("train", [*given, *SMALL, f"run_dir={tmp_path / 'run'}"], prepare_training))
    note(0)
    lines = [(at, line) for at, line in said if line.startswith("step ")]
    assert max(b - a for (a, _), (b, _) in itertools.pairwise(lines)) <= 30
    later = [line for _, line in lines if re.match(r"step ([4-9]|\d\d)/30 ", line)]
    assert len(later) > 15
    for line in later:
        assert re.match(r"step \d+/30  0\.\d+ steps/s  ", line) and re.search(
            r" -?\d+\.\d{4}  \d+ (s|min) left", line
        ), line
        assert f"{loss} " in line
    waits = {line.partition("left; ")[2].partition("  ")[0] for line in later}
    assert {"validation", "sampling", "saving"} <= waits


@pytest.mark.slow
def test_a_real_run_has_a_line_every_thirty_seconds(tmp_path):
    """At least seventy seconds, with a bar nowhere: output is a pipe."""
    given = ["model=gan", "max_steps=100000", "logger=none", "trainer.accelerator=cpu", f"run_dir={tmp_path / 'run'}"]
    given += ["callbacks.samples.every_steps=null", "callbacks.evaluate.every_steps=null"]
    command = [sys.executable, str(ROOT / "train.py"), *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    start, times = time.monotonic(), []
    for line in process.stdout:
        if line.startswith("step "):
            times.append(time.monotonic())
        if time.monotonic() > start + 75:
            process.terminate()
    assert process.wait(timeout=60) == 143
    assert len(times) >= 3 and max(b - a for a, b in itertools.pairwise(times)) <= 31


def test_a_run_that_fails_says_no_more(tmp_path, monkeypatch):
    """In a notebook the process lives on."""

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(LitModel, "finish_step", fail)
    with pytest.raises(OSError, match="no"):
        run(compose_config("train", ["model=ddpm", *NET, *SMALL, f"run_dir={tmp_path / 'run'}"], prepare_training))
    assert progress.board.tasks == []
