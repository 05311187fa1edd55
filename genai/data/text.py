"""Text as streams of token ids: prepared once, memory-mapped, cut into windows."""

import bisect
import codecs
import hashlib
import http.client
import itertools
import json
import os
import random
import shutil
import sys
import urllib.request
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from genai import progress
from genai.core import stored
from genai.core.cache import cache_folder
from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import checksum, files_checksum
from genai.modalities import text as modalities
from genai.modalities.tokenizers import Tokenizer, from_state, learn

FORMAT = 1  # of the prepared files
PIECE_BYTES = 2**20

Piece = tuple[str, bool]
"""Some text, and whether a document ends after it."""


class Source(Protocol):
    """Where a text comes from; `documents` says whether it is made of several, each closed by an end token."""

    documents: bool
    size_bytes: int

    def fingerprint(self, digest: Any) -> None:
        """Feed a hashlib digest all that decides the text."""
        ...

    def pieces(self, first: float, last: float) -> Iterator[Piece]:
        """The text from share `first` to share `last` of it."""
        ...


class Files:
    """Files one after the other; splits are consecutive parts of their bytes."""

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
        """Files with the same content, those that do not lie in one split alone."""
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
        """A cut inside a character moves to its end."""
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
            cut = rest.rfind("\n") + 1 or len(rest)  # words stay whole for a tokenizer of merges
            whole, rest = rest[:cut], rest[cut:]
            if start < stop and whole:
                yield whole, False
            elif start == stop:
                yield whole + rest, stop == size

    @staticmethod
    def _boundary(path: Path, at: int, size: int) -> int:
        """The first byte from `at` on that continues no character, of which at most three in a row do; `at` where more do."""
        tail = b"".join(_chunks(path, at, min(at + 4, size)))
        return at + next((i for i, byte in enumerate(tail) if byte & 0xC0 != 0x80), len(tail) % 4)


