"""Tracking: what is written can be read back; nothing prompts, hangs or stops a run."""

import json
import struct
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.test_checkpoint import DEBUG

RUN = [*DEBUG[1:], "max_steps=6", "data.batch_size=8", "log_every_steps=2", "callbacks.samples.n=4",
       "callbacks.evaluate.n=8", "callbacks.samples.every_steps=3", "callbacks.save.every_steps=3"]  # fmt: skip


def records(path):
    """The records of an offline .wandb file: 7 bytes of head, then blocks of 32 KiB of (crc, length, type) records."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, position, buffer = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        buffer += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(buffer)
            buffer = b""
            yield record


def offline_runs(folder):
    """(config, history rows, exit code, run id) of every offline run below a run directory."""
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        config, history, code, name = {}, [], None, None
        for record in records(path):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            name = record.run.run_id or name
            if record.history.item:
                history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
            if record.HasField("exit"):
                code = record.exit.exit_code
        yield config, history, code, name


def test_offline_run_holds_config_metrics_and_images_and_goes_on_when_resumed(command, tmp_path):
    folder = tmp_path / "run"
    done = command("train.py", *RUN, f"run_dir={folder}", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    ((config, history, code, name),) = offline_runs(folder)
    assert config["max_steps"] == 6
    assert config["model"]["net"]["channels"] == 8
    losses = {row["trainer/global_step"]: row["train/loss"] for row in history if "train/loss" in row}
    written = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert losses == {int(step): float(value) for step, key, value in written[1:] if key == "train/loss"}
    assert sum(any(key.startswith("samples") for key in row) for row in history) == 2
    assert code == 0
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2

    done = command("train.py", f"resume={folder}", "max_steps=8", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    both = list(offline_runs(folder))
    assert [run[3] for run in both] == [name, name]
    assert max(row.get("trainer/global_step", 0) for row in both[1][1]) == 8


def test_a_crashed_run_shows_as_crashed(tmp_path):
    arguments = ["train.py", *RUN, f"run_dir={tmp_path / 'run'}"]
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {arguments!r}\n"
        "import runpy\n"
        "from genai.models.diffusion.ddpm import DDPM\n"
        "forward = DDPM.forward\n"
        "def fail(self, batch, step):\n"
        "    if step == 4: raise ArithmeticError('boom')\n"
        "    return forward(self, batch, step)\n"
        "DDPM.forward = fail\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "boom" in done.stderr
    ((_, _, code, _),) = offline_runs(tmp_path / "run")
    assert code == 1


@pytest.mark.parametrize(
    "env",
    [
        {"WANDB_MODE": "", "WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
        pytest.param({"WANDB_MODE": "", "WANDB_API_KEY": "", "HOME": "/nonexistent"}, marks=pytest.mark.slow),
        pytest.param({"WANDB_MODE": "disabled"}, marks=pytest.mark.slow),
    ],
    ids=["server does not answer", "no account", "disabled"],
)
def test_trouble_with_the_tracker_never_stops_a_run(command, tmp_path, env):
    env = {k: v for k, v in env.items() if v or k == "WANDB_API_KEY"}
    start = time.monotonic()
    done = command("train.py", *RUN, f"run_dir={tmp_path / 'run'}", env=env)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 90
    assert (tmp_path / "run" / "metrics.csv").exists()
    assert ("wandb: offline" in done.stdout) == ("WANDB_MODE" not in env or env["WANDB_MODE"] != "disabled")


def test_tensorboard_is_a_choice(command, tmp_path):
    done = command("train.py", *RUN, "logger=tensorboard", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    assert [e.step for e in events.Images("samples")] == [3, 6]
