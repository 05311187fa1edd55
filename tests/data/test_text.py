"""Text: tokenizers, prepared streams, windows, and the way from a file on disk to samples and bits per character."""

import io
import itertools
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import genai
from genai import sampling
from genai.cli import compose_config, prepare_sampling, quote_override
from genai.core.errors import UserError
from genai.data import text, text_sources, token_files
from genai.data.stream import batches, train_loader
from genai.evaluation.run import run as evaluate
from genai.modalities import tokenizers
from genai.modalities.text import encode_prompts
from genai.sampling import run as sampled
from genai.sampling import unescape
from tests.conftest import ROOT

PROSE = "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich; 東京 🙂\n" * 40
FACTS = {
    "tokenizer": "byte",
    "vocab_size": None,
    "val": 0.1,
    "test": 0.1,
    "overlap": 0,
    "field": "tokens",
    "shape": [16],
    "classes": None,
    "levels": None,
    "batch_size": 4,
}


@pytest.fixture
def make(tmp_path):
    """A Text of a file with this content: make("...", tokenizer="char")."""

    def data(content, kind=text.text_file, **facts):
        path = tmp_path / "text.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return kind(path=str(path), **{**FACTS, "cache": str(tmp_path / "cache"), **facts})

    return data


def stream(split):
    """All tokens of a split, put together from its windows."""
    parts = [b["tokens"][b["mask"]] for b in batches(split, 3)]
    first = next(iter(batches(split, 3)))["tokens"][0, :1]
    return torch.cat([first, *parts])


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_tokenizers_round_trip_and_are_plain_values(kind, end):
    size = 300 if kind == "bpe" else None
    made = tokenizers.learn(kind, iter([PROSE]), len(PROSE), size, end)
    again = tokenizers.from_state(json.loads(json.dumps(made.state())))
    for tokenizer in (made, again):
        ids = tokenizer.encode(PROSE)
        assert tokenizer.decode(ids.tolist()) == PROSE
        assert ids.max() < tokenizer.vocab_size - end
        assert tokenizer.end == (tokenizer.vocab_size - 1 if end else None)
        if end:
            assert tokenizer.decode([*ids[:3].tolist(), tokenizer.end]) == tokenizer.decode(ids[:3].tolist())
    if kind == "bpe":
        assert made.vocab_size == 300 and len(made.encode(PROSE)) < len(PROSE.encode()) * 0.6
    if kind != "char":
        assert made.decode(made.encode("Ωmega").tolist()) == "Ωmega"  # bytes lack nothing


@pytest.mark.parametrize("chosen", [None, "false", "true"])
@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "published"])
def test_many_texts_are_encoded_at_once_as_one_by_one(kind, chosen, monkeypatch):
    """Whatever the user's environment says of threads, which stays as it is."""
    monkeypatch.delenv(tokenizers.PARALLEL, raising=False)
    if chosen is not None:
        monkeypatch.setenv(tokenizers.PARALLEL, chosen)
    bpe = kind in ("bpe", "published")
    made = tokenizers.learn("bpe" if bpe else kind, iter([PROSE]), len(PROSE), 300 if bpe else None, True)
    made = tokenizers.Published(made.state()["spec"], "", True) if kind == "published" else made
    texts = ["", "Zw", PROSE, *PROSE.split(" ")]
    for ids, one in zip(made.encode_all(texts), texts, strict=True):
        assert np.array_equal(ids, made.encode(one)) and made.decode(ids.tolist()) == one
    if bpe:
        assert os.environ[tokenizers.PARALLEL] == (chosen or tokenizers.ONE_THREAD)
        with pytest.raises(UserError, match=r"'a\\udc80' contains bytes that are not UTF-8"):
            made.encode_all(["b", "a\udc80"])


@pytest.mark.parametrize("kind", [text.lines, text.text_file])
def test_groups_of_pieces_change_nothing(make, monkeypatch, tmp_path, kind):
    contents = []
    for k, size in enumerate((1, 300, 10**9)):
        monkeypatch.setattr(token_files, "GROUP", size)
        data = make(PROSE, kind, tokenizer="bpe", vocab_size=300, cache=str(tmp_path / f"cache{k}"))
        path = data.splits["train"].path
        contents.append((path.parent.name, path.read_bytes(), data.splits["train"].characters))
    assert contents[0] == contents[1] == contents[2] and len(contents[0][1]) > 1000


def test_merges_of_unbroken_text_take_time_as_it_grows():
    """Of DNA and of Chinese without punctuation 8 s for 200 KB once; encoding likewise."""
    draw = random.Random(0)
    for unbroken in (
        "".join(draw.choices("ACGT", k=200_000)),
        "".join(chr(0x4E00 + draw.randrange(900)) for _ in range(60_000)),
    ):
        start = time.process_time()
        tokenizer = tokenizers.BPE.learn([unbroken], 600)
        ids = tokenizer.encode(unbroken)
        assert time.process_time() - start < 5
        assert tokenizer.decode(ids.tolist()) == unbroken and len(ids) < len(unbroken.encode()) * 0.6
        assert json.loads(tokenizer.spec)["pre_tokenizer"]["type"] == "ByteLevel"


