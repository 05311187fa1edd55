"""--dry-run: what would run, measured, and nothing written; the same summary opens a run."""

import re
import signal
from pathlib import Path
from statistics import median

import pytest

import genai
from genai.checkpoint.build import build_typed
from genai.core import metrics_csv
from genai.core.errors import UserError
from genai.train.dry_run import layers, tabulate
from genai.train.run import dry_run
from tests.test_configs import CASES, config_of

TINY = ["debug=true", "sampler.steps=2", "callbacks.samples.n=2"]


def measured(text):
    """(GiB, seconds a step) that a dry run printed."""
    return tuple(float(re.search(rf"^{name} +([\d.e-]+) ", text, re.MULTILINE)[1]) for name in ("memory", "time"))


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    dry_run(genai.compose([*TINY, "logger=wandb", "run_dir=here"]))
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler
    parameters = re.search(r"model +DDPM, ([\d,]+) parameters", text)[1]
    assert re.search(rf"^net +UNet +\(2, 1, 8, 8\) +{parameters}$", text, re.MULTILINE)
    assert re.search(r"^  down +3 x Stage +\(2, 64, 4, 4\) +[\d,]+$", text, re.MULTILINE)
    assert re.search(r"^data +image \(1, 8, 8\), 10 classes: 1,293 train, 144 val, 360 test items$", text, re.MULTILINE)
    assert "optimiser  AdamW, lr 0.00" in text
    assert "5 steps of 8 items" in text
    gib, seconds = measured(text)
    assert gib > 0.1 and seconds > 0
    genai.train([*TINY, "logger=none", "run_dir=here"])
    opening = capsys.readouterr().out
    for line in text.splitlines():
        if line.startswith(("model ", "data ", "optimiser ", "training ")):
            assert line in opening.splitlines()


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, monkeypatch, refused, command):
    with pytest.raises(UserError, match="measures a new run"):
        cfg = genai.compose(TINY)
        cfg.resume = "x"
        dry_run(cfg)
    assert "--dry-run is for one run" in refused("train.py", "--dry-run", "-m", "seed=0,1")
    assert "did you mean max_steps?" in refused("train.py", "--dry-run", "max_step=3")


def test_every_part_of_a_chain_of_optimisers_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dry_run(genai.compose(["model=gpt_nano", "optim=muon", "data=digits_pixels", "debug=true", "logger=none"]))
    assert re.search(r"^optimiser  Muon, lr [\d.e-]+ and AdamW, lr [\d.e-]+$", capsys.readouterr().out, re.MULTILINE)


def test_both_networks_of_a_gan_are_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = genai.compose(["model=dcgan", "data=digits", "debug=true", "logger=none"])
    dry_run(cfg)
    text = capsys.readouterr().out
    assert re.search(r"^generator +\w+ +\(2, 1, 8, 8\)", text, re.MULTILINE)
    assert re.search(r"^discriminator +\w+ +\(2", text, re.MULTILINE)
    rates = cfg.optim.lr, cfg.discriminator_optim.lr
    assert re.search(r"^optimiser  \w+, lr {:g} and \w+, lr {:g}$".format(*rates), text, re.MULTILINE), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("model=")])
def test_every_model_has_a_table_of_layers(case):
    model = build_typed(config_of(case)["model"])
    rows = layers(model, {})
    assert rows and len(tabulate(rows).splitlines()) == len(rows) + 1
    shown = sum(count for name, _, _, count in rows if not name.startswith(" "))
    assert shown + sum(p.numel() for p in model.parameters(recurse=False)) >= sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["model=ddpm", "data=digits", "data.batch_size=16"],
        ["model=gpt_nano", "data=python_docs", "data.batch_size=8"],
        ["model=dcgan", "data=digits"],
    ],
    ids=lambda overrides: overrides[0].removeprefix("model="),
)
def test_memory_and_time_of_a_dry_run_are_those_of_the_run(overrides, tmp_path, command):
    """Each in a process of its own, for the peak of the resident set is of a process. Dry runs and runs take turns until the
    least of each agree, for another process on the machine only adds time."""
    given = [*overrides, "logger=none", "max_steps=24", "log_every_steps=4", "callbacks.samples.n=4"]
    dry, real = [], []  # (GiB, seconds a step)
    for attempt in range(4):
        done = command("train.py", "--dry-run", *given, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        dry.append(measured(done.stdout))
        folder = tmp_path / f"run{attempt}"
        done = command("train.py", *given, f"run_dir={folder}", cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        rows = [*metrics_csv.rows(Path(folder) / "metrics.csv")]
        rate = median(row.value for row in rows if row.name == "perf/steps_per_second")
        real.append((max(row.value for row in rows if row.name == "perf/peak_memory_bytes") / 2**30, 1 / rate))
        least = [[min(column) for column in zip(*found, strict=True)] for found in (dry, real)]
        print(overrides[0], "GiB and seconds a step: dry run", dry[-1], "run", real[-1])
        ratios = [one / other for one, other in zip(*least, strict=True)]
        if all(1 / 1.3 < ratio < 1.3 for ratio in ratios):
            return
    raise AssertionError(f"dry run over run: memory {ratios[0]:.2f}, time {ratios[1]:.2f}")
