"""The README's own text is run: its commands parse, and "add a model family" is this test."""

import contextlib
import re
import shlex

import numpy as np
import pytest

from genai import checkpoint, sweeps
from genai.cli import composed, resumed, with_sampler
from genai.core.errors import UserError
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


TEXTS = {path: path.read_text() for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "docs").glob("*.yaml")]}
WRITTEN = sorted(
    {
        re.sub("<[^>]*>", "x", line).strip()
        for text in [README, *TEXTS.values()]
        for line in re.findall(r"python (?:\w+\.py|-m genai[.\w]+)(?![.\w:])[^|`\n#&;]*?(?=  |[|`\n#&;])", text)
        if not re.search(r"my_lab|--help|=\]|\.\.\.", line)
    }.difference(map(str.strip, COMMANDS))
)


@pytest.mark.parametrize("line", WRITTEN)
def test_every_command_of_the_readme_and_the_configs_composes(line):
    """Those of sample.py with the sampler of some model: which one, the run decides."""
    words = shlex.split(line)
    name = words[1].removesuffix(".py") if words[1] != "-m" else words[2].rpartition(".")[2]
    arguments = [a for a in words[2 if words[1] != "-m" else 3 :] if a != "-m"]
    if name == "compare":
        assert all(not a.startswith("-") or a in ("--out", "--wandb", "--unranked") for a in arguments)
    elif name == "sample" and not any(a.startswith("sampler=") for a in arguments):
        for sampler in ("ddim", "generate", "gan"):
            with contextlib.suppress(UserError):
                composed("sample", [*arguments, f"sampler={sampler}"], with_sampler)
                break
        else:
            pytest.fail("it fits no sampler")
    elif not any(a.startswith("resume=") for a in arguments):
        prepare = {"train": sweeps.prepare, "sample": with_sampler}.get(name)
        composed(name, arguments, prepare, sweep=" -m " in line)


def test_every_file_named_exists():
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"`((?:notebooks|tests|genai)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
