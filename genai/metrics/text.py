"""Of generated text: how much of it is new to itself, and how much stands word for word in the training text."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from genai.core.errors import UserError, at_least


class Copy(NamedTuple):
    """text[start : start + length] == train[source : source + length]; length 0 if they share nothing."""

    length: int
    start: int
    source: int


def distinct(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams of all texts together, distinct-n (Li et al. 2016, section 5.3).

    A string is a sequence of characters; give `text.split()` for words, or token ids. It falls with the length of the
    text: compare only figures of one length. Raises UserError if no text has n items.
    """
    at_least(n, 1, "n")
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    if not grams:
        raise UserError(f"n={n}: no text is that long")
    return len(set(grams)) / len(grams)


def longest_copy(text: str | Sequence[int], train: str | Sequence[int]) -> Copy:
    """The longest stretch of `text` that stands in `train`, both strings or both token ids >= 0; of several, the first.

    Exact, without hashes: stretches of 1, 2, 4, ... items are numbered by the numbers of their halves, as far as the
    texts share any (Karp, Miller & Rosenberg 1972); one of a length between is the pair of two that overlap, and a
    search by halves finds the longest. Time grows with the texts' length times the logarithm of the copy's. Raises
    UserError for negative token ids.
    """
    ours, theirs = _items(text), _items(train)
    names, size = [_numbered(ours, theirs)], 1
    while _shared(*names[-1]) and 2 * size <= len(ours):
        names.append(_numbered(*_paired(names[-1], size)))
        size *= 2
    if not _shared(*names[-1]):
        names.pop()
    if not names:
        return Copy(0, 0, 0)
    half, low = names[-1], 2 ** (len(names) - 1)
    best, high = _place(*half), min(2 * low, len(ours) + 1, len(theirs) + 1)  # low is shared, high is not
    size = low  # of what `half` numbers
    while high - low > 1:
        middle = (low + high) // 2
        pairs = _numbered(*_paired(half, middle - size))
        if _shared(*pairs):
            low, best = middle, _place(*pairs)
        else:
            high = middle
    return Copy(low, *best)


def _items(text: str | Sequence[int]) -> np.ndarray:
    """One number >= 0 for each character or token, int64 (N,)."""
    if isinstance(text, str):
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    found = np.asarray(text, np.int64).reshape(-1)
    if (found < 0).any():
        raise UserError(f"token ids must be at least 0, and one is {found.min()}")
    return found


def _numbered(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys to small numbers, the same number for the same key; -1 for a key that is -1 or not among ours."""
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


def _paired(names: tuple[np.ndarray, np.ndarray], shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of longer stretches: the pair of numbers of two that start `shift` apart, or -1 where one has none."""
    count = len(names[0])  # more than any number
    left = [n[: max(0, len(n) - shift)] for n in names]
    right = [n[shift:] for n in names]
    keys = [np.where((a >= 0) & (b >= 0), a * count + b, -1) for a, b in zip(left, right, strict=True)]
    return keys[0], keys[1]


def _shared(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool((theirs >= 0).any())


def _place(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    """Where the first shared number stands in both."""
    start = int(np.flatnonzero(np.isin(ours, theirs[theirs >= 0]))[0])
    return start, int(np.flatnonzero(theirs == ours[start])[0])
