"""Words of a text in token ids, by any tokenizer."""

import itertools

import pytest
import torch

from genai.modalities.tokenizers import BPE, Byte, Char, Published, WithSpecials
from genai.modalities.words import Words


def split(tokenizer, ids):
    """The texts of the words of ids."""
    numbers = Words.of(tokenizer).number(torch.tensor([ids]))[0].tolist()
    assert numbers[0] == 0 and all(b - a in (0, 1) for a, b in itertools.pairwise(numbers))
    return [tokenizer.decode([i for i, k in zip(ids, numbers, strict=True) if k == n]) for n in range(numbers[-1] + 1)]


TEXT = "Don't go, café 42nd!"
WANT = ["Don", "'", "t", " ", "go", ",", " ", "café", " ", "42nd", "!"]


@pytest.mark.parametrize("tokenizer", [Char("".join(sorted(set(TEXT)))), Byte(), WithSpecials(Byte(True))])
def test_words_of_characters_and_bytes(tokenizer):
    assert split(tokenizer, tokenizer.encode(TEXT).tolist()) == WANT


def test_special_ids_are_words_of_their_own():
    tokenizer = WithSpecials(Char("ab"))
    assert split(tokenizer, [0, 1, 2, 0, 5, 5, 1]) == ["ab", "[MASK]", "a", "[PAD]", "[PAD]", "b"]


def test_words_of_merges():
    pytest.importorskip("tokenizers")
    tokenizer = BPE.learn(["the walking the talking " * 20], 275)
    ids = tokenizer.encode("the walking, thewalk").tolist()
    assert len(ids) < 15
    assert split(tokenizer, ids) == ["the", " walking", ",", " thewalk"]


def test_words_of_pieces_with_marks():
    """WordPiece marks what goes on with a word; a space is in no piece."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["[UNK]", "the", "walk", "##ing", "##s", ",", "talk"]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.BertPreTokenizer(), tokenizers.decoders.WordPiece()
    tokenizer = Published(made.to_str())
    numbers = Words.of(tokenizer).number(torch.tensor([tokenizer.encode("the walkings, talk talks").tolist()]))
    assert numbers.tolist() == [[0, 1, 1, 1, 2, 3, 4, 4]]
