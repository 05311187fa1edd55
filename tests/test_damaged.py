"""A damaged line, card or cache is named once, and stops nothing."""

import errno
import json
import os

import pytest
import torch
from omegaconf import OmegaConf

from genai import checkpoint
from genai.checkpoint.build import build_typed
from genai.cli import compose_config
from genai.compare import runs
from genai.core import archive, metrics_csv
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.evaluation import classifier
from genai.evaluation.baselines import reference
from genai.evaluation.metrics import standard_metrics
from genai.sweeps import jobs
from genai.train.record import Record

BITS = {"bits_per_dim": standard_metrics()["bits_per_dim"]}
GOOD = b"step,name,value\n1,train/loss,0.5\n2,train/loss,nan\n"
DAMAGED = b"\xff\xfe\x00garbage\n3,train/loss\n4,val/loss,0.1,9\nx,val/loss,1\n5,val/loss,\n\n"


@pytest.fixture
def damaged(tmp_path):
    """A run directory with six damaged lines of metrics.csv, a torn card and a card of another kind."""
    (tmp_path / "cards").mkdir()
    (tmp_path / "metrics.csv").write_bytes(GOOD + DAMAGED + b"6,val/loss,0.25\n7,val/lo")
    (tmp_path / "config.yaml").write_text("model: {_target_: a.B}\ndata: {_target_: a.C}\n")
    card = {"metric": "recall", "value": 0.5, "protocol": {"n": 2}, "better": "higher"}
    (tmp_path / "cards" / "recall.json").write_text(json.dumps(card))
    (tmp_path / "cards" / "kid.json").write_text('{"metric": "kid", "va')
    (tmp_path / "cards" / "frechet.json").write_text('["metric"]')
    return tmp_path


def test_damaged_lines_are_left_out_with_one_warning(damaged, capsys):
    found = metrics_csv.rows(damaged / "metrics.csv")
    assert [row.line for row in found] == ["1,train/loss,0.5\n", "2,train/loss,nan\n", "6,val/loss,0.25\n"]
    assert capsys.readouterr().out == (
        f"warning: {damaged / 'metrics.csv'}: damaged lines are left out: 6, the first is line 4\n"
    )
    assert jobs.last_values(damaged)["val/loss"] == 0.25


def test_a_resumed_run_keeps_the_good_lines(damaged):
    Record(damaged).cut(2)
    assert (damaged / "metrics.csv").read_bytes() == GOOD
    Record(damaged).cut(None)
    assert (damaged / "metrics.csv").read_text() == metrics_csv.HEAD


def test_runs_are_compared_without_their_damaged_parts(damaged, capsys):
    run = runs.read(damaged)
    assert list(run.cards) == ["recall"] and run.curves["val/loss"] == [(6, 0.25)]
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 3 and f"{damaged / 'cards' / 'kid.json'} is damaged" in printed


def test_a_torn_journal_line_counts_as_not_written(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(
        b'{"job": "a", "status": "finished"}\n\xff\n[1]\n{"status": 1}\n{"job": "b"'
    )
    assert jobs.journal(tmp_path) == {"a": {"job": "a", "status": "finished"}}


def test_damaged_caches_are_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifier.Classifier, "steps", 3)
    node = OmegaConf.to_container(compose_config("train", ["data=digits"]).data, resolve=True)
    data = build_typed(node)
    first = classifier.load_or_train(data)
    (path,) = cache_folder("classifier").iterdir()
    for content in (path.read_bytes()[:-50], b"", json.dumps([1]).encode()):
        path.write_bytes(content)
        torch.manual_seed(1)
        again = classifier.load_or_train(data)
        assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
        assert "is damaged" in capsys.readouterr().out
    assert classifier.load_or_train(data) and "damaged" not in capsys.readouterr().out
    figures = reference.reference_scores(data, BITS, "val", 20)
    for content in ('{"bits_per', "[1]", '{"bits_per_dim": null}', "\0"):
        for path in cache_folder("baselines").iterdir():
            path.write_text(content)
        assert reference.reference_scores(data, BITS, "val", 20) == figures
        assert "is damaged" in capsys.readouterr().out


def test_a_full_disk_stops_a_record_and_a_save_with_a_sentence(tmp_path, monkeypatch):
    record = Record(tmp_path)
    record.cut(None)
    content = {"model": {"w": torch.zeros(9)}, "ema": {}, "step": 1}
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.save(content, path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_in_torch(content, file):
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 768 vs 662")

    for target, broken in ((torch, full_in_torch), (os, full)):
        with monkeypatch.context() as patch:
            patch.setattr(target, "save" if target is torch else "fsync", broken)
            with pytest.raises(UserError, match=r"last\.ckpt cannot be written \(No space left on device\): make room"):
                checkpoint.save({**content, "step": 2}, path)
        assert archive.read(path)["step"] == 1
        assert os.listdir(path.parent) == ["last.ckpt"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        checkpoint.link(path, "best.ckpt")  # a copy, as where there are no hard links
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"step_1\.ckpt cannot be written"):
            checkpoint.link(path, "step_1.ckpt")
    assert sorted(os.listdir(path.parent)) == ["best.ckpt", "last.ckpt"]
    record.csv.unlink()
    record.csv.mkdir()
    with pytest.raises(UserError, match=r"metrics\.csv cannot be written \(Is a directory\): make room"):
        record.log(1, {"a": 1.0})
