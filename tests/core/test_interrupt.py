"""A signal while packages load and a run is built: one line and the exit code of the signal, from every command."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

COMMANDS = {
    "train": [str(ROOT / "train.py"), "debug=true", "logger=none"],
    "sample": [str(ROOT / "sample.py"), "ckpt=gone"],
    "evaluate": [str(ROOT / "evaluate.py"), "ckpt=gone"],
    "baselines": ["-m", "genai.evaluation.baselines", "data=digits"],
    "compare": ["-m", "genai.compare", "gone"],
}
CASES = [
    ("train", signal.SIGINT, "omegaconf"),
    ("train", signal.SIGINT, "torch._C"),
    ("train", signal.SIGTERM, "lightning"),
    ("sample", signal.SIGINT, "torch"),
    ("evaluate", signal.SIGTERM, "hydra"),
    ("baselines", signal.SIGINT, "numpy"),
    ("compare", signal.SIGINT, "rich"),
]


def interrupted(command, number, module, later, cwd):
    """(exit code, lines) of a command that gets a signal so many seconds after it has begun to import a module's parts;
    what `-X importtime` prints is left out."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *COMMANDS[command]],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("import time:") and line.rpartition("|")[2].strip().startswith(module):
            time.sleep(later)
            process.send_signal(number)
            break
    lines += process.stdout.read().splitlines(keepends=True)
    return process.wait(60), [line for line in lines if not line.startswith("import time:")]


@pytest.mark.parametrize(("command", "number", "module"), CASES)
def test_a_signal_during_the_start_is_one_line(tmp_path, command, number, module):
    code, lines = interrupted(command, number, module, 0.0, tmp_path)
    assert (code, lines) == (128 + number, [f"stopped by signal {number.value}\n"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_signals_at_random_moments_of_the_start(tmp_path, command):
    draw = random.Random(command)
    for _ in range(12):
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        code, lines = interrupted(command, number, "genai.core.interrupt", draw.uniform(0, 4), tmp_path)
        if code in (0, 2) or (code == -number and lines):  # it was done before, or leaving after it had answered
            continue
        printed = [line for line in lines if "stopped by signal" in line]
        assert code == 128 + number and len(printed) == 1, lines
        assert "Traceback" not in "".join(lines)
