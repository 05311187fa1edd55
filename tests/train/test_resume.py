"""A run killed anywhere and resumed equals one that never stopped, bit for bit."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genai import checkpoint
from genai.cli import check_unchanged, compose_config, prepare_sampling, prepare_training
from genai.core import archive, interrupt
from genai.core.errors import UserError
from genai.modalities.label import Label
from genai.sweeps.jobs import is_complete
from genai.train.init_from import load_initial_weights
from genai.train.lock import lock_run
from genai.train.run import run
from tests.conftest import ROOT, as_python, context

TINY = [
    "max_steps=24",
    "accumulate=2",
    "log_every_steps=5",
    "logger=none",
    "data.batch_size=4",
    "optim.warmup_steps=3",
    "model.net.channels=8",
    "model.net.multipliers=[1]",
    "model.net.dropout=0.1",
    "model.schedule.steps=20",
    "sampler.steps=2",
    "callbacks.samples.n=2",
    "callbacks.samples.every_steps=12",
    "callbacks.evaluate.every_steps=4",
    "callbacks.evaluate.n=16",
    "callbacks.save.every_steps=6",
    "callbacks.save.keep_every_steps=12",
]


def child(overrides, kill_at, log):
    """Train in this process as train.py does; die by SIGKILL at a kind of moment and its step, such as ("save", 6),
    ("link", name) or ("forward", step, call), or send itself a ("signal", step, number)."""
    interrupt.exit_on_signal()
    sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a real run
    from genai.cli import main
    from genai.models.diffusion.ddpm import DDPM
    from genai.train.callbacks import Evaluate

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
    if kind == "signal":
        inner_forward = DDPM.forward

        def forward_and_signal(self, batch, step):
            if self.training and step == at:
                os.kill(os.getpid(), rest[0])
            return inner_forward(self, batch, step)

        DDPM.forward = forward_and_signal
    if kind == "link":
        inner_link = checkpoint.link

        def link(path, name):
            if name == at:
                die()
            inner_link(path, name)

        checkpoint.link = link
    if kind == "generator":  # adversarial training, stopped between two updates
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
    sys.argv = ["train.py", *overrides]
    main(run, "train", prepare_training)


def train(
    folder: Path,
    *overrides: str,
    kill_at=None,
    kill_after: float | None = None,
    new: bool = True,
    base=TINY,
    codes=(0, -signal.SIGKILL),
    number=signal.SIGKILL,
) -> int:
    """One process that trains or resumes in `folder`; returns its exit code."""
    arguments = [*base, f"run_dir={folder}"] if new else [f"resume={folder}"]
    log = folder.with_suffix(".log")
    process = context.Process(target=child, args=([*arguments, *overrides], kill_at, str(log)))
    if kill_after is not None:
        log.unlink(missing_ok=True)
    process.start()
    if kill_after is not None:
        while not log.exists() and process.is_alive():  # before, it is not this project's
            time.sleep(0.01)
        process.join(kill_after)
        if process.is_alive():
            os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode is not None, "still running"
    if process.exitcode not in codes:
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
    names = {p.name for p in (a / "checkpoints").iterdir()}
    assert names == {p.name for p in (b / "checkpoints").iterdir()}
    for name in names - {"previous.ckpt"}:  # which may be of the step that a signal stopped the run at
        one, two = (checkpoint.read(folder / "checkpoints" / name) for folder in (a, b))
        for content in (one, two):
            del content["written"]  # the config again, as it lies in the file
            del content["config"]["run_dir"]
            content["config"]["data"].pop("num_workers", None)
            # Lightning's counters of how often it was started again; no state of the run.
            del content["trainer"]["loops"]
        assert_equal(one, two, name)
    assert rows(a) == rows(b)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    "before a checkpoint has all its names": [
        ("link", "best.ckpt"),
        ("link", "step_0000012.ckpt"),
        ("link", "previous.ckpt"),
        ("link", "step_0000024.ckpt"),
    ],
    "right after a save, twice": [("forward", 12, 1), ("forward", 12, 1)],
}
LINKED = {
    "best.ckpt": 6,
    "step_0000012.ckpt": 12,
    "previous.ckpt": 18,
    "step_0000024.ckpt": 24,
}  # at the save of a step
ALL = sorted((kill for kills in AIMED.values() for kill in kills), key=lambda kill: LINKED.get(kill[1], kill[1]))

# One run meets all of them; with loader processes the hardest; each alone is slow.
KILLS = [
    pytest.param(n, kills, id=f"{name}, {n} workers", marks=[] if n and "twice from" in name else pytest.mark.slow)
    for n in (0, 2)
    for name, kills in AIMED.items()
]
KILLS.append(pytest.param(0, ALL, id="everywhere"))


@pytest.mark.parametrize(("workers", "kills"), KILLS)
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, kills, workers):
    folder = tmp_path / "run"
    for i, kill_at in enumerate(kills):
        more = [f"data.num_workers={workers}"] * (i == 0)
        assert train(folder, *more, kill_at=kill_at, new=i == 0) == -signal.SIGKILL, kill_at
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
    for _ in range(4):
        if not is_complete(folder):
            kills += train(folder, kill_after=draw.uniform(0.2, 1.5), new=False) != 0
    if not is_complete(folder):
        assert train(folder, new=False) == 0
    assert kills > 0
    assert_same_run(uninterrupted, folder)


def test_a_signal_between_saves_changes_neither_best_nor_the_kept_ones(uninterrupted, tmp_path):
    """Step 8 is evaluated, and the best so far, but not due for a save."""
    folder, stopped = tmp_path / "run", (128 + signal.SIGTERM,)
    assert train(folder, kill_at=("signal", 7, signal.SIGTERM), codes=stopped)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert checkpoint.read(folder / "checkpoints" / "last.ckpt")["step"] == 8
    assert train(folder, new=False) == 0
    assert_same_run(uninterrupted, folder)


def test_a_second_process_is_refused_and_death_frees_the_run(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, f"run_dir={folder}", "data.num_workers=1"]
    process = context.Process(target=child, args=(arguments, ("signal", 9, signal.SIGSTOP), str(tmp_path / "log")))
    process.start()
    deadline = time.time() + 100
    while not Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].startswith(" T"):
        assert time.time() < deadline and process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.05)
    before = contents(folder)
    for again in ([f"resume={folder}"], [*TINY, f"run_dir={folder}"]):
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on|already holds a run"):
            run(compose_config("train", again, prepare_training))
    assert contents(folder) == before
    process.kill()
    process.join()
    assert train(folder, new=False) == 0  # though its loader's process may still be there
    assert_same_run(uninterrupted, folder)


ADVERSARIAL = [
    "model=biggan",
    "max_steps=14",
    "log_every_steps=4",
    "logger=none",
    "data.batch_size=4",
    "loop.critic_steps=2",
    "model.share_fake=false",
    "model.generator.channels=4",
    "model.discriminator.channels=4",
    "callbacks.samples.n=2",
    "callbacks.samples.every_steps=6",
    "callbacks.evaluate.every_steps=4",
    "callbacks.evaluate.n=16",
    "callbacks.save.every_steps=6",
]


def test_a_run_killed_between_the_two_updates_equals_one_that_was_not(tmp_path):
    """Both optimisers, the average, batch norms and spectral vectors come back."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *ADVERSARIAL, base=[]) == 0
    assert train(folder, *ADVERSARIAL, kill_at=("generator", 8), base=[]) == -signal.SIGKILL
    assert train(folder, kill_at=("save", 12), new=False) == -signal.SIGKILL
    assert train(folder, new=False) == 0
    assert_same_run(whole, folder)


