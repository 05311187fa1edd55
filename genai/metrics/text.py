"""Metrics of generated text: its diversity, the longest string copied from the training text, and its distance from another."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from genai.core.errors import UserError, at_least


class Copy(NamedTuple):
    """A common string: text[start : start + length] == train[source : source + length]; length is 0 if there is none."""

    length: int
    start: int
    source: int


def distinct(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """Compute distinct-n: the share of different n-grams among those of all texts (Li et al. 2016, section 5.3).

    Items are characters for a string, words for `text.split()`, or token ids. The value falls with the length of the text:
    compare only texts of one length. Raises UserError if no text has n items.
    """
    at_least(n, 1, "n")
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    if not grams:
        raise UserError(f"n={n}: no text is that long")
    return len(set(grams)) / len(grams)


def longest_copy(text: str | Sequence[int], train: str | Sequence[int]) -> Copy:
    """Find the longest common substring of `text` and `train`, both strings or both token ids; the first if there are several.

    It is exact, without hashing: substrings of 1, 2, 4, ... items are numbered by the numbers of their halves (Karp, Miller &
    Rosenberg 1972), those of a length between by two overlapping ones, and binary search finds the greatest length. The time is
    proportional to the length of the texts times the logarithm of the copy's length.

    Raises UserError for negative token ids.
    """
    ours, theirs = _items(text), _items(train)
    names, size = [_number(ours, theirs)], 1
    while _have_common(*names[-1]) and 2 * size <= len(ours):
        names.append(_number(*_pair_keys(names[-1], size)))
        size *= 2
    if not _have_common(*names[-1]):
        names.pop()
    if not names:
        return Copy(0, 0, 0)
    half, low = names[-1], 2 ** (len(names) - 1)
    best, high = _first_common(*half), min(2 * low, len(ours) + 1, len(theirs) + 1)  # low is shared, high is not
    size = low  # length of the substrings that `half` numbers
    while high - low > 1:
        middle = (low + high) // 2
        pairs = _number(*_pair_keys(half, middle - size))
        if _have_common(*pairs):
            low, best = middle, _first_common(*pairs)
        else:
            high = middle
    return Copy(low, *best)


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Compute the least number of insertions, deletions and substitutions of items that turn a into b (Levenshtein 1966)."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def _items(text: str | Sequence[int]) -> np.ndarray:
    """Convert characters or token ids to numbers >= 0, int64 (N,)."""
    if isinstance(text, str):
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    found = np.asarray(text, np.int64).reshape(-1)
    if (found < 0).any():
        raise UserError(f"token ids must be at least 0, and one is {found.min()}")
    return found


def _number(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map keys to consecutive numbers, equal for equal keys; -1 for a key that is -1 or not in `ours`."""
    keys = np.unique(ours[ours >= 0])
    found = []
    for given in (ours, theirs):
        numbers = np.full(len(given), -1)
        place = np.flatnonzero(given >= 0)
        if len(keys):
            at = np.searchsorted(keys, given[place]).clip(max=len(keys) - 1)
            numbers[place] = np.where(keys[at] == given[place], at, -1)
        found.append(numbers)
    return found[0], found[1]


def _pair_keys(names: tuple[np.ndarray, np.ndarray], shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return keys of longer substrings: pairs of numbers `shift` positions apart, or -1 where one of them is -1."""
    count = len(names[0])  # exceeds every number
    left = [n[: max(0, len(n) - shift)] for n in names]
    right = [n[shift:] for n in names]
    keys = [np.where((a >= 0) & (b >= 0), a * count + b, -1) for a, b in zip(left, right, strict=True)]
    return keys[0], keys[1]


def _have_common(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Tell whether a number of `ours` occurs in `theirs`."""
    return bool((theirs >= 0).any())


def _first_common(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    """Return the positions of the first common number in both."""
    start = int(np.flatnonzero(np.isin(ours, theirs[theirs >= 0]))[0])
    return start, int(np.flatnonzero(theirs == ours[start])[0])
