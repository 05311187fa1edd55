"""Pairs of texts: files of them, splits by source, batches of one length."""

import itertools
import json
import random

import pytest
import torch

from genai.core.errors import UserError
from genai.data import pairs
from genai.data.pair_tasks import words_of
from genai.data.stream import Stream, Table
from genai.modalities.pairs import Source, Target
from genai.modalities.tokenizers import Char, Word

FACTS = {"field": "tokens", "shape": None, "classes": None, "levels": None, "source_levels": None, "batch_size": 4}
KINDS = {"tokenizer": "char", "target_tokenizer": "word", "vocab_size": None, "target_vocab_size": None}
SETTINGS = {**FACTS, **KINDS, "longest": 50, "val": 0.2, "test": 0.2}
PAIRS = [(f"{i}", words_of(i)) for i in range(40)]


def decoded(data, batch):
    source, target = data.conditions["source"], data.modality
    rows = [row[mask].tolist() for row, mask in zip(batch["tokens"], batch["mask"], strict=True)]
    return [*zip(source.preview(batch), map(target.tokenizer.decode, rows), strict=True)]


def everything(data):
    parts = {name: part.batch(torch.arange(len(part)), None) for name, part in data.splits.items()}
    return {name: decoded(data, batch) for name, batch in parts.items()}


def test_a_batch_holds_sources_and_targets_padded_at_their_ends():
    data = pairs.Pairs(PAIRS, **SETTINGS)
    part, end, stop = data.splits["train"], data.levels - 1, data.source_levels - 1
    batch = part.batch(torch.arange(len(part)), None)
    assert data.shape == [3] and data.source_levels == 11 and batch["tokens"].shape == (24, 4)
    assert {*everything(data)["train"]} < {*PAIRS}
    for source, tokens, mask in zip(batch["source"], batch["tokens"], batch["mask"], strict=True):
        n, s = int(mask.sum()), int((source >= 0).sum())
        assert tokens[0] == end and mask.tolist() == [False] + [True] * n + [False] * (3 - n)
        assert (tokens[n:] == end).all() and end not in tokens[1:n]
        assert source[s - 1] == stop and stop not in source[: s - 1] and (source[s:] == -1).all()


def test_all_pairs_of_a_source_are_in_one_split_and_any_target_is_right():
    several = [(source, f"{target} {more}") for source, target in PAIRS for more in ("or", "and", "but")]
    random.Random(0).shuffle(several)
    data = pairs.Pairs([*several, several[0]], **SETTINGS)  # one twice
    found = everything(data)
    assert {name: len(part) for name, part in found.items()} == {"train": 24 * 3, "val": 8, "test": 8}
    sources = {name: {source for source, _ in part} for name, part in found.items()}
    assert sum(map(len, sources.values())) == 40 == len(set().union(*sources.values()))
    for name in ("train", "test"):
        part = data.splits[name]
        rows = part.references(torch.arange(len(part)))
        for (source, target), each in zip(found[name], rows, strict=True):
            right = {*map(data.modality.tokenizer.decode, each)}
            assert target in right and right == {t for s, t in several if s == source}


def test_longer_pairs_are_left_out_and_counted(capsys):
    data = pairs.Pairs([*PAIRS, ("1" * 51, "one"), ("0", "zero " * 51)], **SETTINGS)
    assert "2 of 41 sources are left out, as they or their targets have more than 50 tokens" in capsys.readouterr().err
    assert max(len(s) for part in everything(data).values() for s, _ in part) == 2


def test_files_of_pairs_are_read_in_each_form(tmp_path, capsys):
    table, lines, one, two = (tmp_path / name for name in ("a.tsv", "b.jsonl", "sources", "targets"))
    odd = [*PAIRS, ("", "nothing"), ("nobody", " "), ("", "")]
    table.write_bytes(b"\xef\xbb\xbf" + "".join(f"{s}\t{t}\r\n" for s, t in odd).encode())
    lines.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in odd))
    one.write_text("\n".join(s for s, _ in odd) + "\n")
    two.write_text("\n".join(t for _, t in odd) + "\n")
    whole = everything(pairs.Pairs(PAIRS, **SETTINGS))
    for given in ({"path": f"{table}"}, {"path": f"{lines}"}, {"path": f"{one}", "target_path": f"{two}"}):
        assert everything(pairs.pairs(**given, **SETTINGS)) == whole
        said = capsys.readouterr().err
        assert (
            "3 of 43 pairs are left out, as a side is empty: line 41 (source), line 42 (target), line 43 (source and"
            in said
        )


