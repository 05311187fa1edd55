"""Tracking: what is written can be read back; nothing prompts, hangs or stops a run."""

import contextlib
import hashlib
import http.server
import json
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import pytest
from omegaconf import OmegaConf

from genai.checkpoint.build import build_typed
from genai.cli import compose_config, prepare_training
from genai.core.errors import UserError
from genai.train import trackers, wandb_start
from genai.train.record import Record
from tests.checkpoint.test_checkpoint import DEBUG
from tests.conftest import ROOT, python

RUN = [
    *DEBUG[1:],
    "max_steps=6",
    "data.batch_size=8",
    "log_every_steps=2",
    "callbacks.samples.n=4",
    "callbacks.evaluate.n=8",
    "callbacks.samples.every_steps=3",
    "callbacks.save.every_steps=3",
]


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


class Offline(NamedTuple):
    """What an offline run holds; the run as it was announced."""

    config: dict
    history: list
    summary: dict
    artifacts: list
    run: Any
    code: int | None


def offline_runs(folder):
    """Every offline run below a run directory, the oldest first."""
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        config, history, summary, artifacts, code, run = {}, [], {}, [], None, None
        for record in records(path):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            run = record.run if record.run.run_id else run
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if record.request.log_artifact.artifact.name:
                artifacts.append(record.request.log_artifact.artifact.name)
            if record.artifact.name:
                artifacts.append(record.artifact.name)
            if record.history.item:
                history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
            if record.HasField("exit"):
                code = record.exit.exit_code
        yield Offline(config, history, summary, artifacts, run, code)


