"""Files are whole or absent, on a full disk too, and no symbolic link is written through."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest

from genai.core import files
from genai.core.errors import UserError


def test_a_link_is_replaced_and_what_it_pointed_to_stays(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "card.json").symlink_to(tmp_path / "victim")
    files.write_text(tmp_path / "card.json", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "card.json").read_text() == "new" and not (tmp_path / "card.json").is_symlink()


def test_a_folder_that_leads_out_of_the_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "cards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cards leads out of .*run by a symbolic link"):
        files.write_text(tmp_path / "run" / "cards" / "frechet.json", "{}", within=tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "alias").symlink_to(tmp_path / "run")  # the run itself may be named by a link
    files.write_text(tmp_path / "alias" / "grids" / "x", "1", within=tmp_path / "alias")


def test_a_run_whose_folders_lead_elsewhere_is_not_gone_on_with(tmp_path):
    from genai.train.lock import lock_run

    for name in ("checkpoints", "samples", "cards", "wandb"):
        victim, run = tmp_path / f"victim {name}", tmp_path / f"run {name}"
        victim.mkdir()
        (victim / ".last.ckpt.1.tmp").write_text("mine")
        run.mkdir()
        (run / name).symlink_to(victim)
        with pytest.raises(UserError, match=rf"{name} leads out of .* by a symbolic link"), lock_run(run):
            pass
        assert (victim / ".last.ckpt.1.tmp").read_text() == "mine"


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a cannot be written \(No space left on device\): try out="):
        files.write_text(tmp_path / "a", "new", hint="try out=")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


FLAT = ["extractor=module", "extractor.net={_target_: torch.nn.Flatten}"]  # no classifier to train


def used(folder):
    """Go on with a run, evaluate it and sample from it, as its new owner does."""
    from genai import sampling
    from genai.cli import compose_config, prepare_sampling, prepare_training
    from genai.evaluation.run import run as evaluate
    from genai.train.run import run

    run(compose_config("train", [f"resume={folder}", "max_steps=7"], prepare_training))
    ckpt = [f"ckpt={folder}", "device=cpu"]
    evaluate(
        compose_config(
            "evaluate", [*ckpt, "metrics=[frechet]", "n=20", "repeats=1", "baselines=false", "split=val", *FLAT]
        )
    )
    evaluate(
        compose_config("evaluate", [*ckpt, "n=4", "split=val", "likelihood=probability_flow", "likelihood.steps=1"])
    )
    sampling.run(compose_config("sample", [*ckpt, "n=2", "steps=1"], prepare_sampling))


def test_no_link_in_a_run_from_elsewhere_is_written_through(tmp_path):
    """Every file that going on, evaluating and sampling write is planted as a link to somebody's file, and so are temporary names
    that could be guessed; all of these files stay as they are."""
    from genai.cli import compose_config
    from genai.train.run import run
    from tests.checkpoint.test_checkpoint import DEBUG

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    given = ["optim.decay_steps=null", "callbacks.samples.n=2", "logger=none"]
    run(compose_config("train", [*DEBUG, *given, f"run_dir={theirs}"]))
    shutil.copytree(theirs, ours)
    needed = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    used(ours)
    written = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    planted = (written - {p for p in needed if p.name in ("config.yaml", "last.ckpt", "metrics.csv")}) | {
        Path(name)
        for name in (".config.yaml.tmp", "metrics.tmp", f"checkpoints/.last.ckpt.{os.getpid()}.tmp", "git.diff")
    }
    assert len(planted) > 8
    for i, name in enumerate(sorted(planted)):
        (tmp_path / f"victim{i}").write_text("mine")
        (theirs / name).unlink(missing_ok=True)
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).symlink_to(tmp_path / f"victim{i}")
    with contextlib.suppress(UserError):
        used(theirs)
    for i, name in enumerate(sorted(planted)):
        assert (tmp_path / f"victim{i}").read_text() == "mine", name
    assert not (theirs / "git.diff").is_symlink()  # it did go on
