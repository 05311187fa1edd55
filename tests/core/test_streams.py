"""A stdout or stderr that fails costs a command its printed lines and nothing else."""

import os
import subprocess
import sys

import pytest

from genai.core import streams
from tests.conftest import ROOT
from tests.test_door import TINY


@pytest.fixture
def broken():
    """A text stream whose pipe has no reader."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        yield stream


def test_lines_that_cannot_be_written_are_dropped(broken, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", None)
    streams.protect_output()
    for _ in range(3):
        print("a line", flush=True)
        print("a line", file=sys.stderr, flush=True)
    assert not streams.is_terminal(sys.stdout)
    assert isinstance(sys.stdout, streams.Lossy) and sys.stdout.fileno() == broken.fileno()
    before = sys.stdout
    streams.protect_output()
    assert sys.stdout is before


def test_characters_without_an_encoding_are_escaped(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        streams.protect_output()
        print("\u2717", flush=True)
    assert (tmp_path / "out").read_text() == "\\u2717\n"


def test_a_run_whose_reader_has_gone_is_trained_and_compared(tmp_path):
    def call(*command, **options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, timeout=120, **options
        )

    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        done = call(str(ROOT / "train.py"), *TINY, "logger=none", "run_dir=run", stdout=pipe)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    with open("/dev/full", "w") as full:
        done = call("-m", "genai.compare", "run", "--out", "compared", stdout=full)
        helped = call("-m", "genai", "--help", stdout=full), call(str(ROOT / "train.py"), "--cfg", "job", stdout=full)
    assert [(one.returncode, one.stderr) for one in (done, *helped)] == [(0, b"")] * 3
    assert (tmp_path / "compared" / "report.html").exists()
