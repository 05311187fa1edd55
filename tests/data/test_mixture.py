"""Corpora mixed in proportions: drawn by the stream's own draws, resumed exactly, scored each as a whole."""

import json
import math

import pytest
import torch

from genai.cli import compose_config
from genai.core.errors import UserError
from genai.data import text
from genai.data.base import first_items
from genai.data.stream import batches, train_loader
from tests.data.test_text import FACTS


@pytest.fixture
def paths(tmp_path):
    """Three corpora of different sizes, each of letters of its own, one of them a folder."""
    (tmp_path / "a.txt").write_text("abcd" * 500)
    (tmp_path / "b.txt").write_text("efgh\n" * 1600)
    (tmp_path / "c").mkdir()
    for i in range(3):
        (tmp_path / "c" / f"{i}.txt").write_text("xyz." * 300)
    return [str(tmp_path / name) for name in ("a.txt", "b.txt", "c")]


def mixed(paths, weights=(1, 2, 5), **facts):
    return text.mixed_text(paths, weights, "*.txt", **{**FACTS, "tokenizer": "char", "cache": None, **facts})


def owners(data, tokens):
    """The corpus of each window, by its letters."""
    letters = [{data.tokenizer.decode([i]) for i in row} - {""} for row in tokens.tolist()]
    return torch.tensor(
        [next(k for k, own in enumerate(("abcd", "efgh\n", "xyz.")) if row <= {*own}) for row in letters]
    )