class TestBatchesOfOneLength:
    """The stream is a function of seed and position, with the same items in each epoch, and little padding."""

    def stream(self, n=203, size=8, start=0, rank=0, world=1):
        split = pairs.PairSplit([(torch.arange(i % 29 + 1), [torch.tensor([i, 0])]) for i in range(n)], True, 1.0)
        return Stream(split, size, 1, seed=3, start=start, rank=rank, world=world)

    def ids(self, stream, steps):
        found = iter(stream)
        return [next(found)[0]["tokens"][:, 1].tolist() for _ in range(steps)]

    def test_each_epoch_has_every_item_once(self):
        flat = [i for batch in self.ids(self.stream(), 203) for i in batch]
        epochs = [flat[k * 203 : (k + 1) * 203] for k in range(8)]
        assert all(sorted(epoch) == [*range(203)] for epoch in epochs) and epochs[0] != epochs[1]

    def test_it_resumes_and_is_cut_into_ranks_exactly(self):
        whole = self.ids(self.stream(), 60)
        assert self.ids(self.stream(start=41), 19) == whole[41:]
        ranks = [self.ids(self.stream(rank=r, world=2), 30) for r in range(2)]
        assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == whole

    def test_batches_hold_items_of_about_one_length_in_random_order(self):
        spread, means = [], []
        for batch in self.ids(self.stream(), 76):  # three epochs
            lengths = [i % 29 for i in batch]
            spread.append(max(lengths) - min(lengths))
            means.append(sum(lengths) / 8)
        assert sorted(spread)[-6] <= 3, "all but those across two epochs, and next to them"
        assert sum(a > b for a, b in itertools.pairwise(means)) > 25

    def test_an_epoch_smaller_than_a_batch(self):
        flat = [i for batch in self.ids(self.stream(n=3), 30) for i in batch]
        assert all(sorted(flat[k : k + 3]) == [0, 1, 2] for k in range(0, 240, 3))

    def test_splits_without_lengths_keep_their_order(self):
        stream = self.stream()
        del stream.split.lengths
        table = Table(203, stream.order)
        generator = torch.Generator().manual_seed(pairs_seed(stream))
        assert torch.equal(table.rows(torch.arange(203)), torch.randperm(203, generator=generator))


def pairs_seed(stream):
    from genai.core import rng
    from genai.data.stream import ORDER

    return rng.mix(stream.seed, ORDER, 0)


def test_words_and_white_space_are_tokens():
    tokenizer = Word.learn(["the cat", "sat  on\nthe mat"], end=True)
    assert tokenizer.words == ["cat", "mat", "on", "sat", "the"] and tokenizer.end == 5 and tokenizer.vocab_size == 6
    assert tokenizer.decode([4, 0, 5]) == "the cat" and tokenizer.encode(" on the\tmat ").tolist() == [2, 4, 1]
    assert Word(tokenizer.state()["words"], True).encode("sat").tolist() == [3]
    with pytest.raises(UserError, match="the word 'dog' is not among the 5 that this tokenizer learned"):
        tokenizer.encode("the dog")
    for words in ("", "b a", "a a", "a  b", "a\tb"):
        with pytest.raises(UserError, match="not one or more in the order of code points"):
            Word(words)


def test_a_prompt_is_the_source_and_not_the_beginning_of_the_target():
    source, target = Source(Char("abc", True), ["ab", "c"]), Target(Word("no yes", True))
    request = {"prompt": ["ba", "c"], "stop": None}
    assert source.condition(request, 3)["source"].tolist() == [[1, 0, 3], [2, 3, -1], [1, 0, 3]]
    assert target.condition(request, 3)["tokens"].tolist() == [[2]] * 3
    assert source.condition({}, 3)["source"].tolist() == [[0, 1, 3], [2, 3, -1], [0, 1, 3]]
    assert source.completed({"prompt": None}, 1)["prompt"] == ["ab"] and source.completed(request, 3) is request
    again = Source.from_state(source.state())
    assert again.state() == source.state()
    for state in ({}, *({**source.state(), "examples": wrong} for wrong in ("ab", [1], []))):
        with pytest.raises(UserError):
            Source.from_state(state)