def _chunks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a file from start to stop, in order. Raises UserError if it cannot be read, or ends before."""
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
    """One text in memory."""

    def __init__(self, text: str):
        self.documents, self.text, self.size_bytes = False, text, len(text.encode())

    def fingerprint(self, digest: Any) -> None:
        digest.update(self.text.encode())

    def pieces(self, first: float, last: float) -> Iterator[Piece]:
        yield self.text[int(len(self.text) * first) : int(len(self.text) * last)], False


class Lines(Files):
    """Each line of the files is a document, drawn at random into one of the splits."""

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


def prepare(
    source: Source, tokenizer: str, vocab_size: int | None, shares: dict[str, float], cache: Path | None
) -> Path:
    """The folder in `cache` with `<split>.bin` for each split and `meta.json`, made if it is not there.

    None is the user's own cache; there it is made too where a file, and not the user, chose another. Its name is a hash of the
    text and of everything that decides the ids. It is written beside and renamed, so two runs that prepare at once both end
    with a whole one.
    """
    decides = (FORMAT, type(source).__name__, source.documents, tokenizer, vocab_size, shares)
    digest = hashlib.sha256(repr(decides).encode())
    source.fingerprint(digest)
    name, own = digest.hexdigest()[:24], cache_folder("text")
    if cache is not None and _is_whole(cache / name):
        return cache / name
    cache = own if cache is None or stored.is_building() else cache
    folder = cache / name
    if _is_whole(folder):
        return folder
    if folder.exists():
        print(f"{folder} is damaged: its text is prepared anew", file=sys.stderr)
    temporary, damaged = (cache / f".{folder.name}.{os.getpid()}.{kind}" for kind in ("tmp", "damaged"))
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        learn_from = 1.0 if tokenizer == "char" else shares["train"]
        pieces = (text for text, _ in source.pieces(0.0, learn_from))
        with progress.task(f"learning the tokenizer {tokenizer}, once"):
            ids = learn(tokenizer, pieces, source.size_bytes, vocab_size, source.documents)
        dtype = smallest_dtype(ids.vocab_size)
        meta: dict[str, Any] = {"tokenizer": ids.state(), "dtype": dtype, "characters": {}, "bytes": {}}
        with progress.task("encoding the text, once:", source.size_bytes >> 20, "MiB") as task:
            for name, (first, last) in bounds(shares).items():
                path = temporary / f"{name}.bin"
                meta["characters"][name] = _write(path, source.pieces(first, last), ids, dtype, task)
                meta["bytes"][name] = path.stat().st_size
        (temporary / "meta.json").write_text(json.dumps(meta))
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_whole(folder):
                folder.rename(damaged)
                temporary.rename(folder)
    except OSError as error:
        raise UserError(
            f"data.cache={str(cache)!r} cannot be written ({error.strerror}): name another folder"
        ) from error
    finally:
        for left in (temporary, damaged):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def bounds(shares: dict[str, float]) -> dict[str, tuple[float, float]]:
    """From where to where in the text each split goes."""
    lasts = [round(last, 9) for last in itertools.accumulate(shares.values(), lambda a, b: round(a + b, 9))]
    lasts[-1] = 1.0
    return dict(zip(shares, itertools.pairwise([0.0, *lasts]), strict=True))


def _is_whole(folder: Path) -> bool:
    """Whether a prepared text is there, each file as long as it was written; texts of before that was noted, in whole ids."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in meta["characters"]}
        whole = all(size % np.dtype(meta["dtype"]).itemsize == 0 for size in sizes.values())
        return whole and sizes == meta.get("bytes", sizes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _write(path: Path, pieces: Iterator[Piece], tokenizer: Tokenizer, dtype: str, task: progress.Task) -> int:
    """Token ids of the pieces to a file; returns how many characters they were. The task counts MiB."""
    characters, size_bytes, done = 0, 0, task.done
    with path.open("wb") as file:
        for text, ends in pieces:
            file.write(tokenizer.encode(text).astype(dtype).tobytes())
            if ends and tokenizer.end is not None:
                file.write(np.array([tokenizer.end], dtype).tobytes())
            characters += len(text)
            size_bytes += len(text.encode(errors="surrogatepass"))
            task.done = done + (size_bytes >> 20)
    return characters


def smallest_dtype(vocab_size: int) -> str:
    """Of unsigned integers that hold ids below vocab_size."""
    return "uint8" if vocab_size <= 2**8 else "uint16" if vocab_size <= 2**16 else "uint32"


class Windows:
    """A split: windows of `length` + 1 tokens, of which a model predicts all but the first.

    Without draws, window i ends where i + 1 begins predicting, each with `overlap` tokens of context that the one
    before predicted: every token but the stream's first is a target once, marked in `mask`. Training moves each
    window by up to its length.

    Batch: tokens int64 (B, length + 1), and without draws mask bool (B, length + 1).
    """

    def __init__(self, path: Path, dtype: str, characters: int, length: int, overlap: int, augments: bool):
        self.path, self.dtype, self.characters, self.augments = path, np.dtype(dtype), characters, augments
        self.length, self.overlap = length, 0 if augments else overlap
        self.file = self.map = None
        self.tokens = path.stat().st_size // self.dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "file": None, "map": None}  # another process opens it itself

    def __len__(self) -> int:
        return max(-(-(self.tokens - 1 - self.overlap) // (self.length - self.overlap)), 1)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        starts, stride = self.tokens - self.length, self.length - self.overlap  # how many windows begin somewhere
        if self.augments and draws is not None:
            first = (index * self.length + (draws[:, 0] * self.length).long()) % starts
        else:
            first = (index * stride).clamp_max(starts - 1)
        at = first[:, None] + torch.arange(self.length + 1)
        batch = {"tokens": torch.from_numpy(self._mapped()[at.numpy()].astype(np.int64))}
        if draws is None:
            fresh = index * stride + self.overlap * (index > 0)  # the last token that was a target before
            batch["mask"] = at > fresh[:, None]
        return batch

    def _mapped(self) -> np.ndarray:
        """The tokens. Raises UserError if the file was cut short, for a read of what is no more there kills the process."""
        if self.file is None:
            self.file = self.path.open("rb")
            weakref.finalize(self, self.file.close)
        if os.fstat(self.file.fileno()).st_size < self.tokens * self.dtype.itemsize:
            raise UserError(f"{self.path} was cut short while it was in use: start again, and it is prepared anew")
        if self.map is None:
            self.map = np.memmap(self.file, self.dtype, "r")
        return self.map

    def fingerprint(self, quick: bool) -> str:
        """Of the stream, whatever windows it is cut into; quick by the name of its folder, see `prepare`."""
        folder, name = self.path.parent, self.path.name
        return checksum(self.dtype.str, folder.name if quick else files_checksum(folder, [name]), name)


class Text(Data):
    """A text in splits of windows.

    Args:
        source: where the text is.
        tokenizer: byte, char, or bpe with `vocab_size` ids.
        val, test: shares of the text.
        overlap: tokens of context that evaluation windows share.
        cache: folder of prepared texts, default $XDG_CACHE_HOME/genai or ~/.cache/genai.
        shape: [context length in tokens].
        levels: number of ids; None takes what the tokenizer has.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: str,
        vocab_size: int | None,
        val: float,
        test: float,
        overlap: int,
        cache: str | None,
        field: str,
        shape: Sequence[int],
        classes: None,
        levels: int | None,
        batch_size: int,
        num_workers: int = 0,
    ):
        if len(shape) != 1:
            raise UserError(f"data.shape={list(shape)} must be [context length in tokens]")
        length = at_least(shape[0], 1, "data.shape[0]")
        if at_least(overlap, 0, "data.overlap") >= length:
            raise UserError(f"data.overlap={overlap} must be smaller than the context of {length} tokens (data.shape)")
        number(val, "data.val", 0, 1)
        number(test, "data.test", 0, 1)
        if not (val > 0 and val + test < 1):
            raise UserError(
                f"data.val={val}, data.test={test}: shares above 0 (test may be 0) that leave some to train"
            )
        shares = {"train": round(1 - val - test, 9), "val": val, **({"test": test} if test else {})}
        self.shares = shares
        folder = prepare(source, tokenizer, vocab_size, shares, Path(cache) if cache else None)
        meta = json.loads((folder / "meta.json").read_text())
        self.tokenizer = from_state(meta["tokenizer"])
        splits: dict[str, Split] = {}
        for name in shares:
            characters = meta["characters"][name]
            part = Windows(folder / f"{name}.bin", meta["dtype"], characters, length, overlap, name == "train")
            if part.tokens <= length:
                raise UserError(
                    f"the {name} split has {part.tokens} tokens, too few for one window of {length} + 1: give more text, "
                    f"a shorter data.shape, or {'smaller shares to others' if name == 'train' else f'a larger data.{name}'}"
                )
            splits[name] = part
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=splits,
            found_shape=shape,
            class_names=None,
            found_levels=self.tokenizer.vocab_size,
            modality=modalities.Text(self.tokenizer),
        )


def _file(path: str, url: str | None) -> Path:
    """The file, downloaded if it is not there and `url` says from where. Raises UserError if there is none, or no text."""
    target = Path(path)
    if not target.exists() and url is not None:
        if stored.is_building():
            raise UserError(
                f"there is no data.path={path!r}, and nothing is downloaded because a checkpoint says so: python train.py "
                "with the data= it was trained on downloads it"
            )
        _download(target, url)
    if not target.is_file():
        raise UserError(f"data.path={path!r} is not a file: set data.path to a UTF-8 text")
    if target.stat().st_size == 0:
        raise UserError(f"data.path={path!r} is empty: give a text")
    return target


def _download(target: Path, url: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    existed = target.parent.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as answer:
            temporary.write_bytes(answer.read())
        temporary.replace(target)
    except (OSError, ValueError, http.client.HTTPException) as error:  # no address, no server, half a file
        temporary.unlink(missing_ok=True)
        if not existed and target.parent.is_dir():
            target.parent.rmdir()
        raise UserError(
            f"there is no data.path={str(target)!r}, and {url} could not be downloaded ({error}): set data.path to the file"
        ) from error


def text_file(path: str, url: str | None = None, **facts: Any) -> Text:
    """One UTF-8 file as one text."""
    return Text(Files([_file(path, url)], documents=False), **facts)


def lines(path: str, url: str | None = None, **facts: Any) -> Text:
    """A UTF-8 file of which each line is a document: names, SMILES molecules."""
    return Text(Lines([_file(path, url)], documents=True), **facts)


def text_folder(path: str, pattern: str, hidden: bool = True, links: bool = False, **facts: Any) -> Text:
    """All UTF-8 files below a folder whose names match `pattern`, in the order of their paths; each is a document.

    Args:
        hidden: those whose names, or those of folders above them, begin with a dot are texts too.
        links: linked folders are read too, and each file once, however many names lead to it.
    """
    root = Path(path)
    try:
        matches = {
            p for at in _folders(root, hidden, links) for p in at.glob(pattern) if p.is_file() and p.stat().st_size
        }
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data.pattern={pattern!r} is not a pattern of file names ({error}): try *.txt") from None
    files = sorted(p for p in matches if hidden or not _is_hidden(p, root))
    skipped = f"{len(matches) - len(files)} hidden files of {path}"
    if not files:
        but = f" but {skipped}, which data.hidden=true takes" if matches else ""
        raise UserError(f"data.path={path!r} holds no text (data.pattern={pattern!r}){but}: set one of them")
    if len(matches) > len(files):
        print(f"skipped {skipped}, such as {min(matches - {*files})} (data.hidden)", file=sys.stderr)
    if links:
        real, once, here = {p: p.resolve() for p in files}, {}, root.resolve()
        for p in sorted(files, key=lambda p: real[p] != here / p.relative_to(root)):  # its own name before its links'
            once.setdefault(real[p], p)
        files = sorted(once.values())
    source = Files(files, documents=True)
    data = Text(source, **facts)
    if copies := source.copies(data.shares):
        n, example = sum(map(len, copies)), " and ".join(str(p) for p in copies[0][:2])
        print(f"{n} files of {path} have exact copies in other splits, such as {example}", file=sys.stderr)
    return data


def _folders(root: Path, hidden: bool, links: bool) -> Iterator[Path]:
    """The folder and all below it, after them those that links lead to, each real one once; no link to a folder above it is
    followed, and none of a hidden one unless hidden ones are read."""
    tops, seen = [root], {*root.resolve().parents}
    for top in tops:
        for at, below, _ in os.walk(top):
            folder = Path(at)
            below.sort()
            if links:
                if (real := folder.resolve()) in seen:
                    below.clear()
                    continue
                seen.add(real)
                tops += [
                    p for p in map(folder.joinpath, below) if p.is_symlink() and (hidden or not _is_hidden(p, root))
                ]
            yield folder


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def python_docs(**facts: Any) -> Text:
    """The topics of Python's own `help()`: half a million characters of English and code in every installation."""
    from pydoc_data.topics import topics

    return Text(Embedded("\n\n".join(topics[name].strip() for name in sorted(topics))), **facts)