def test_windows_are_drawn_in_proportions_and_begin_anywhere(paths):
    data = mixed(paths)
    split, n = data.splits["train"], 40_000
    draws = torch.rand(n, 4, generator=torch.Generator().manual_seed(0))
    batch = split.batch(torch.zeros(n, dtype=torch.int64), draws)
    found = owners(data, batch["tokens"])
    for k, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert abs((found == k).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    part = split.parts["a"]
    places = part.tokens - part.length
    seen = batch["tokens"][found == 0][:, 0].bincount(minlength=6)[2:6].double()
    assert (seen / seen.sum() - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / seen.sum()) + 4 / places
    assert "mask" not in batch


def test_the_stream_goes_on_where_it_was_stopped(paths):
    """Whatever step it starts from and whatever ranks share it."""
    data = mixed(paths)
    stream = iter(train_loader(data, 1, seed=3, start=0))
    whole = [next(stream)[0]["tokens"] for _ in range(6)]
    again = iter(train_loader(data, 1, seed=3, start=4))
    assert torch.equal(next(again)[0]["tokens"], whole[4]) and torch.equal(next(again)[0]["tokens"], whole[5])
    ranks = [iter(train_loader(data, 1, 3, 0, rank, 2)) for rank in range(2)]
    parts = [next(rank)[0]["tokens"] for _ in range(2) for rank in ranks]
    assert all(torch.equal(*pair) for pair in zip(parts, whole, strict=False))
    assert not torch.equal(whole[0], next(iter(train_loader(data, 1, seed=4, start=0)))[0]["tokens"])


def test_an_evaluation_has_every_window_once_and_begins_with_a_fair_sample(paths):
    data = mixed(paths, val=0.2)
    split = data.splits["val"]
    sizes = [len(part) for part in split.parts.values()]
    whole = torch.cat([batch["tokens"] for batch in batches(split, 7)])
    assert len(whole) == len(split) == sum(sizes)
    for k, part in enumerate(split.parts.values()):
        rows = (split.owner == k).nonzero()[:, 0]
        assert torch.equal(whole[rows], next(batches(part, len(part)))["tokens"])
    half = split.owner[: len(split) // 2].bincount()
    assert all(abs(n - size / 2) <= 1 for n, size in zip(half.tolist(), sizes, strict=True))
    assert torch.equal(first_items(data, "val", 3).batch(torch.arange(3), None)["tokens"], whole[:3])


def test_the_same_seed_is_the_same_batch_and_proportions_are_part_of_the_data(paths):
    one, two, other = (mixed(paths, weights).splits["train"] for weights in ((1, 2, 5), (2, 4, 10), (1, 1, 1)))
    assert one.fingerprint(True) == two.fingerprint(True) != other.fingerprint(True)


def test_one_tokenizer_is_learned_from_all_and_kept(paths, tmp_path, monkeypatch):
    data = mixed(paths, cache=str(tmp_path / "cache"))
    assert data.tokenizer.decode(range(data.levels)) == "\n.abcdefghxyz" and data.tokenizer.end == data.levels - 1
    pytest.importorskip("tokenizers")
    facts = {"tokenizer": "bpe", "vocab_size": 262, "cache": str(tmp_path / "cache")}
    merged = mixed(paths, **facts)
    pieces = {merged.tokenizer.decode([i]) for i in range(256, 261)}
    assert any(piece in "efgh\n" for piece in pieces) and any(piece in "xyz.xyz." for piece in pieces)
    monkeypatch.setattr("genai.data.token_files.learn", None)
    assert mixed(paths, **facts).tokenizer.state() == merged.tokenizer.state()


def test_each_corpus_is_scored(paths, tmp_path):
    """The facts of a split are the means of those of its corpora by their tokens, and a card has its baseline."""
    from genai.evaluation.run import run as evaluate
    from genai.train.run import run

    given = [f"data.paths=[{','.join(paths)}]", "data.proportions=[1,2,5]", "data.tokenizer=char", "data.shape=[16]"]
    given += [f"data.cache={tmp_path / 'cache'}", "data.val=0.2", "debug=true", "logger=none"]
    for model in ("gpt", "bert"):
        width = "model.net.transformer.width=16"
        run(
            compose_config("train", [f"model={model}", "data=mixed_text", width, *given, f"run_dir={tmp_path / model}"])
        )
        facts = evaluate(compose_config("evaluate", [f"ckpt={tmp_path / model}", "split=val"]))
        key, count = ("nats_per_token", "tokens") if model == "gpt" else ("masked_nats", "masked_tokens")
        own = facts["corpora"]
        assert {*own} == {"a", "b", "c"} and sum(one[count] for one in own.values()) == facts[count]
        mean = sum(one[key] * one[count] for one in own.values()) / facts[count]
        assert mean == pytest.approx(facts[key], abs=2e-4)
        assert all(card["baselines"] for card in facts["cards"])
    (path,) = (tmp_path / "gpt" / "checkpoints").glob("*.val.json")
    line = json.loads(path.read_text())
    assert line["corpora"]["a"]["bits_per_character"] > 0
    with pytest.raises(UserError, match="root= is for data in one place"):
        evaluate(compose_config("evaluate", [f"ckpt={tmp_path / 'gpt'}", f"root={paths[0]}"]))


WRONG = {
    "paths": {
        "one": "must be two or more different files or folders",
        "twice": "must be two or more different files or folders",
        "none": "holds no text: name a UTF-8 file, or a folder of *.txt (data.pattern)",
    },
    "proportions": {
        (1, 2): "must be a number for each of the 3 data.paths",
        (1, 0, 2): "data.proportions=0 must be a number greater",
    },
    "facts": {
        "val": ({"val": 0.001}, "the val split of a has 2 tokens, too few for one window of 16 + 1"),
        "tokenizer": ({"tokenizer": "nowhere.json"}, "nowhere.json"),
        "size": ({"tokenizer": "char", "vocab_size": 300}, "is for data.tokenizer=bpe, this is char"),
        "pattern": (None, "is not a pattern of file names"),
    },
}


@pytest.mark.parametrize("case", [(kind, case) for kind, cases in WRONG.items() for case in cases], ids=str)
def test_what_cannot_be_mixed_is_refused(paths, tmp_path, case):
    kind, which = case
    said, given, weights, facts = WRONG[kind][which], paths, (1, 2, 5), {"cache": str(tmp_path / "cache")}
    if kind == "paths":
        given = {"one": paths[:1], "twice": [paths[0]] * 2, "none": [*paths[:2], str(tmp_path / "nothing")]}[which]
        weights = None
    elif kind == "proportions":
        weights = which
    else:
        more, said = said
        facts |= more or {}
    with pytest.raises(UserError) as refused:
        if which == "pattern":
            text.mixed_text(given, weights, "**a", **{**FACTS, **facts})
        mixed(given, weights, **facts)
    assert said in str(refused.value) and "\n" not in str(refused.value)
