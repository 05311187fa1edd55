"""Files are whole or absent, on a full disk too, and no symbolic link is written through."""

import errno
import os

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


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a cannot be written \(No space left on device\): try out="):
        files.write_text(tmp_path / "a", "new", hint="try out=")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
