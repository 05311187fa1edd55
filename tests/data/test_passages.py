"""Passages of text and what they are of: cut between words, labelled by document, topic or speaker."""

import pytest
import torch

from genai.core.errors import UserError
from genai.data import passages
from tests.data.test_text import FACTS as OF_TEXT
from tests.data.test_text import text

FACTS = {"field": "tokens", "shape": [2], "classes": None, "levels": None, "source_levels": None, "batch_size": 4}
FACTS |= {"tokenizer": "byte", "vocab_size": None, "val": 0.1, "test": 0.1, "source_specials": True}
PLAY = (
    "First Citizen:\nSpeak, speak.\n\nALL:\nResolved. resolved.\n\nFirst Citizen:\nYou are all\nresolved?\n\nEXIT:\n\n"
)


def test_texts_are_cut_between_words():
    whole = "to be or  not\nto be, abcdefghijklmno that is a"
    assert passages.cut(whole, 8) == ["to be or", "not\nto", "be,", "that is", "a"]
    assert passages.cut("a bb c", 1) == ["a", "c"] and passages.cut(" \n", 5) == []
    assert all(len(one) <= 9 for one in passages.cut(whole, 9))


def everything(data):
    """(passage, label) of all splits, and the number of items of each."""
    found = []
    for part in data.splits.values():
        batch = part.batch(torch.arange(len(part)), None)
        labels = [data.modality.tokenizer.decode(row[1:2]) for row in batch["tokens"].tolist()]
        found += zip(data.conditions["source"].preview(batch), labels, strict=True)
    return found


def test_the_label_of_a_passage_is_its_topic():
    from pydoc_data.topics import topics

    data = passages.topics(3, 60, **FACTS)
    longest = sorted(topics, key=lambda name: -len(topics[name]))[:3]
    assert data.shape == [2] and data.levels == 4 and data.labels == 3 and data.source_levels == 260
    found = everything(data)
    assert {label for _, label in found} == {*longest} and len(found) > 1000
    assert all(passage in topics[label] for passage, label in found)
    batch = data.splits["val"].batch(torch.arange(3), None)
    ends = (batch["source"] >= 0).sum(1) - 1
    assert (batch["source"].gather(1, ends[:, None]) == 258).all(), "[SEP]"


def test_the_label_of_a_passage_is_its_speaker_and_characters_are_those_of_the_whole_play(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY * 20 + "\n#")
    data = passages.speakers(str(tmp_path / "play.txt"), None, 2, 20, **{**FACTS, "tokenizer": "char", "val": 0.3})
    assert {*everything(data)} == {
        ("Speak, speak.", "First_Citizen"),
        ("Resolved. resolved.", "ALL"),
        ("You are all", "First_Citizen"),
        ("resolved?", "First_Citizen"),
    }
    facts = {**OF_TEXT, "tokenizer": "char", "specials": True, "cache": str(tmp_path / "cache")}
    whole = text.text_file(path=str(tmp_path / "play.txt"), **facts)
    own = data.conditions["source"].tokenizer
    assert own.inner.state() == whole.tokenizer.inner.state() and own.vocab_size == whole.levels
    with pytest.raises(UserError, match=r"has 2 speakers: give fewer than data\.n=3"):
        passages.speakers(str(tmp_path / "play.txt"), None, 3, 20, **FACTS)


def test_the_label_of_a_passage_is_its_file(tmp_path):
    for name in ("one a", "two"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name[:3]}{i}" for i in range(200)))
    found = everything(passages.passages(str(tmp_path), "*.txt", 30, **FACTS))
    assert {label for _, label in found} == {"one_a", "two"}
    assert all(passage[:3] == label[:3] for passage, label in found)
    with pytest.raises(UserError, match="has 1 files of text"):
        passages.passages(str(tmp_path), "t*.txt", 30, **FACTS)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt cannot be read .it is not UTF-8.: set data\.path"):
        passages.passages(str(tmp_path), "*.txt", 30, **FACTS)


def test_sources_with_specials_need_a_tokenizer_of_their_own():
    from genai.data.pairs import Pairs

    with pytest.raises(UserError, match=r"set data\.target_tokenizer"):
        Pairs([(c, "b") for c in "abcdefghi"], target_tokenizer=None, target_vocab_size=None, longest=9, **FACTS)
