"""Sweeps: killed for real and finished by the same command; failures are named; wrong files are one sentence."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf

from genai.cli import compose_config
from genai.core.errors import UserError
from genai.sweeps import JournalSweeper, prepare
from genai.sweeps.jobs import Job, journal, note
from genai.sweeps.search import Settings, literal
from genai.sweeps.summary import rank_jobs, summarise
from tests.conftest import ROOT, python
from tests.train.test_tracking import records

TINY = [
    "experiment=ddpm_toy2d",
    "model.net.width=8",
    "model.net.blocks=1",
    "model.schedule.steps=10",
    "sampler.steps=2",
    "data.n=256",
    "data.batch_size=16",
    "max_steps=40",
    "log_every_steps=20",
    "callbacks.evaluate.n=16",
    "callbacks.evaluate.every_steps=20",
    "callbacks.samples.n=4",
    "callbacks.samples.every_steps=null",
    "callbacks.save.every_steps=20",
]


@pytest.fixture
def sweep(tmp_path):
    """Write a sweep called tiny; returns the command that runs it in an empty folder."""

    def write(**node):
        path = tmp_path / "conf" / "sweep" / "tiny.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"overrides": TINY, **node}))
        return [sys.executable, str(ROOT / "train.py"), "--config-dir", "conf", "-m", "sweep=tiny"]

    return write


def call(command, folder, *more):
    return python(*command[1:], *more, cwd=folder)


def the_folder(tmp_path):
    (folder,) = tmp_path.glob("runs/sweeps/tiny-*")
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def killed_when(command, folder, ready):
    """Start a command in a group of its own, and SIGKILL the whole group once `ready()`."""
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_sweep_is_finished_by_the_same_command(sweep, tmp_path):
    over = {"seed": [0, 1], "optim.lr": [1e-3, 1e-2]}
    command = [*sweep(over=over), "logger=wandb", "callbacks.save.every_steps=5"]
    killed_when(command, tmp_path, lambda: len([*tmp_path.glob("runs/sweeps/*/*/checkpoints/last.ckpt")]) == 2)
    folder = the_folder(tmp_path)
    before = Counter(record["status"] for record in lines(folder))
    assert before == {"started": 2, "finished": 1}
    done = call(command, tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "4 jobs, 1 of them finished before" in done.stdout
    assert all(record["status"] == "finished" for record in journal(folder).values())
    started = Counter(record["job"] for record in lines(folder) if record["status"] == "started")
    assert sorted(started.values()) == [1, 1, 1, 2]
    assert Counter(record["job"] for record in lines(folder) if record["status"] == "finished") == dict.fromkeys(
        started, 1
    )
    (twice,) = (job for job, times in started.items() if times == 2)
    assert f"resume=runs/sweeps/{folder.name}/{twice}" in (folder / f"{twice}.log").read_text()

    runs = [record.run for path in folder.glob("*/wandb/offline-run-*/run-*.wandb") for record in records(path)]
    runs = {run.run_id: run for run in runs if run.run_id}
    assert len(runs) == 4
    assert {run.run_group for run in runs.values()} == {folder.name}
    assert {run.display_name for run in runs.values()} == set(started)

    rows = list(csv.DictReader((folder / "summary.csv").open()))
    losses = [float(row["val/loss"]) for row in rows]
    assert len(rows) == 4 and losses == sorted(losses)
    assert {(row["seed"], row["optim.lr"]) for row in rows} == {(s, lr) for s in "01" for lr in ("0.001", "0.01")}
    assert (folder / "summary.png").stat().st_size > 1000
    again = call(command, tmp_path)
    assert again.returncode == 0
    assert "nothing is left to run" in again.stdout
    assert len(lines(folder)) == 9


def test_failed_jobs_are_named_and_the_rest_go_on(sweep, tmp_path):
    command = [*sweep(over={"optim.lr": [1000, 1e-3]}), "logger=none", "clip_norm=null"]
    command += ["optim.weight_decay=1", "optim.warmup_steps=0"]  # by which each step multiplies the weights by -999
    done = call(command, tmp_path)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "1 of 2 jobs did not finish" in sentence
    assert "not finite" in sentence
    status = {record["values"]["optim.lr"]: record["status"] for record in journal(the_folder(tmp_path)).values()}
    assert status == {"1000": "failed", "0.001": "finished"}
    assert re.search(r"; 1 of 2 jobs done, \d+ s left\n", done.stdout) and "; 2 of 2 jobs done\n" in done.stdout


@pytest.mark.slow
def test_an_optuna_study_goes_on(sweep, tmp_path):
    pytest.importorskip("optuna")
    over = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.net.width": [4, 8]}
    command = [*sweep(search="optuna", over=over, trials=3), "logger=none", "callbacks.save.every_steps=5"]
    killed_when(command, tmp_path, lambda: len([*tmp_path.glob("runs/sweeps/*/*/checkpoints/last.ckpt")]) == 2)
    folder = the_folder(tmp_path)
    asked = {record["job"]: record["values"] for record in lines(folder)}
    assert list(asked) == ["trial-000", "trial-001"]
    done = call(command, tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "3 trials, 1 of them finished before" in done.stdout
    values = {job: record["values"] for job, record in journal(folder).items()}
    assert list(values) == ["trial-000", "trial-001", "trial-002"]
    assert {job: values[job] for job in asked} == asked
    assert len({tuple(given.values()) for given in values.values()}) == 3
    more = call(command, tmp_path, "sweep.trials=4", "sweep.batch=2")
    assert more.returncode == 0, more.stderr
    assert "4 trials, 3 of them finished before" in more.stdout
    assert len(list(csv.DictReader((folder / "summary.csv").open()))) == 4


@pytest.mark.slow
def test_jobs_run_side_by_side(sweep, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [*sweep(over={"seed": [0, 1]}), "logger=none", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    # a process of its own, for in a fork joblib's workers and the tracker they ask for wait for each other
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [record["status"] for record in lines(the_folder(tmp_path))] == [
        "started",
        "started",
        "finished",
        "finished",
    ]


BASIC = {"over": {"seed": [0, 1]}}
WRONG = {
    "there is no key optim.lrr, did you mean optim.lr?": {"over": {"optim.lrr": [1, 2]}},
    "max_steps=many must be a number": {"over": {"max_steps": [5, "many"]}},
    "sweep.search=grid must be one of basic, optuna": {**BASIC, "search": "grid"},
    "sweep.direction=minimise must be one of minimize, maximize, did you mean minimize?": {
        **BASIC,
        "direction": "minimise",
    },
    "sweep=tiny has a key metrics, did you mean metric?": {**BASIC, "metrics": "val/loss"},
    "sweep.over.seed=3 must be a list of values with sweep.search=basic": {"over": {"seed": 3}},
    "{low, high, log, step}": {"over": {"seed": {"low": 1}}, "search": "optuna"},
    "sweep.trials=0 must be a whole number, at least 1": {**BASIC, "trials": 0},
    "run_dir=here: a sweep names the folders": {**BASIC, "overrides": ["run_dir=here"]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_sweeps(sweep, tmp_path, refused, message):
    sweep(**WRONG[message])
    assert message in refused("train.py", "--config-dir", "conf", "-m", "sweep=tiny")


def test_wrong_commands(sweep, refused, tmp_path):
    sweep(**BASIC)
    assert "sweep=tiny names several runs: add -m" in refused("train.py", "--config-dir", "conf", "sweep=tiny")
    assert "no key sweep.trial, did you mean sweep.trials?" in refused(
        "train.py", "--config-dir", "conf", "-m", "sweep=tiny", "sweep.trial=3"
    )
    assert "no key model.net.widht, did you mean model.net.width?" in refused(
        "train.py", "--config-dir", "conf", "-m", "sweep=tiny", "model.net.widht=3"
    )
    assert "no key max_step, did you mean max_steps?" in refused("train.py", "-m", "seed=0,1", "max_step=3")
    assert "did you mean ddpm_digits_lr?" in refused("train.py", "-m", "sweep=ddpm_digit_lr")


@pytest.mark.slow
def test_a_metric_that_no_run_has_is_named_and_costs_no_second_run(sweep, tmp_path):
    command = [*sweep(over={"seed": [0]}, metric="val/los"), "logger=none"]
    done = call(command, tmp_path)
    assert done.returncode == 2
    assert "sweep.metric=val/los is not a metric of" in done.stderr
    assert "did you mean val/loss?" in done.stderr
    assert call(command, tmp_path, "sweep.metric=val/loss").returncode == 0
    assert len(lines(the_folder(tmp_path))) == 2


def test_a_torn_line_of_the_journal_counts_as_not_written(tmp_path):
    note(tmp_path, Job("a", [], {}), "finished")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"job": "b", "sta')
    assert list(journal(tmp_path)) == ["a"]


def test_values_are_written_as_hydra_reads_them():
    values = [1, 1e-5, "a b,c", None, True, [1, "x"], 1e30]
    assert list(map(literal, values)) == ["1", "1e-05", '"a b,c"', "null", "true", '[1,"x"]', "1e+30"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml")))
def test_the_sweeps_of_the_project_compose(name):
    cfg = compose_config("train", [f"sweep={name}", "sweep.trials=3"], prepare, sweep=True)
    settings = Settings(**OmegaConf.to_container(cfg.sweep))
    assert settings.name == name and settings.trials == 3
    firsts = {key: axis[0] if isinstance(axis, list) else axis["low"] for key, axis in settings.over.items()}
    compose_config("train", [*settings.overrides, *(f"{key}={literal(value)}" for key, value in firsts.items())])


def test_the_sweep_of_wandb_gives_arguments_that_compose():
    node = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    assert node["program"] == "train.py" and node["command"][-1] == "${args_no_hyphens}"
    values = {key: p.get("value", p.get("values", [p.get("min")])) for key, p in node["parameters"].items()}
    compose_config(
        "train", [f"{key}={value[-1] if isinstance(value, list) else value}" for key, value in values.items()]
    )


def test_a_sweep_node_is_refused_where_it_is_no_sweep():
    with pytest.raises(UserError, match="must be one of basic, optuna"):
        Settings("x", search="random")


COMPARABLE = {
    "seeds and rates": (["-m", "seed=0,1", "optim.lr=1e-3,1e-2"], None),
    "optimisers": (["-m", "optim=adam,adamw"], None),
    "networks": (["-m", "experiment=ddpm_toy2d", "model.net.width=8,16", "ema.decay=0.9,0.99"], None),
    "batches": (["-m", "data.batch_size=8,16"], None),
    "data still to say their shape": (["-m", "model=seq2seq", "model.net.encoder.width=24,32"], None),
    "no ranking": (["-m", "model=ddpm,edm", "sweep.metric=null"], None),
    "a card": (
        ["-m", "model=ddpm,edm", "sweep.metric=card/frechet", "callbacks.cards.every_steps=9"],
        None,
    ),
    "models": (["-m", "model=ddpm,edm"], r"sweep.metric=val/loss does not compare over model \(.*card/frechet"),
    "units": (["-m", "model.parameterization=eps,v"], "does not compare over model.parameterization,.*card/frechet"),
    "weights": (["-m", "model=vae", "model.beta=1,0.1"], "does not compare over model.beta,"),
    "schedules": (["-m", "model.schedule.steps=10,20", "seed=0,1"], "does not compare over model.schedule.steps,"),
    "recipes": (["-m", "experiment=ddpm_mnist,ddpm_toy2d"], "does not compare over data._target_"),
    "data": (["-m", "data=digits,mnist"], "does not compare over data "),
    "data of a card": (
        ["-m", "data=digits,mnist", "sweep.metric=card/frechet", "callbacks.cards.every_steps=9"],
        "card/frechet does not compare over data .* no common scale",
    ),
    "a card that nothing measures": (
        ["-m", "seed=0,1", "sweep.metric=card/frechet"],
        r"callbacks.cards, which is off: add callbacks.cards.every_steps= and callbacks.cards.metrics=\[frechet\]",
    ),
}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Run a sweep's command without starting its jobs; returns them."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        jobs = []
        sweeper = JournalSweeper()
        sweeper.config_dir = None
        sweeper.context = SimpleNamespace(config_loader=None)
        monkeypatch.setattr(JournalSweeper, "launch", lambda self, folder, metric, found: jobs.extend(found))
        sweeper.run([a for a in arguments if a != "-m"])
        return jobs

    monkeypatch.setattr("genai.sweeps.summarise", lambda *_: None)
    return run


@pytest.mark.parametrize("name", COMPARABLE)
def test_a_sweep_is_ranked_by_what_compares_or_is_refused_before_its_first_job(planned, name):
    arguments, refusal = COMPARABLE[name]
    if refusal is None:
        assert len(planned(*arguments)) in (2, 4)
    else:
        with pytest.raises(UserError, match=refusal):
            planned(*arguments)


def test_optuna_is_asked_for_no_losses_of_different_units(planned, tmp_path, refused, sweep):
    pytest.importorskip("optuna")
    over = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.parameterization": ["eps", "eps", "v", "eps"]}
    sweep(search="optuna", over=over)
    command = ["train.py", "--config-dir", "conf", "-m", "sweep=tiny"]
    assert "does not compare over model.parameterization," in refused(*command)
    sweep(search="optuna", over=BASIC["over"], metric=None)
    assert "sweep.metric=null ranks nothing" in refused(*command)


def test_folders_spell_signs_and_old_ones_keep_their_names(planned, tmp_path):
    jobs = planned("-m", "name=1e+30,1e-30,-1")
    names = [job.key.rpartition("_")[0] for job in jobs]
    assert names == ["name-1e30", "name-1e-30", "name-minus1"]
    (folder,) = tmp_path.glob("runs/sweeps/*")
    old = "name-1e-30_" + jobs[0].key.rpartition("_")[2]  # as it was called once
    note(folder, Job(old, [], {}), "failed")
    assert planned("-m", "name=1e+30,1e-30,-1")[0].key == old


def test_a_sweep_without_a_metric_is_listed_as_it_ran(tmp_path):
    for key in ("b", "a"):
        note(tmp_path, Job(key, [], {"seed": key}), "finished")
    rows = rank_jobs(tmp_path, Settings("x", metric=None))
    assert [row["job"] for row in rows] == ["b", "a"] and "val/loss" not in rows[0]
    summarise(tmp_path, Settings("x", metric=None), [])
    assert (tmp_path / "summary.csv").read_text().splitlines()[0] == "job,status,seed,reason"