def test_a_run_is_not_resumed_to_learn_nothing(uninterrupted, tmp_path):
    """Past the end of a decay to 0 the schedule must be said anew, and the new one is what the run then follows."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match=r"from step 24 to max_steps=30, .* give optim.decay_steps=30 .*schedule=const"):
        run(compose_config("train", [f"resume={tmp_path / 'run'}", "max_steps=30"], prepare_training))
    assert before == {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    again = ["max_steps=30", "optim.schedule=constant", "optim.lr_min=1e-5"]
    assert train(tmp_path / "run", *again, new=False) == 0
    content = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (group, _) = content["trainer"]["optimizer_states"][0]["param_groups"]
    assert content["step"] == 30 and group["lr"] == group["lr_max"] == 2e-3
    assert content["config"]["optim"]["schedule"] == group["schedule"] == "constant"
    assert content["config"]["optim"]["decay_steps"] == 24 and group["lr_min"] == 1e-5
    old = checkpoint.read(uninterrupted / "checkpoints" / "last.ckpt")["model"]
    assert not all(torch.equal(old[name], tensor) for name, tensor in content["model"].items())


def test_a_new_run_is_not_started_to_learn_nothing(refused):
    sentence = refused("train.py", "max_steps=30", "optim.decay_steps=20", "optim.warmup_steps=3")
    assert sentence.startswith("the learning rate would be 0 from step 20 to max_steps=30")


def test_old_weights_are_of_the_same_classes(uninterrupted):
    """init_from compares the names of labels unless the model has none, or init_strict=false says that only weights matter."""
    loaded = checkpoint.load(uninterrupted)
    known = loaded.modality, loaded.conditions
    assert known[1]["label"].names == [str(i) for i in range(10)]
    strict = {**loaded.config, "init_from": str(uninterrupted), "init_strict": True}
    load_initial_weights(loaded.model, known, strict)
    other = loaded.modality, {"label": Label(10, [f"shoe {i}" for i in range(10)])}
    with pytest.raises(UserError, match=r"the list of classes of this data is not .* or init_strict=false"):
        load_initial_weights(loaded.model, other, strict)
    load_initial_weights(loaded.model, (loaded.modality, {}), strict)
    load_initial_weights(loaded.model, other, {**strict, "init_strict": False})


def test_both_optimisers_may_be_given_a_schedule_on_resume(tmp_path):
    folder, long = tmp_path / "run", ["max_steps=6", "optim.decay_steps=6"]
    assert train(folder, *ADVERSARIAL, "max_steps=4", "model.generator.multipliers=[1,2]", base=[]) == 0
    with pytest.raises(UserError, match=r"give discriminator_optim.decay_steps=6 "):
        run(compose_config("train", [f"resume={folder}", *long], prepare_training))
    assert train(folder, *long, "discriminator_optim.decay_steps=8", new=False) == 0
    stored = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    groups = [state["param_groups"][0]["decay_steps"] for state in stored["trainer"]["optimizer_states"]]
    assert groups == [6, 8] and stored["config"]["loop"]["discriminator_optim"]["decay_steps"] == 8


def test_a_truncated_last_checkpoint_is_named_and_the_previous_one_used(uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size * 2 // 3])
    content, path = checkpoint.newest(tmp_path / "run")
    assert path.name == "previous.ckpt"
    assert content["step"] == 18
    assert f"{last} is damaged, cut off" in capsys.readouterr().out
    with pytest.raises(UserError, match="is damaged, cut off"):
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
    """Through the real command line. The signal reaches the loader's workers too, as one to a process group does."""
    folder = tmp_path / "run"
    command = [str(ROOT / "train.py"), *TINY, f"run_dir={folder}", "max_steps=100000", "data.num_workers=1"]
    process = context.Process(target=as_python, args=(command, str(tmp_path), dict(os.environ), str(tmp_path)))
    process.start()
    deadline = time.time() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.time() < deadline:
        time.sleep(0.1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    for pid in (*workers, process.pid):
        os.kill(int(pid), number)
    process.join(60)
    output = "".join((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == code, output
    step = checkpoint.read(folder / "checkpoints" / "last.ckpt")["step"]
    assert f"stopped by signal {number.value} after step {step}, saved" in output
    assert max(int(line.split(",")[0]) for line in rows(folder)[1:]) <= step


def fail_to_read(error):
    def check(path):
        raise error

    return lambda folder, patch: patch.setattr(archive, "read", check)


def newer(folder, patch):
    content = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    torch.save({**content, "format": checkpoint.FORMAT + 1}, folder / "checkpoints" / "last.ckpt")


def all_damaged(folder, patch):
    for path in (folder / "checkpoints").iterdir():
        data = path.read_bytes()
        path.unlink()  # it may be one file with another
        path.write_bytes(data[:-100])


def edited(old, new):
    def edit(folder, patch):
        text = (folder / "config.yaml").read_text()
        assert text.count(old) == 1
        (folder / "config.yaml").write_text(text.replace(old, new))

    return edit


FORMAT = checkpoint.FORMAT
REFUSED = {
    "newer": (newer, rf"last\.ckpt has checkpoint format {FORMAT + 1}, this version reads up to {FORMAT}: update"),
    "input/output": (fail_to_read(OSError(5, "Input/output error")), r"cannot be read \(Input/output error\)"),
    "memory": (fail_to_read(MemoryError()), r"cannot be read \(out of memory\)"),
    "damaged": (all_damaged, "cannot be used: all its 5 checkpoints are damaged"),
    "seed": (edited("\nseed: 0", "\nseed: 1"), r"config\.yaml was changed since .*: seed is 1 and was 0; restore"),
    "batch": (edited("batch_size: 4", "batch_size: 8"), "data.batch_size is 8 and was 4"),
    "decay": (edited("decay: 0.998", "decay: 0.99"), "ema.decay is 0.99 and was 0.998"),
    "schedule": (edited("    steps: 20\n", "    steps: 40\n"), "model.schedule.steps is 40 and was 20"),
    "two": (
        edited("accumulate: 2\n", "accumulate: 4\nnew: 1\n"),
        "accumulate is 4 and was 2; new is 1 and was not there",
    ),
    "gone": (edited("clip_norm: 1.0\n", ""), "clip_norm is not there and was 1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_go_on_is_left_as_it_is(uninterrupted, tmp_path, monkeypatch, name):
    shutil.copytree(uninterrupted, tmp_path / "run")
    spoil, sentence = REFUSED[name]
    spoil(tmp_path / "run", monkeypatch)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=sentence):
        run(compose_config("train", [f"resume={tmp_path / 'run'}", "max_steps=30"], prepare_training))
    assert contents(tmp_path / "run") == before


def test_what_may_differ_when_a_run_goes_on_may(uninterrupted):
    stored = checkpoint.read(uninterrupted / "checkpoints" / "last.ckpt")["config"]
    moved = {**stored, "max_steps": 99, "run_dir": "elsewhere", "logger": {"_target_": "genai.train.trackers.wandb"}}
    moved["data"] = {**stored["data"], "root": "/data", "num_workers": 3}
    check_unchanged(moved, stored, uninterrupted)


def test_half_written_files_of_training_alone_are_deleted_and_under_the_lock(tmp_path):
    ours = [
        "checkpoints/.last.ckpt.7.ab.tmp",
        "checkpoints/.best.ckpt.7.tmp",
        ".config.yaml.tmp",
        ".metrics.csv.7.ab.tmp",
    ]
    theirs = ["checkpoints/.last.test.json.7.ab.tmp", "cards/.frechet.json.7.ab.tmp", "mine.tmp"]
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with lock_run(tmp_path):
        assert not any((tmp_path / name).exists() for name in ours)
        for name in ours:
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), lock_run(tmp_path):
            pass
        assert all((tmp_path / name).exists() for name in (*ours, *theirs))
    assert not (tmp_path / ".lock").exists()


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own; skipped where nothing may be mounted."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path / "disk")]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def fill(path: Path, leave: int) -> None:
    """Write a file that leaves so many bytes of its disk."""
    path.write_bytes(bytes(max(0, shutil.disk_usage(path.parent).free - leave)))


def last_line(log: Path) -> str:
    text = log.read_text()
    assert "Traceback" not in text, text
    return text.strip().splitlines()[-1]


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(uninterrupted, disk):
    folder, log = disk / "run", disk / "run.log"
    assert train(folder, kill_at=("forward", 7, 1)) == -signal.SIGKILL
    size = (folder / "checkpoints" / "last.ckpt").stat().st_size
    for leave in (size // 2, size + 4096, 0):  # the next checkpoint does not fit, the next but one, nothing does
        fill(disk / "other", leave)
        step = checkpoint.newest(folder)[0]["step"]
        log.unlink(missing_ok=True)
        log.symlink_to(disk.parent / "log")
        assert train(folder, new=False, codes=(2,)) == 2
        assert re.match(r"error: .* cannot be written \(No space left on device\): make room", last_line(log))
        assert not list(folder.rglob("*.tmp"))
        assert checkpoint.newest(folder)[0]["step"] >= step
        (disk / "other").unlink()
        log.resolve().write_text("")
    assert train(folder, new=False) == 0
    assert_same_run(uninterrupted, folder)


def test_a_run_that_may_not_be_written_is_one_sentence(uninterrupted, disk):
    shutil.copytree(uninterrupted, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for given in (["max_steps=30", f"resume={disk / 'run'}"], [*TINY, f"run_dir={disk / 'new'}"]):
        with pytest.raises(
            UserError, match=r"cannot be written( \(Read-only file system\))?: (make room, or )?name another"
        ):
            run(compose_config("train", given, prepare_training))
    from genai import sampling
    from genai.evaluation.run import run as evaluate

    with pytest.raises(UserError, match="run cannot be written, and cards are kept there"):
        evaluate(compose_config("evaluate", [f"ckpt={disk / 'run'}", "n=4", "likelihood=probability_flow"]))
    with pytest.raises(UserError, match=r"out cannot be written: name another folder"):
        sampling.run(compose_config("sample", [f"ckpt={disk / 'run'}", "n=1", f"out={disk / 'out'}"], prepare_sampling))


FAMILIES = {
    "ddpm": TINY,
    "biggan": ADVERSARIAL,
    "vae": [
        "model=vae",
        "max_steps=120",
        "data.batch_size=4",
        "logger=none",
        "callbacks.save.every_steps=6",
        "callbacks.save.keep_every_steps=12",
        "callbacks.evaluate.every_steps=4",
        "callbacks.evaluate.n=16",
        "callbacks.samples.every_steps=20",
        "callbacks.samples.n=2",
    ],
    "gpt": [
        "model=gpt_nano",
        "data=digits_pixels",
        "max_steps=24",
        "data.batch_size=2",
        "logger=none",
        "model.net.transformer.width=16",
        "callbacks.save.every_steps=6",
        "callbacks.save.keep_every_steps=12",
        "callbacks.evaluate.every_steps=4",
        "callbacks.evaluate.n=8",
        "callbacks.samples.every_steps=20",
        "callbacks.samples.n=1",
    ],
}
KILLS_OF_EACH = int(os.environ.get("KILLS", "25"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_signals_at_random_moments(tmp_path, family):
    """A hundred over the families: nothing hangs, and last, best and kept checkpoints are those of the twin."""
    whole, draw, kills, resumes = tmp_path / "whole", random.Random(family), 0, 0
    warm = context.Process(target=int)  # packages load once, and not in the time that is measured
    warm.start()
    warm.join()
    start = time.monotonic()
    assert train(whole, base=FAMILIES[family]) == 0
    took = time.monotonic() - start
    while kills < KILLS_OF_EACH:
        folder = tmp_path / f"run{resumes}"
        while not is_complete(folder):
            number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            after = draw.uniform(0.02, 0.9) * took if kills < KILLS_OF_EACH else None
            new = not (folder / "config.yaml").exists()
            code = train(
                folder, kill_after=after, new=new, base=FAMILIES[family], number=number, codes=(0, -9, 130, 143)
            )
            kills += code != 0
            took *= 0.8 if code == 0 else 1.05  # on a busy machine, too
            print(family, number.name, None if after is None else round(after, 2), code, flush=True)
        assert_same_run(whole, folder)
        shutil.rmtree(folder)
        resumes += 1