@pytest.mark.slow
def test_offline_run_holds_config_metrics_and_images_and_goes_on_when_resumed(command, tmp_path):
    folder = tmp_path / "run"
    asked = [
        "logger.project=mine",
        "logger.entity=me",
        "logger.tags=[a,b]",
        "logger.notes=first try",
        "logger.group=g",
        "logger.artifacts=true",
    ]
    done = command("train.py", *RUN, *asked, f"run_dir={folder}", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    (first,) = offline_runs(folder)
    assert first.config["max_steps"] == 6
    assert first.config["model"]["net"]["channels"] == 8
    losses = {row["trainer/global_step"]: row["train/loss"] for row in first.history if "train/loss" in row}
    written = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert losses == {int(step): float(value) for step, key, value in written[1:] if key == "train/loss"}
    pictures = [row for row in first.history if any(key.startswith("samples") for key in row)]
    captions = [next(value for key, value in row.items() if key.endswith("captions")) for row in pictures]
    assert captions == [[f"step {step}, seeds 0 to 3, of 0; 1; 2; 3"] for step in (3, 6)]
    assert first.code == 0
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2
    run = first.run
    assert (run.project, run.entity, list(run.tags), run.notes, run.run_group) == (
        "mine",
        "me",
        ["a", "b"],
        "first try",
        "g",
    )
    assert run.display_name == "ddpm_digits run"
    best = min(float(value) for _, key, value in written[1:] if key == "val/loss")
    assert first.summary["best/val/loss"] == best
    assert first.summary["parameters"] == first.config["parameters"] > 1000
    assert sorted(first.artifacts) == [f"{run.run_id}-best", f"{run.run_id}-last"]

    again = ["max_steps=8", "optim.decay_steps=8", "logger.artifacts=false"]
    done = command("train.py", f"resume={folder}", *again, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    _, second = offline_runs(folder)
    assert (second.run.run_id, second.artifacts) == (run.run_id, [])
    assert max(row.get("trainer/global_step", 0) for row in second.history) == 8
    assert second.summary["best/val/loss"] <= best


@pytest.mark.slow
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
    assert [run.code for run in offline_runs(tmp_path / "run")] == [1]


KEY = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture
def silent_server():
    """The URL of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing_server():
    """The URL of a server that answers, and takes no key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(401)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"{}")

        do_GET = do_POST = do_HEAD

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def clean(tmp_path):
    """The environment of a user whose home is new, without what the tests' own says of W&B: values of None are left out."""

    def environment(**more):
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        own = {"MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "NETRC"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB") and key not in own}
        return {**kept, "HOME": str(home), "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], **more}

    return environment


def lines_of_wandb(done):
    """What a command printed about W&B; on stderr it printed nothing but how long it waits."""
    assert all(re.search(r" (so far|left)$", line) for line in done.stderr.splitlines()), done.stderr
    return [line for line in done.stdout.splitlines() if "wandb" in line.lower()]


def trained(env, folder, *more):
    """Train six steps with W&B in an environment; the one line that it printed about it."""
    start = time.monotonic()
    done = python(ROOT / "train.py", *RUN, f"run_dir={folder}", *more, env=env)
    assert done.returncode == 0, done.stderr
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert time.monotonic() - start < 150
    (line,) = lines_of_wandb(done)
    assert [run.code for run in offline_runs(folder)] == [0]
    return line


def test_a_key_and_a_server_that_does_not_answer_train_to_the_end(clean, tmp_path):
    line = trained(clean(**KEY, **NOWHERE), tmp_path / "run")
    assert line.startswith("wandb: offline (http://127.0.0.1:9 does not answer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("unresolvable", "offline (https://wandb.invalid does not answer"),
        ("malformed", "offline (AuthenticationError: "),
        ("netrc", "offline (http://127.0.0.1:9 does not answer"),
        ("no account", "offline (not logged in, see wandb login)"),
        ("home", "offline (http://127.0.0.1:9 does not answer"),
        ("silent", "offline (http://127.0.0.1:"),
        ("refused", "offline (CommError: "),
    ],
)
def test_each_kind_of_trouble_trains_to_the_end(clean, tmp_path, silent_server, refusing_server, kind, said):
    env = {
        "unresolvable": {**KEY, "WANDB_BASE_URL": "https://wandb.invalid"},
        "malformed": {"WANDB_API_KEY": "short"},
        "netrc": {**NOWHERE, "NETRC": str(tmp_path / "netrc")},
        "no account": {},
        "home": {**KEY, **NOWHERE, "HOME": "/proc/nowhere"},
        "silent": {**KEY, "WANDB_BASE_URL": silent_server},
        "refused": {**KEY, "WANDB_BASE_URL": refusing_server},
    }[kind]
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9\n  login user\n  password {KEY['WANDB_API_KEY']}\n")
    (tmp_path / "netrc").chmod(0o600)
    env = clean(**env)
    if kind == "home":
        del env["XDG_CACHE_HOME"]
    assert said in trained(env, tmp_path / "run")


def test_wandbs_own_folder_is_that_of_each_run_in_turn(tmp_path, monkeypatch):
    """Two runs of one process, where the home directory cannot be written."""
    names = [f"WANDB_{name}_DIR" for name in ("CACHE", "CONFIG", "DATA")]
    for name in ("XDG_CACHE_HOME", *names):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for run in (tmp_path / "first", tmp_path / "second"):
        with wandb_start.own_home(run):
            pass
        assert {os.environ.get(name) for name in names} == {str(run / "wandb")}
        trackers.finish(False)
        assert not {*names} & os.environ.keys()


def test_whatever_wandb_raises_is_a_line(tmp_path, monkeypatch, capsys):
    """In this process: where a login and every start raise, there is no run, and nothing is printed but why."""
    import wandb

    def fail(*_, **__):
        print("noise")
        print("noise", file=sys.stderr)
        raise ConnectionError("no")

    def dead(*_, **__):
        raise ConnectionError("the line is dead\nand more")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", fail)
    monkeypatch.setattr(wandb, "init", dead)
    assert trackers.wandb(tmp_path, "x", {}) is None
    said = f"wandb: no run (ConnectionError: the line is dead); what was measured is in {tmp_path} all the same\n"
    assert capsys.readouterr() == (said, "")


def test_a_server_that_never_answers_costs_seconds(silent_server, refusing_server, monkeypatch):
    monkeypatch.setattr(wandb_start, "REACHED_SECONDS", 0.3)
    start = time.monotonic()
    assert wandb_start.reason_unreachable(silent_server) in (
        f"{silent_server} does not answer within 0.3 s",
        f"{silent_server} does not answer, ReadTimeout",
    )
    assert time.monotonic() - start < 10
    assert wandb_start.reason_unreachable(refusing_server) == ""
    assert "does not answer" in wandb_start.reason_unreachable("http://127.0.0.1:9")


def test_a_tracker_that_fails_halfway_is_left_and_the_run_goes_on(tmp_path, capsys):
    class Failing:
        def log_metrics(self, values, step):
            raise OSError("the service is gone")

    record = Record(tmp_path, Failing())
    record.log(1, {"train/loss": 1.0})
    record.log(2, {"train/loss": 2.0})
    assert capsys.readouterr().out.count("the tracker failed, the run goes on without it (OSError: the service") == 1
    assert "2,train/loss,2.0" in (tmp_path / "metrics.csv").read_text()


def test_a_run_directory_has_one_id_and_a_new_one_another(tmp_path):
    folder = tmp_path / "run"
    first = wandb_start.run_id(folder)
    assert wandb_start.run_id(folder) == first == (folder / "wandb_id").read_text().strip()
    shutil.rmtree(folder)
    assert wandb_start.run_id(folder) != first
    old = tmp_path / "old"  # of before there was wandb_id
    (old / "checkpoints").mkdir(parents=True)
    (old / "checkpoints" / "last.ckpt").touch()
    assert wandb_start.run_id(old) == hashlib.sha256(str(old.resolve()).encode()).hexdigest()[:16]


WRONG_LOGGER = {
    "+logger.foo=1": "the logger wandb has no key foo: it has project, entity, group, name, tags, notes, artifacts, timeout_s",
    "logger.tags=first": "logger.tags=first must be a list",
    "logger.tags=[1]": "logger.tags=[1] must be a list",
    "logger.tags=['']": "must be a list",
    "logger.entity=''": "logger.entity= must be a string",
    "logger.project=null": "logger.project=null must be a string",
    "logger.project=a/b": "logger.project=a/b must be a string of 1 to 128 characters, none of / ",
    "logger.artifacts=3": "logger.artifacts=3 ",
    "logger.timeout_seconds=0": "logger.timeout_seconds=0 must be a number of seconds, greater than 0",
    f"logger.name={'n' * 129}": "must be a string of 1 to 128 characters",
}


@pytest.mark.parametrize("override", WRONG_LOGGER)
def test_wrong_keys_of_a_logger_are_sentences(override):
    with pytest.raises(UserError, match=re.escape(WRONG_LOGGER[override])):
        node = OmegaConf.to_container(compose_config("train", [override]).logger)
        trackers.check(build_typed({**node, "_partial_": True}))


def test_a_wrong_logger_leaves_nothing_behind(refused):
    """So that the corrected command may use the same run_dir."""
    assert "the logger wandb has no key foo" in refused("train.py", *RUN, "+logger.foo=1", "run_dir=run")
    assert "the logger none has no key foo: it has none" in refused(
        "train.py", *RUN, "logger=none", "+logger.foo=1", "run_dir=run"
    )


def test_an_old_run_is_given_the_keys_it_is_too_old_to_have(tmp_path):
    stored = compose_config("train", [])
    stored.logger = {"_target_": "genai.train.trackers.wandb", "project": "mine", "timeout_seconds": 30}
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(stored, resolve=True)), tmp_path / "config.yaml")
    cfg = compose_config("train", [f"resume={tmp_path}", "logger.tags=[a]"], prepare_training)
    assert dict(cfg.logger) == {**stored.logger, "tags": ["a"]}


@pytest.mark.slow
def test_output_is_kept_and_a_bar_survives_it(tmp_path):
    """In a terminal, where the progress bar moves."""
    command = [sys.executable, str(ROOT / "train.py"), *RUN, f"run_dir={tmp_path / 'run'}"]
    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=child, stderr=child)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while part := os.read(parent, 65536):
            shown += part
    os.close(parent)
    assert process.wait(timeout=60) == 0, shown.decode()
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    kept = "".join(record.output_raw.line for record in records(path))
    for said in ("6/6", "48,753 parameters"):
        assert said in shown.decode() and said in kept
    assert "Traceback" not in shown.decode()


@pytest.mark.slow
def test_tensorboard_is_a_choice(command, tmp_path):
    done = command("train.py", *RUN, "logger=tensorboard", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    assert [e.step for e in events.Images("samples")] == [3, 6]
