"""The words of a text in token ids: which tokens go on with the word of the token before."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genai.modalities.tokenizers import Tokenizer


@dataclass
class Words:
    """The edges of each token id, from which the words of a text follow.

    A word is a run of letters and digits. Every other token is a word of its own, as punctuation is for BERT.

    Attributes:
        begins, ends: bool (vocab_size,), whether the first and the last character of a token is part of a word.
    """

    begins: Tensor
    ends: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Words":
        """Find the edges of a tokenizer's ids; each is looked at behind another one, as some decode to a space only there."""
        front = len(tokenizer.decode([0]))
        texts = [tokenizer.decode([0, i])[front:] for i in range(tokenizer.vocab_size)]
        begins, ends = ([any(map(_is_of_word, text[edge])) for text in texts] for edge in (slice(1), slice(-1, None)))
        return cls(torch.tensor(begins), torch.tensor(ends))

    def number(self, tokens: Tensor) -> Tensor:
        """Return the number of the word of each token, int64 (B, T), from 0 in each row, for tokens int64 (B, T)."""
        goes_on = self.begins[tokens[:, 1:]] & self.ends[tokens[:, :-1]]
        return torch.nn.functional.pad((~goes_on).cumsum(1), (1, 0))


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "\ufffd"  # bytes of a character that is not ASCII
