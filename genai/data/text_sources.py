"""The sources of a text: files, lines of files, or one string, read in pieces that fit into memory."""

import bisect
import codecs
import hashlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from genai.core.errors import UserError
from genai.data.token_files import bounds

PIECE_BYTES = 2**20

Piece = tuple[str, bool]
"""A piece of text, and whether a document ends after it."""


class Source(Protocol):
    """A source of text.

    Attributes:
        kind: its name in the hash of the prepared files, which stays as it is when a class is renamed.
        documents: whether the text consists of documents, each closed by an end token.
        size_bytes: length of the text in UTF-8.
    """

    kind: str
    documents: bool
    size_bytes: int

    def fingerprint(self, digest: object) -> None:
        """Update a hashlib digest with everything that determines the text."""
        ...

    def pieces(self, first: float, last: float) -> Iterator[Piece]:
        """Yield the text from fraction `first` to fraction `last` of its length."""
        ...


class Corpora(NamedTuple):
    """Several sources by name, to be mixed in proportions."""

    sources: "Mapping[str, Source]"
    proportions: Sequence[float]


class TextFiles:
    """UTF-8 files one after the other; splits are consecutive parts of their bytes."""

    kind = "Files"

    def __init__(self, files: Sequence[Path], documents: bool):
        self.files, self.documents = [(path, path.stat().st_size) for path in files], documents
        self.size_bytes = sum(size for _, size in self.files)

    def fingerprint(self, digest: Any) -> None:
        for path, size in self.files:
            digest.update(f"{size}:".encode())
            nul = 0
            for chunk in _chunks(path, 0, size):
                digest.update(chunk)
                nul += chunk.count(0)
            if nul:
                print(f"{path} holds {nul} NUL bytes, as UTF-16 and binary files do, and no text", file=sys.stderr)

    def copies(self, shares: dict[str, float]) -> list[list[Path]]:
        """Return groups of files with the same content that are in more than one split."""
        cuts = [int(self.size_bytes * last) for _, last in bounds(shares).values()]
        alike: dict[Any, list[tuple[Path, int, int]]] = {}
        at = 0
        for path, size in self.files:
            alike.setdefault(size, []).append(
                (path, bisect.bisect_right(cuts, at), bisect.bisect_left(cuts, at + size))
            )
            at += size
        for size in [size for size, group in alike.items() if len(group) > 1]:
            for entry in alike.pop(size):
                digest = hashlib.sha256()
                for chunk in _chunks(entry[0], 0, size):
                    digest.update(chunk)
                alike.setdefault(digest.digest(), []).append(entry)
        spread = [group for group in alike.values() if len(group) > 1 and len({i for e in group for i in e[1:]}) > 1]
        return [[path for path, _, _ in group] for group in spread]

    def pieces(self, first: float, last: float) -> Iterator[Piece]:
        """Yield the text in pieces; a cut inside a character moves to its end."""
        start, stop = int(self.size_bytes * first), int(self.size_bytes * last)
        for path, size in self.files:
            if start < size and stop > 0:
                yield from self._part(path, max(start, 0), min(stop, size), size)
            start, stop = start - size, stop - size

    def _part(self, path: Path, start: int, stop: int, size: int) -> Iterator[Piece]:
        start, stop = (self._boundary(path, at, size) for at in (start, stop))
        decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
        for chunk in _chunks(path, start, stop):
            start += len(chunk)
            try:
                rest += decoder.decode(chunk, final=start == stop)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                    f"{start - len(error.object) + error.start} ({error.reason}); convert the file, for instance with iconv"
                ) from None
            cut = rest.rfind("\n") + 1 or len(rest)  # cut at line ends, so that BPE learns from whole words
            whole, rest = rest[:cut], rest[cut:]
            if start < stop and whole:
                yield whole, False
            elif start == stop:
                yield whole + rest, stop == size

    @staticmethod
    def _boundary(path: Path, at: int, size: int) -> int:
        """Return the first position from `at` on where a character begins; `at` itself in invalid UTF-8."""
        tail = b"".join(_chunks(path, at, min(at + 4, size)))
        return at + next((i for i, byte in enumerate(tail) if byte & 0xC0 != 0x80), len(tail) % 4)


def _chunks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of a file from start to stop. Raises UserError if it cannot be read, or is shorter by now."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                chunk = file.read(min(PIECE_BYTES, stop - start))
                if not chunk:
                    raise UserError(f"{path} became shorter while it was read: start again once nothing writes to it")
                start += len(chunk)
                yield chunk
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or change data.path") from error


class Embedded:
    """One string in memory."""

    kind = "Embedded"

    def __init__(self, text: str):
        self.documents, self.text, self.size_bytes = False, text, len(text.encode())

    def fingerprint(self, digest: Any) -> None:
        digest.update(self.text.encode())

    def pieces(self, first: float, last: float) -> Iterator[Piece]:
        yield self.text[int(len(self.text) * first) : int(len(self.text) * last)], False


class Lines(TextFiles):
    """Each line of the files is a document; a fixed random draw puts it into one of the splits."""

    kind = "Lines"

    def pieces(self, first: float, last: float) -> Iterator[Piece]:
        draw, rest = random.Random(0), ""
        for text, ends in super().pieces(0.0, 1.0):
            *lines, rest = (rest + text).split("\n")
            if ends and rest:
                lines, rest = [*lines, rest], ""
            for line in lines:
                line = line.rstrip("\r")
                if line and first <= draw.random() < last:
                    yield line, True