def test_merges_of_ordinary_text_are_the_librarys():
    """Of text with words, as byte-level BPE of the library itself learns them."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    prose = "".join(topics.values())[:60_000]
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator(
        [prose], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    assert tokenizers.BPE.learn([prose], 500).spec == theirs.to_str()


def test_a_prompts_lead_is_what_nobody_wrote():
    ends, none = tokenizers.Byte(end=True), tokenizers.Byte()
    assert encode_prompts(ends, ["", "ab"])["lead"].tolist() == [1, 1]
    assert encode_prompts(none, ["", "ab"])["lead"].tolist() == [1, 0]
    assert encode_prompts(tokenizers.Char("ab"), [""])["lead"].tolist() == [1]


def test_a_character_that_is_lacking_is_named():
    tokenizer = tokenizers.Char.learn(["abc\n"])
    assert tokenizer.state()["chars"] == "\nabc"
    with pytest.raises(UserError, match=r"the character 'é' \(U\+00E9\) is not among the 4"):
        tokenizer.encode("cabé")


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_splits_are_the_text(make, kind):
    """Whatever the tokenizer, the splits are the same parts of the text, cut between characters."""
    data = make(PROSE, tokenizer=kind, vocab_size=300 if kind == "bpe" else None)
    parts = [data.tokenizer.decode(np.fromfile(s.path, s.dtype).tolist()) for s in data.splits.values()]
    assert "".join(parts) == PROSE
    assert [s.characters for s in data.splits.values()] == [len(part) for part in parts]
    raw = PROSE.encode()
    assert 0 <= len(parts[0].encode()) - int(0.8 * len(raw)) <= 3
    assert data.levels == data.tokenizer.vocab_size and data.shape == [16]


@pytest.mark.parametrize("overlap", [0, 5, 15])
def test_evaluation_predicts_every_token_once(make, overlap):
    split = make(PROSE, overlap=overlap).splits["val"]
    assert stream(split).tolist() == np.fromfile(split.path, np.uint8).tolist()
    for i, batch in enumerate(batches(split, 1)):
        assert batch["tokens"].shape == (1, 17)
        if i > 0:  # each target has the stated context at least
            assert batch["mask"][0].int().argmax() > overlap


def test_training_windows_are_parts_of_the_text_that_move_and_cover_it(make):
    split = make(PROSE).splits["train"]
    whole = bytes(np.fromfile(split.path, np.uint8))
    data = make(PROSE)
    seen, epochs = torch.zeros(len(whole)), 6
    loader = iter(train_loader(data, 1, seed=0, start=0))
    starts = set()
    for _ in range(epochs * len(split) // 4):
        for row in next(loader)[0]["tokens"]:
            at = whole.find(bytes(row.tolist()))
            assert at >= 0 and len(row) == 17
            starts.add(at % 16)
            seen[at : at + 17] += 1
    assert len(starts) == 16
    resumed = next(iter(train_loader(data, 1, seed=0, start=3)))[0]["tokens"]
    straight = iter(train_loader(data, 1, seed=0, start=0))
    assert torch.equal([next(straight) for _ in range(4)][3][0]["tokens"], resumed)


def test_two_workers_give_the_same_stream(make):
    one, two = make(PROSE), make(PROSE, num_workers=2)
    a, b = (iter(train_loader(data, 2, seed=0, start=5)) for data in (one, two))
    for _ in range(3):
        for x, y in zip(next(a), next(b), strict=True):
            assert torch.equal(x["tokens"], y["tokens"])


def test_lines_are_documents_drawn_into_splits(make):
    names = [f"name{i:03d}" for i in range(400)]
    data = make("\n".join(names) + "\r\n\n", text.lines, shape=[8])
    found = []
    for split in data.splits.values():
        tokens = np.fromfile(split.path, split.dtype).tolist()
        assert tokens[-1] == 256
        found.append(bytes(t if t < 256 else 10 for t in tokens).decode().split())
    assert sorted(name for part in found for name in part) == names
    assert 20 < len(found[1]) < 60 and found[0] != names[: len(found[0])]
    start = data.cond(2)
    assert start["tokens"].tolist() == [[256], [256]] and start["stop"].tolist() == [256, 256]


def test_documents_apart_are_numbered_in_each_window(make):
    """An end is context of the next document; evaluation predicts every token once as ever, and the ids are the same."""
    content = "\n".join("ab" * (i % 7) + "c" for i in range(400))
    plain, apart = (make(content, text.lines, separate=separate) for separate in (False, True))
    assert apart.splits["val"].path == plain.splits["val"].path, "the same prepared text"
    for name in ("train", "val"):
        index = torch.arange(len(plain.splits[name]))
        draws = torch.full((len(index), 4), 0.3) if name == "train" else None
        ours, theirs = apart.splits[name].batch(index, draws), plain.splits[name].batch(index, draws)
        assert "document" not in theirs and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        for row, numbers in zip(ours["tokens"].tolist(), ours["document"].tolist(), strict=True):
            assert numbers == [row[: i + 1].count(256) for i in range(len(row))]
    with pytest.raises(
        UserError, match=r"data.separate=true is for a text of documents: leave it out, or choose data=lines"
    ):
        make(content, separate=True)


def test_a_folder_is_its_files_each_a_document(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first " * 30)
    (tmp_path / "b" / "c.txt").write_text("second " * 30)
    (tmp_path / "b" / "ignored.md").write_text("no")
    data = text.text_folder(path=str(tmp_path), pattern="*.txt", cache=str(tmp_path / "cache"), **FACTS)
    tokens = np.concatenate([np.fromfile(s.path, s.dtype) for s in data.splits.values()]).tolist()
    assert bytes(t if t < 256 else 0 for t in tokens) == b"first " * 30 + b"\0" + b"second " * 30 + b"\0"
    assert data.splits["train"].dtype == np.uint16
    (tmp_path / "b" / "c.txt").unlink()  # one file as a text and as a folder of documents are not the same ids
    one = text.text_file(path=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache"), **FACTS)
    folder = text.text_folder(path=str(tmp_path), pattern="*.txt", cache=str(tmp_path / "cache"), **FACTS)
    assert (one.levels, folder.levels) == (256, 257)


@pytest.mark.parametrize("content", ["日本語", "aé", "x"])
def test_a_cut_in_the_last_character_moves_to_the_end(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    source = text_sources.TextFiles([tmp_path / "a.txt"], documents=True)
    for k in range(1, 12):
        parts = [piece for a, b in ((0, k / 12), (k / 12, 1)) for piece, _ in source.pieces(a, b)]
        assert "".join(parts) == content


def test_pieces_are_cut_where_nothing_breaks(make, monkeypatch):
    whole = make(PROSE, tokenizer="bpe", vocab_size=280)
    monkeypatch.setattr(text_sources, "PIECE_BYTES", 37)
    pieces = text_sources.TextFiles([whole.splits["train"].path.parents[2] / "text.txt"], False)
    assert "".join(piece for piece, _ in pieces.pieces(0, 1)) == PROSE
    assert "".join(p for a, b in ((0, 0.313), (0.313, 0.77), (0.77, 1)) for p, _ in pieces.pieces(a, b)) == PROSE


def test_a_cut_inside_a_character_of_any_length_moves(tmp_path):
    """Files of emoji alone and of chat, 240 of them: none is refused, no character lost or doubled."""
    draw, chat = random.Random(0), "okay so haha 😀👍🏽🎉 naïve 東京\n"
    for i in range(240):
        content = "".join(draw.choices("😀🎉🦀👍" if i < 40 else chat, k=draw.randrange(100, 200)))
        (tmp_path / "a.txt").write_text(content)
        cuts = [0.0, *sorted(draw.random() for _ in range(4)), 1.0]
        source = text_sources.TextFiles([tmp_path / "a.txt"], documents=False)
        parts = ["".join(piece for piece, _ in source.pieces(*ends)) for ends in itertools.pairwise(cuts)]
        assert "".join(parts) == content
        for part, last in zip(itertools.accumulate(parts), cuts[1:], strict=True):
            assert 0 <= len(part.encode()) - int(len(content.encode()) * last) <= 3


def test_a_file_that_shrinks_while_it_is_read_ends_in_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    path.write_text("line\n" * 1000)
    source = text_sources.TextFiles([path], documents=False)
    monkeypatch.setattr(text_sources, "PIECE_BYTES", 1000)
    pieces = source.pieces(0, 1)
    next(pieces)
    path.write_text("line\n" * 300)
    with pytest.raises(UserError, match=r"log.txt became shorter while it was read"):
        [None for _, _ in zip(range(1000), pieces, strict=False)]
    path.unlink()
    with pytest.raises(UserError, match=r"log.txt cannot be read \(No such file"):
        list(source.pieces(0, 1))


@pytest.mark.parametrize("damage", ["cut", "cut with its end", "emptied", "meta", "gone"])
def test_a_damaged_preparation_is_made_anew(make, damage, capsys):
    before = make(PROSE, tokenizer="char")
    path, folder = before.splits["train"].path, before.splits["train"].path.parent
    whole = path.read_bytes()
    if damage.startswith("cut"):
        os.truncate(path, len(whole) // 2 + (damage == "cut"))
    elif damage == "gone":
        path.unlink()
    else:
        os.truncate(path if damage == "emptied" else folder / "meta.json", 0)
    again = make(PROSE, tokenizer="char").splits["train"]
    assert again.path.read_bytes() == whole and again.path.parent == folder
    assert "is damaged: its text is prepared again" in capsys.readouterr().err
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_preparation_of_before_its_size_was_noted_is_used_as_it_is(make, capsys):
    split = make(PROSE).splits["train"]
    meta = json.loads((split.path.parent / "meta.json").read_text())
    del meta["bytes"]
    (split.path.parent / "meta.json").write_text(json.dumps(meta))
    before = split.path.stat().st_mtime_ns
    assert make(PROSE).splits["train"].path.stat().st_mtime_ns == before and "damaged" not in capsys.readouterr().err


def draw_after_a_cut(path, answers):
    split = token_files.Windows(path, "uint8", 0, 16, 0, False)
    fresh, last = token_files.Windows(path, "uint8", 0, 16, 0, False), torch.tensor([len(split) - 1])
    split.batch(last, None)
    os.truncate(path, 5000)
    for part in (split, fresh):  # mapped before, and after
        try:
            answers.put(part.batch(last, None))
        except UserError as error:
            answers.put(str(error))


def test_a_preparation_cut_short_while_it_is_in_use_ends_in_a_sentence(tmp_path):
    """In a process of its own, which a memory map would kill."""
    (tmp_path / "train.bin").write_bytes(b"x" * 100_000)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=draw_after_a_cut, args=(tmp_path / "train.bin", answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert all("train.bin was cut short while it was in use" in answers.get(timeout=60) for _ in range(2))


def folder_of_texts(root):
    """a.txt, b/c.txt, files that tools leave there, and links: up, above, to a folder elsewhere, twice, and to a file."""
    for name in ("a", "b/c", "b/._c", ".git/d", ".ipynb_checkpoints/a-checkpoint", "b/.e/f/g"):
        path = root / "texts" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name} " * 30)
    (root / "elsewhere" / "deep").mkdir(parents=True)
    (root / "elsewhere" / "deep" / "h.txt").write_text("this is h " * 30)
    (root / "sibling.txt").write_text("this is a sibling " * 30)
    for name, target in {
        "b/up": "../../texts",
        "b/above": "../..",
        "x": "../elsewhere",
        "y": "../elsewhere/deep",
        ".z": "../elsewhere",
    }.items():
        (root / "texts" / name).symlink_to(target, target_is_directory=True)
    (root / "texts" / "0.txt").symlink_to("b/c.txt")
    return root / "texts"


def words_of(data):
    tokens = np.concatenate([np.fromfile(s.path, s.dtype) for s in data.splits.values()])
    documents = bytes(np.where(tokens < 256, tokens, 0).astype(np.uint8)).decode().split("\0")
    return [document.split()[2] for document in documents if document]


def test_a_folder_gives_each_file_once_and_nothing_hidden(tmp_path, capsys):
    root = folder_of_texts(tmp_path)
    given = {"path": str(root), "pattern": "*.txt", "cache": str(tmp_path / "cache"), **FACTS}
    data = text.text_folder(hidden=False, links=True, **given)
    assert words_of(data) == ["a", "b/c", "h"]
    assert "skipped 4 hidden files" in capsys.readouterr().err
    assert sorted(words_of(text.text_folder(hidden=True, links=True, **given))) == sorted(
        ["a", "b/c", "b/._c", ".git/d", ".ipynb_checkpoints/a-checkpoint", "b/.e/f/g", "h"]
    )
    # what a run says that was begun before there was the choice
    assert sorted(words_of(text.text_folder(**given))) == sorted(
        ["a", "b/c", "b/c", "b/._c", ".git/d", ".ipynb_checkpoints/a-checkpoint", "b/.e/f/g"]
    )
    conf = compose_config("baselines", ["data=text_folder"]).data
    assert (conf.hidden, conf.links) == (False, True)
    with pytest.raises(UserError, match=r"holds no text .* but 1 hidden files of .*, which data.hidden=true takes"):
        text.text_folder(hidden=False, links=True, **{**given, "path": str(root / "b" / ".e" / ".."), "pattern": "._*"})


def test_files_with_copies_in_other_splits_are_counted(tmp_path, capsys):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i % 11:02d} is the text " * 20)
    given = {"pattern": "*.txt", "cache": str(tmp_path / "cache"), **FACTS}
    text.text_folder(path=str(tmp_path), **given)
    # train ends after 16 files, val after 18: 05 = 16, 06 = 17, 07 = 18, 08 = 19 lie apart, 00 = 11 and others do not
    said = capsys.readouterr().err
    assert (
        said
        == f"8 files of {tmp_path} have exact copies in other splits, such as {tmp_path}/05.txt and {tmp_path}/16.txt\n"
    )
    for i in range(11, 20):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i:02d} is the text " * 20)
    text.text_folder(path=str(tmp_path), **given)
    assert capsys.readouterr().err == ""


ODD = {
    "bom": (b"\xef\xbb\xbf" + PROSE.encode(), PROSE),
    "crlf": (PROSE.replace("\n", "\r\n").encode(), PROSE.replace("\n", "\r\n")),
    "latin-1": ("Straße\n".encode("latin-1") * 99, "is not UTF-8: byte 0xdf at offset 4"),
    "utf-16": (PROSE.encode("utf-16"), "is not UTF-8: byte 0xff at offset 0"),
    "utf-16 without its mark": ("ascii\n".encode("utf-16-le") * 99, "594 NUL bytes, as UTF-16 and binary files do"),
    "continuation bytes": (b"x" + b"\x80" * 999, "is not UTF-8: byte 0x80 at offset 1"),
    "a surrogate": (b"\xed\xa0\x80" * 99, "is not UTF-8: byte 0xed at offset 0"),
    "half a character": ("東".encode() * 99 + b"\xe6\x9d", "is not UTF-8: byte 0xe6 at offset 297"),
    "nothing": (b"", "is empty"),
    "one byte": (b"x", "too few for one window"),
    "one character": ("😀".encode(), "too few for one window"),
    "one line break": (b"\n", "too few for one window"),
}


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_or_refused_in_a_sentence(make, name, tokenizer, capsys):
    content, expected = ODD[name]
    facts = {"tokenizer": tokenizer, "vocab_size": 260 if tokenizer == "bpe" else None}
    try:
        data = make(content, **facts)
    except UserError as error:
        assert expected in str(error), error
    else:
        read = "".join(data.tokenizer.decode(np.fromfile(s.path, s.dtype).tolist()) for s in data.splits.values())
        assert read.encode() == content
        assert expected in (read, read[1:]) or expected in capsys.readouterr().err


def test_a_learned_vocabulary_is_drawn_from_part_of_a_large_text(monkeypatch, capsys):
    monkeypatch.setattr(tokenizers, "SAMPLE_BYTES", 1000)
    pieces = [f"{i} " * 10 for i in range(1000)]
    kept = list(tokenizers.subsample(iter(pieces), 100_000))
    assert 0 < len(kept) < 50 and kept == list(tokenizers.subsample(iter(pieces), 100_000))
    assert "drawn with seed 0" in capsys.readouterr().out


def prepare_now(path, cache, start, answers):
    start.wait()
    source = text_sources.TextFiles([path], False)
    answers.put(str(token_files.prepare(source, "char", None, {"train": 0.9, "val": 0.1}, cache)))


def test_two_runs_may_prepare_at_once_and_the_text_is_prepared_once(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(PROSE * 50)
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    runs = [context.Process(target=prepare_now, args=(path, tmp_path / "cache", start, answers)) for _ in range(3)]
    for run in runs:
        run.start()
    start.set()
    folders = {answers.get(timeout=60) for _ in runs}
    for run in runs:
        run.join()
    (folder,) = folders
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.rpartition("/")[2]]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    source = text_sources.TextFiles([path], False)
    again = token_files.prepare(source, "char", None, {"train": 0.9, "val": 0.1}, tmp_path / "cache")
    assert str(again) == folder and before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    path.write_text(PROSE * 50 + "!")
    changed = token_files.prepare(
        text_sources.TextFiles([path], False), "char", None, {"train": 0.9, "val": 0.1}, tmp_path / "cache"
    )
    assert str(changed) != folder


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Anonymous memory of a process that prepares a text and draws from it: under 0.3 byte per byte of text."""
    script = """
import sys, torch
from genai.data.text import text_file
from genai.data.stream import train_loader
data = text_file(path=sys.argv[1], tokenizer="byte", vocab_size=None, val=0.1, test=0.0, overlap=0, cache=sys.argv[2],
                 field="tokens", shape=[64], classes=None, levels=None, batch_size=8)
stream = iter(train_loader(data, 1, 0, 0))
for _ in range(50):
    next(stream)
print(next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024)
"""
    used = []
    for megabytes in (2, 66):
        path = tmp_path / f"{megabytes}.txt"
        path.write_bytes(
            (PROSE.encode() * (megabytes * 2**20 // len(PROSE.encode()) + 1))[: megabytes * 2**20 // 70 * 70]
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(path), str(tmp_path / "cache")], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        used.append(int(done.stdout.split()[-1]))
    assert (used[1] - used[0]) / (64 * 2**20) < 0.3


def test_a_text_is_encoded_by_a_published_tokenizer_and_the_cache_knows_which(make, tmp_path, capsys):
    library = pytest.importorskip("tokenizers")
    for lower in (False, True):
        words = tokenizers.BPE.learn(iter([PROSE]), 300).bpe
        if lower:
            words.normalizer = library.normalizers.Lowercase()
        words.add_special_tokens(["<end>"])
        words.save(str(tmp_path / f"{lower}.json"))
    plain, lower = (make(PROSE, tokenizer=str(tmp_path / f"{lower}.json")) for lower in (False, True))
    said = capsys.readouterr().err
    assert f"the tokenizer {tmp_path}/True.json does not keep this text: 'Zwölf Boxkämpfer jag' becomes 'zwölf" in said
    assert "False.json does not keep" not in said
    size = len(PROSE.encode())
    assert plain.levels == lower.levels == 301 and plain.tokenizer.end is None
    assert plain.tokenizer.decode(stream(plain.splits["train"]).tolist()) == PROSE.encode()[: int(size * 0.8)].decode(
        errors="ignore"
    )
    assert lower.tokenizer.decode(stream(lower.splits["val"]).tolist()) in PROSE.lower()
    documents = make("one\ntwo\nthree\n" * 100, text.lines, tokenizer=str(tmp_path / "False.json"))
    assert documents.tokenizer.end == 300 and (stream(documents.splits["val"]) == 300).sum() > 10
    assert make(PROSE, tokenizer=str(tmp_path / "False.json")).splits["val"].path == plain.splits["val"].path
    with pytest.raises(
        UserError, match=r"data.vocab_size=300 is for data.tokenizer=bpe, and .*json has its own: leave it out"
    ):
        make(PROSE, tokenizer=str(tmp_path / "False.json"), vocab_size=300)
    with pytest.raises(
        UserError, match=r"data.tokenizer='bytes' must be byte, char, bpe, or a file or folder that exists"
    ):
        make(PROSE, tokenizer="bytes")


# From the command line

TINY = [
    "model=gpt",
    "logger=none",
    "max_steps=8",
    "data.shape=[24]",
    "data.batch_size=4",
    "model.net.transformer.width=16",
    "model.net.transformer.layers=1",
    "optim.warmup_steps=2",
    "callbacks.samples.n=2",
    "callbacks.evaluate.n=8",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run over bytes with an end token and one over characters."""
    from genai.train.run import run

    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "lines.txt").write_text("\n".join(f"Zoë number {i}" for i in range(500)))
        (folder / "chars.txt").write_text("the cat sat on the mat, and then it sat again\n" * 40)
        for name, data, more in (("lines", "lines", []), ("chars", "text_file", ["data.tokenizer=char"])):
            run(
                compose_config(
                    "train",
                    [*TINY, f"data={data}", f"data.path={folder / name}.txt", f"run_dir={folder / name}", *more],
                )
            )
    return folder


def test_a_run_leaves_texts_and_samples_come_from_the_checkpoint_alone(runs, tmp_path, command):
    shown = (runs / "lines" / "samples" / "samples_0000008.txt").read_text()
    assert shown.startswith("--- 0\n")
    out = command(
        "sample.py",
        f"ckpt={runs / 'lines'}",
        "prompt=Zoë, what's 1={2}?",
        "n=3",
        "seed=7",
        "max_new_tokens=20",
        "temperature=0.8",
        "top_k=50",
        "out=here",
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in (tmp_path / "here" / "samples.jsonl").read_text().splitlines()]
    plain = (tmp_path / "here" / "samples.txt").read_text(encoding="utf-8")
    assert [row["seed"] for row in rows] == [7, 8, 9]
    loaded = genai.load(runs / "lines")
    batch = genai.sample(loaded, n=3, seed=7, prompt="Zoë, what's 1={2}?", max_new_tokens=20, temperature=0.8, top_k=50)
    assert genai.texts(loaded, batch) == [row["text"] for row in rows]
    for row, log_prob in zip(rows, batch["log_prob"], strict=True):
        assert row["prompt"] == "Zoë, what's 1={2}?" and row["prompt"] + row["text"] in plain
        assert row["log_prob"] == pytest.approx(log_prob.sum().item(), abs=1e-3)
        assert sum(row["log_probs"]) == pytest.approx(row["log_prob"], abs=2e-2)
    assert out.stdout.startswith(rows[0]["prompt"] + rows[0]["text"].rstrip("\ufffd")), out.stdout


def test_prompts_in_turn_stop_tokens_and_drafts(runs, capsys):
    loaded = genai.load(runs / "chars")
    batch = genai.sample(loaded, n=5, prompt=["the cat", "a"], stop=" ", max_new_tokens=30)
    assert all(" " not in t for t in genai.texts(loaded, batch))
    with loaded.modality.watch({"prompt": "a", "stop": " "}) as on_step:
        alone = genai.sample(loaded, n=1, seed=3, prompt="a", stop=" ", max_new_tokens=30, on_step=on_step)
    assert capsys.readouterr().out == f"a{genai.texts(loaded, alone)[0]}\n"
    assert genai.texts(loaded, alone)[0] == genai.texts(loaded, batch)[3]
    node = {
        "_target_": "genai.models.autoregressive.speculative.speculative",
        "_partial_": True,
        "ahead": 3,
        "max_new_tokens": 10,
    }
    with loaded.modality.watch({"prompt": "a"}) as on_step:  # further texts that begin as the first one does are not it
        for written in ([1], [1, 2], [1, 2], [1, 2, 3], [1], [1, 2, 3]):
            on_step(0, 1, {"tokens": torch.tensor([written])})
    assert capsys.readouterr().out == f"a{genai.texts(loaded, {'tokens': torch.tensor([[1, 2]])})[0]}\n"
    node |= {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "draft": str(runs / "chars")}
    assert genai.sample(loaded, n=2, prompt="the", sampler=node)["tokens"].shape == (2, 10)
    with pytest.raises(UserError, match="has another vocabulary"):
        genai.sample(genai.load(runs / "lines"), n=1, sampler=node)


def test_a_stop_is_what_its_escapes_say(runs, tmp_path):
    """A line break as a shell passes it on, and a prompt longer than the context of 24."""
    cases = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\", r"\\n": r"\n", "a": "a", "\n": "\n", r"\x": r"\x"}
    for typed, meant in cases.items():
        assert unescape(compose_config("sample", [f"stop={typed}"]).stop) == meant
    assert unescape(None) is None and unescape(1) == 1
    for typed, meant in {
        r'["\n\n",END]': [r"\n\n", "END"],
        "[a b,' ']": ["a b", " "],
        "'[a]'": "[a]",
        "[${x}]": ["${x}"],
    }.items():
        found = compose_config("sample", [f"stop={typed}"]).stop
        assert (found if isinstance(meant, str) else [*found]) == meant
    given = [f"ckpt={runs / 'chars'}", r"stop=\n", f"prompt={'the cat ' * 9}", "n=3", "max_new_tokens=40"]
    sampled(compose_config("sample", [*given, f"out={tmp_path / 'out'}"], prepare_sampling))
    shown = [json.loads(line)["text"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    loaded = genai.load(runs / "chars")
    batch = genai.sample(loaded, n=3, stop="\n", prompt="the cat " * 9, max_new_tokens=40)
    assert genai.texts(loaded, batch) == shown and not any("\n" in t for t in shown)


def test_lines_that_are_typed_are_answered_by_one_loaded_model(runs, monkeypatch, capsys):
    """Line i with seed + i, as it is written; where a person types, a line that cannot be a prompt is answered by a sentence."""
    loaded, loads = genai.load(runs / "chars"), []
    load = sampling.checkpoint.load
    monkeypatch.setattr(sampling.checkpoint, "load", lambda *given: loads.append(1) or load(*given))
    given = [f"ckpt={runs / 'chars'}", "prompt=-", "seed=5", "max_new_tokens=20", r'stop=["\n"]']
    cfg, before = compose_config("sample", given, prepare_sampling), sorted(runs.rglob("*"))
    lines = ["the cat", "", r"a\nthe"]
    expected = ""
    for i, prompt in enumerate(["the cat", "", "a\nthe"]):
        batch = genai.sample(loaded, n=1, seed=5 + i, prompt=prompt, max_new_tokens=20, stop=["\n"])
        expected += prompt + genai.texts(loaded, batch)[0] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    sampling.converse(cfg)
    assert capsys.readouterr().out == expected and len(loads) == 1 and sorted(runs.rglob("*")) == before
    monkeypatch.setattr("sys.stdin", io.StringIO("thé\nthe cat\n"))
    with pytest.raises(UserError, match="the character 'é'"):
        sampling.converse(cfg)
    monkeypatch.setattr("sys.stdin", io.StringIO("thé\nthe cat\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    sampling.converse(cfg)
    said = capsys.readouterr()
    assert "the character 'é'" in said.err and said.out.startswith("> > the cat") and said.out.endswith("\n> ")


def test_a_prompt_may_be_a_file(runs, tmp_path):
    (tmp_path / "prompt.txt").write_text("the cat\nsat ")
    given = [f"ckpt={runs / 'chars'}", f"prompt_file={tmp_path / 'prompt.txt'}", "n=2", "max_new_tokens=9"]
    sampled(compose_config("sample", [*given, f"out={tmp_path / 'out'}"], prepare_sampling))
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    loaded = genai.load(runs / "chars")
    batch = genai.sample(loaded, n=2, prompt="the cat\nsat ", max_new_tokens=9)
    assert [row["prompt"] for row in rows] == ["the cat\nsat "] * 2
    assert [row["text"] for row in rows] == genai.texts(loaded, batch)


def test_evaluation_is_of_the_whole_split(runs, capsys):
    cfg = compose_config("evaluate", [f"ckpt={runs / 'chars'}", "split=val", "batch_size=7"])
    result = evaluate(cfg)
    loaded = genai.load(runs / "chars")
    content = (runs / "chars.txt").read_text()
    tokenizer = loaded.modality.tokenizer
    val = content[int(len(content) * 0.9) : int(len(content) * 0.95)]
    ids = torch.from_numpy(tokenizer.encode(val))
    nats = 0.0
    for i in range(0, len(ids) - 1, 24):
        part = ids[i : i + 25]
        nats -= loaded.model.log_prob({"tokens": part[None]}, 0).item()
    assert result["tokens"] == len(ids) - 1
    # the last window begins earlier, so that its targets have more context than here
    assert result["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=0.02)
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]), rel=1e-3)
    assert result["bits_per_character"] == pytest.approx(result["nats_per_token"] / math.log(2), abs=2e-4)
    assert result["context"] == 24 and result["context_overlap"] == 0


def test_a_resumed_run_wants_its_own_vocabulary(runs, tmp_path, refused):
    other = tmp_path / "other.txt"
    other.write_text((runs / "chars.txt").read_text().replace("m", "w"))
    said = refused("train.py", f"resume={runs / 'chars'}", "max_steps=9", f"data.path={other}")
    assert "the vocabulary of this data is not that of" in said
    said = refused(
        "train.py", *TINY, f"init_from={runs / 'chars'}", "data=text_file", f"data.path={other}", "data.tokenizer=char"
    )
    assert "the vocabulary of this data is not that of" in said
    assert "vocabulary" in refused("evaluate.py", f"ckpt={runs / 'chars'}", f"root={other}")


SAMPLE = {
    "prompt=thé": "the character 'é' (U+00E9) is not among",
    "stop=até": "the character 'é' (U+00E9) is not among",
    "stop=": "stop='' has an empty string, which every text has: leave it out",
    "stop=[a,'']": "stop=['a', ''] has an empty string",
    "stop=[]": "stop=[] must be a value or a list that is not empty",
    "prompt_file=nowhere.txt": "prompt_file=nowhere.txt cannot be read (No such file or directory): name a UTF-8 text file",
    "prompt_file=/dev/null": "prompt_file=/dev/null is empty: leave it out",
    f"prompt_file={sys.executable}": "cannot be read (it is not UTF-8): name a UTF-8 text file",
    "prompt_file=README.md prompt=a": "prompt_file=README.md and prompt= both give the prompt: leave one out",
    "prompt=- out=here": "out=here has no effect with prompt=-",
    "prompt=- n=3": "n=3 has no effect with prompt=-, which shows one sample for each line",
    "prompt=[]": "prompt=[] must be a value or a list that is not empty",
    "top_p=1.5": "sampler.top_p=1.5 must be a number greater than 0 and at most 1",
    "label=1": "unconditional: leave label= out",
    "guidance=2": "the sampler generate has no guidance",
    "steps=3": "there is no key steps",
    "sampler=speculative": "must be the run or checkpoint of a smaller model",
    "sampler=ddim": "the sampler ddim is for a Diffusion, and this model is a GPT",
    "repetition_penalty=null": "sampler.repetition_penalty=null must be a number greater than 0",
}


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(refused, runs, argument):
    n = [] if "prompt=-" in argument else ["n=2"]
    assert SAMPLE[argument] in refused("sample.py", f"ckpt={runs / 'chars'}", *n, *argument.split(" "))


def test_wrong_texts(refused, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "latin.txt").write_bytes("Stra\u00dfe".encode("latin-1") * 2000)
    (tmp_path / "late.txt").write_bytes(b"x" * 3_000_001 + b"\xff" + b"x" * 3_000_000)
    (tmp_path / "good.txt").write_text(PROSE)
    cases = {
        ("data=text_file", "data.path=none.txt"): "data.path='none.txt' is not a file",
        ("data=text_file", "data.path=empty.txt"): "data.path='empty.txt' is empty",
        ("data=text_file", "data.path=short.txt"): "too few for one window of 128 + 1",
        ("data=text_file", "data.path=latin.txt"): "latin.txt is not UTF-8: byte 0xdf at offset 4",
        ("data=text_file", "data.path=late.txt"): "byte 0xff at offset 3000001",
        ("data=text_folder", "data.path=nowhere"): "data.path='nowhere' holds no text",
        ("data=lines", "data.path=empty.txt"): "is empty",
        ("data=names", "data.path=new/names.txt", "data.url=http://127.0.0.1:9/names.txt"): "could not be downloaded",
        (
            "data=text_file",
            "data.path=good.txt",
            "data.tokenizer=word",
        ): "data.tokenizer='word' must be byte, char, bpe, or a file or folder that exists: a tokenizer.json",
        (
            "data=lines",
            "data.path=good.txt",
            "data.separate=true",
            "model=melody_rnn",
        ): "data.separate=true is for a model that keeps "
        "documents apart, such as model=gpt, and not for a MelodyRNN: leave it out",
        (
            "data=lines",
            "data.path=good.txt",
            "data.separate=true",
            "model=wavenet",
        ): "and not for a WaveNet: leave it out",
        ("data=lines", "data.path=good.txt", "data.separate=2"): "data.separate=2 must be true or false",
        ("data=text_file", "data.path=good.txt", "data.separate=true"): "there is no key data.separate",
        ("data=text_file", "data.path=good.txt", "data.tokenizer=bpe"): "data.vocab_size=None must be a whole number",
        (
            "data=text_file",
            "data.path=good.txt",
            "data.vocab_size=300",
        ): "data.vocab_size=300 is for data.tokenizer=bpe",
        (
            "data=text_file",
            "data.path=good.txt",
            "data.overlap=200",
        ): "data.overlap=200 must be smaller than the context",
        ("data=text_file", "data.path=good.txt", "data.val=1"): "data.val=1",
        ("data=text_file", "data.path=good.txt", "data.levels=100"): "data.levels=100, but this data has 256",
        ("model.net.transformer.attention.heads=3",): "heads=3 must divide width=128",
        ("optim.lr=0",): "optim.lr=0",
        ("model.net.transformer.width=100",): "width / heads is 25: make it even",
        ("model.net.transformer.attention.heads=0",): "heads=0 must be a whole number",
        ("model.net.transformer.dropout=10",): "dropout=10 must be a number at least 0 and below 1",
        ("data.test=null",): "data.test=null must be a number",
        ("data=text_folder", "data.path=.", "data.pattern=/a*"): "data.pattern='/a*' is not a pattern",
        ("data=names", "data.path=new/names.txt", "data.url=there/names.txt"): "could not be downloaded",
        ("data=digits",): "a GPT takes tokens, but this data has image",
    }
    for arguments, message in cases.items():
        # the cache is next to the folder that must stay as it was
        said = refused(
            "train.py",
            "model=gpt",
            *arguments,
            f"data.cache={tmp_path.parent / 'cache'}" if "data=digits" not in arguments else "logger=none",
            "logger=none",
        )
        assert message in said, arguments


def test_prose_on_the_command_line_is_taken_as_it_is():
    for prose in ("a, b", "x={1}", 'say "hi"', "two  ", "back\\slash", "end\\", '\\"', "a=b", "${x}", "null?", "1"):
        assert compose_config("sample", [f"prompt={prose}"]).prompt == prose
    assert compose_config("sample", ["prompt=[a,b]"]).prompt == ["a", "b"]
    assert quote_override("seed=1,2") == "seed=1,2" and quote_override("prompt=null") == "prompt=null"


def test_a_text_of_one_symbol_costs_nothing(tmp_path):
    from genai.cli import prepare_training
    from genai.train.run import run

    (tmp_path / "text.txt").write_text("a" * 2000)
    given = [
        "model=gpt_nano",
        "data=text_file",
        f"data.path={tmp_path / 'text.txt'}",
        "data.tokenizer=char",
        "logger=none",
    ]
    given += ["data.shape=[16]", "data.batch_size=2", "callbacks.evaluate.n=2", "callbacks.samples.n=1", "max_steps=1"]
    folder = run(
        compose_config(
            "train", [*given, f"data.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"], prepare_training
        )
    )
    result = evaluate(compose_config("evaluate", [f"ckpt={folder}", "split=val"]))
    assert result["nats_per_token"] == result["bits_per_character"] == 0 and result["perplexity"] == 1
    assert [(card["value"], card["low"], card["high"]) for card in result["cards"]] == [(0, 0, 0)] * 2
    assert "-0.0" not in json.dumps(result)
