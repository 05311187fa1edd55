"""The README's own text is run: its commands parse, and "add a model family" is this test."""

import re
import shlex

import numpy as np
import pytest

from genai import checkpoint
from genai.cli import composed, resumed
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
FILES = re.findall(r"`(my_lab/\S+)`:\n\n```\w+\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def test_a_family_in_ones_own_package(tmp_path, command):
    """Write the README's files into an empty folder, then run its three commands there, as written."""
    for name, text in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    model = (tmp_path / "my_lab" / "gaussian.py").read_text()
    assert len([line for line in model.splitlines() if line.strip()]) <= 30
    (script,) = [text for text in SHELL if "--config-dir my_lab/conf" in text]
    for line in script.strip().splitlines():
        _, name, *arguments = shlex.split(line)
        done = command(name, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    content = checkpoint.read(tmp_path / "runs" / "gaussian" / "checkpoints" / "last.ckpt")
    assert content["step"] == 8
    written = np.load(next(tmp_path.glob("runs/gaussian/samples/0001/samples.npz")))
    assert written["samples"].shape == (100, 1, 8, 8)
    refused = command("sample.py", "ckpt=runs/gaussian", cwd=tmp_path)
    assert refused.returncode == 2
    assert "add trust=my_lab" in refused.stderr


COMMANDS = sorted(set(re.findall(r"python train\.py[^|`\n#&]*", README)))


@pytest.mark.parametrize("line", [c for c in COMMANDS if not re.search("my_lab|--help|<", c)])
def test_every_training_command_composes(line):
    arguments = [a for a in shlex.split(line)[2:] if a != "-m"]
    assert composed("train", arguments, resumed, sweep="-m" in line).max_steps > 0


def test_every_file_named_exists():
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"`((?:notebooks|tests|genai)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
