"""Data sets of passages of text and what each is of: a document, a topic, a speaker.

They are pairs of a passage, the source, and its label, the target.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genai.core.errors import UserError, at_least
from genai.data.pairs import Pairs
from genai.data.text import file_at, read_file


def passages(path: str, pattern: str, longest: int, **facts: Any) -> Pairs:
    """Build the data set of passages of the files in a folder; the label is the file's name without suffix.

    Args:
        path: the folder.
        pattern: of the names of files.
        longest: characters of a passage, and tokens of it that are read.
        facts: further arguments of `Pairs`.

    Raises UserError for fewer than two files.
    """
    root = Path(path)
    files = sorted(p for p in root.rglob(pattern) if p.is_file() and p.stat().st_size)
    if len(files) < 2:
        raise UserError(
            f"data.path={path!r} has {len(files)} files of text (data.pattern={pattern!r}), and labels need two"
        )
    return _labelled({_name(p.stem): [read_file(p)] for p in files}, longest, facts)


def topics(n: int, longest: int, **facts: Any) -> Pairs:
    """Build the data set of passages of the n longest topics of Python's `help()`, part of every installation.

    Raises UserError for fewer than two topics, or more than there are.
    """
    from pydoc_data.topics import topics as found

    at_least(n, 2, "data.n", most=len(found))
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:n]
    return _labelled({_name(name): [found[name]] for name in names}, longest, facts)


def speakers(path: str, url: str | None, n: int, longest: int, **facts: Any) -> Pairs:
    """Build the data set of passages of the n speakers of a play who say most.

    A speech is a line `SPEAKER:` and what follows up to an empty line. Raises UserError for a play of fewer speakers.
    """
    text = read_file(file_at(path, url))
    speeches: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        name, colon, said = block.strip("\n").partition(":\n")
        if colon and said and "\n" not in name:
            speeches.setdefault(name, []).append(said)
    at_least(n, 2, "data.n")
    if len(speeches) < n:
        raise UserError(f"data.path={path!r} has {len(speeches)} speakers: give fewer than data.n={n}, or another play")
    most = Counter({name: sum(map(len, said)) for name, said in speeches.items()}).most_common(n)
    return _labelled({_name(name): speeches[name] for name, _ in most}, longest, facts, [text])


def _labelled(
    texts: Mapping[str, Iterable[str]], longest: int, facts: dict[str, Any], learn_from: Sequence[str] = ()
) -> Pairs:
    at_least(longest, 1, "data.longest")
    found = [(passage, label) for label, each in texts.items() for text in each for passage in cut(text, longest)]
    return Pairs(
        found, target_tokenizer="word", target_vocab_size=None, longest=longest, learn_from=learn_from, **facts
    )


def cut(text: str, longest: int) -> list[str]:
    """Cut a text between words into passages of at most `longest` characters; longer words are left out."""
    return re.findall(
        rf"(?<!\S)\S(?:.{{0,{longest - 2}}}\S)?(?!\S)" if longest > 1 else r"(?<!\S)\S(?!\S)", text, re.DOTALL
    )


def _name(name: str) -> str:
    """Return a name as one word."""
    return "_".join(name.split())
