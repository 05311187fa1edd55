"""Token ids of a text in files: prepared once, memory-mapped, cut into windows."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genai import progress
from genai.core import files, stored
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.data.fingerprint import checksum, files_checksum
from genai.data.mapped import MappedFile
from genai.modalities import published
from genai.modalities.tokenizers import LEARNED, Tokenizer, from_state, learn
from genai.modalities.words import Words

if TYPE_CHECKING:
    from genai.data.text_sources import Piece, Source

FORMAT = 1  # version of the prepared files
GROUP = 4 * 2**20  # characters that are encoded at once, on all cores
CHECKED = 2**16  # characters in which a published tokenizer is looked at for what it loses


def prepare(
    source: "Source", tokenizer: str | Tokenizer, vocab_size: int | None, shares: dict[str, float], cache: Path | None
) -> Path:
    """Return the folder with a text's token ids, `<split>.bin` for each split and `meta.json`; it is made if absent.

    The folder's name is a hash of the text and of everything that determines the ids. It is written under a temporary name and
    then renamed, so that two runs that prepare the same text at once both find a complete one.

    Args:
        source: the text.
        tokenizer: byte, char or bpe, a file or folder of a published one, or a tokenizer.
        vocab_size: number of ids, for bpe.
        shares: fraction of the text of each split, by name.
        cache: folder to look in and write to; None for the user's cache. If a checkpoint file, not the user, chose the folder,
            only reading there is allowed, and the user's cache is written.

    Raises UserError if the cache cannot be written.
    """
    named = tokenizer if isinstance(tokenizer, str) else None
    known: Tokenizer | None = None if isinstance(tokenizer, str) else tokenizer
    if named is not None and named not in LEARNED:
        known = published.read(named, source.documents)
    if known is not None and vocab_size is not None:
        raise UserError(
            f"data.vocab_size={vocab_size} is for data.tokenizer=bpe, and {named} has its own: leave it out"
        )
    chosen = named if known is None else known.state()
    identity = (FORMAT, source.kind, source.documents, chosen, vocab_size, shares)
    digest = hashlib.sha256(repr(identity).encode())
    source.fingerprint(digest)
    name = digest.hexdigest()[:24]
    if cache is not None and _is_complete(cache / name):
        return cache / name
    cache = _to_write(cache)
    folder = cache / name
    if _is_complete(folder):
        return folder
    if folder.exists():
        print(f"{folder} is damaged: its text is prepared again", file=sys.stderr)
    temporary, damaged = (cache / f".{folder.name}.{os.getpid()}.{kind}" for kind in ("tmp", "damaged"))
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        if known is not None and named is not None:
            _tell_losses(known, named, next((text for text, _ in source.pieces(0.0, shares["train"])), ""))
        ids = known or _learn([source], str(named), vocab_size, shares)
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
            if not _is_complete(folder):
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


def _learn(sources: "Sequence[Source]", kind: str, vocab_size: int | None, shares: dict[str, float]) -> Tokenizer:
    """Return a tokenizer learned from the training splits of sources, or the characters of all of them."""
    learn_from, size_bytes = 1.0 if kind == "char" else shares["train"], sum(source.size_bytes for source in sources)
    pieces = (text for source in sources for text, _ in source.pieces(0.0, learn_from))
    with progress.task(f"learning the tokenizer {kind}, once"):
        return learn(kind, pieces, size_bytes, vocab_size, sources[0].documents)


def _to_write(cache: Path | None) -> Path:
    """Return the folder of prepared texts to write to."""
    return cache_folder("text") if cache is None or stored.is_building() else cache


def learn_of_all(
    sources: "Sequence[Source]", tokenizer: str, vocab_size: int | None, shares: dict[str, float], cache: Path | None
) -> str | Tokenizer:
    """Return one tokenizer for several sources, learned from all of them once and then kept; a published one is its name.

    The arguments are those of `prepare`. Raises UserError as that does.
    """
    if tokenizer not in LEARNED:
        return tokenizer
    first = sources[0]
    digest = hashlib.sha256(repr((FORMAT, first.documents, tokenizer, vocab_size, shares)).encode())
    for source in sources:
        source.fingerprint(digest)
    path = _to_write(cache) / f"{digest.hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):
        return from_state(json.loads(path.read_text()))
    learned = _learn(sources, tokenizer, vocab_size, shares)
    files.write_text(path, json.dumps(learned.state()), hint="name another folder with data.cache=")
    return learned


def _tell_losses(tokenizer: Tokenizer, named: str, text: str) -> None:
    """Warn of a tokenizer that does not keep the beginning of a text as it is, such as one that has no upper case."""
    text = text[:CHECKED]
    back = tokenizer.decode(tokenizer.encode(text).tolist())
    if back == text:
        return
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    kept, left = text[at : at + 20], back[at : at + 20]
    print(
        f"the tokenizer {named} does not keep this text: {kept!r} becomes {left!r}; likelihoods are of what it keeps",
        file=sys.stderr,
    )


def bounds(shares: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return (first, last) of each split, as fractions of the text."""
    lasts = [round(last, 9) for last in itertools.accumulate(shares.values(), lambda a, b: round(a + b, 9))]
    lasts[-1] = 1.0
    return dict(zip(shares, itertools.pairwise([0.0, *lasts]), strict=True))


def _is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a prepared text, with each file as long as when it was written.

    Older folders do not note the lengths; theirs must be whole numbers of ids.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in meta["characters"]}
        whole = all(size % np.dtype(meta["dtype"]).itemsize == 0 for size in sizes.values())
        return whole and sizes == meta.get("bytes", sizes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _write(path: Path, pieces: "Iterator[Piece]", tokenizer: Tokenizer, dtype: str, task: progress.Task) -> int:
    """Write the token ids of pieces to a file; returns their number of characters. `task` counts MiB."""
    characters, size_bytes, done = 0, 0, task.done
    with path.open("wb") as file:
        for group in _groups(pieces):
            texts = [text for text, _ in group]
            for ids, (text, ends) in zip(tokenizer.encode_all(texts), group, strict=True):
                file.write(ids.astype(dtype).tobytes())
                if ends and tokenizer.end is not None:
                    file.write(np.array([tokenizer.end], dtype).tobytes())
                characters += len(text)
                size_bytes += len(text.encode(errors="surrogatepass"))
            task.done = done + (size_bytes >> 20)
    return characters


def _groups(pieces: "Iterator[Piece]") -> "Iterator[list[Piece]]":
    """Yield the pieces in groups that are encoded at once, of at least GROUP characters and one piece more."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def smallest_dtype(vocab_size: int) -> str:
    """Return the name of the smallest unsigned integer type that holds ids below `vocab_size`."""
    return "uint8" if vocab_size <= 2**8 else "uint16" if vocab_size <= 2**16 else "uint32"


class Windows:
    """A split of windows of `length` + 1 tokens, of which a model predicts all but the first.

    In evaluation (without draws) every token but the first of the stream is a target exactly once, as marked in `mask`:
    consecutive windows share `overlap` tokens, which are context only in the later one. In training each window is moved by a
    random offset of up to its length.

    A batch has tokens int64 (B, length + 1) and, without draws, mask bool (B, length + 1). With the id `end` of a document it has
    document int64 (B, length + 1) too, the document of which each token is context: an end is that of the next. With `words` it
    has word int64 (B, length + 1), the number of each token's word.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        characters: int,
        length: int,
        overlap: int,
        augments: bool,
        end: int | None = None,
        words: Words | None = None,
    ):
        self.end, self.words = end, words
        self.path, self.dtype, self.characters, self.augments = path, np.dtype(dtype), characters, augments
        self.length, self.overlap = length, 0 if augments else overlap
        self.mapped = MappedFile(path, self.dtype)
        self.tokens = self.mapped.size

    def __len__(self) -> int:
        return max(-(-(self.tokens - 1 - self.overlap) // (self.length - self.overlap)), 1)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        # Number of positions at which a window may start, and the distance between windows.
        starts, stride = self.tokens - self.length, self.length - self.overlap
        if self.augments and draws is not None:
            first = (index * self.length + (draws[:, 0] * self.length).long()) % starts
        else:
            first = (index * stride).clamp_max(starts - 1)
        at = first[:, None] + torch.arange(self.length + 1)
        batch = {"tokens": torch.from_numpy(self.mapped.numbers()[at.numpy()].astype(np.int64))}
        if draws is None:
            fresh = index * stride + self.overlap * (index > 0)  # the last token that was a target in an earlier window
            batch["mask"] = at > fresh[:, None]
        if self.end is not None:
            batch["document"] = (batch["tokens"] == self.end).cumsum(1)
        if self.words is not None:
            batch["word"] = self.words.number(batch["tokens"])
        return batch

    def fingerprint(self, quick: bool) -> str:
        """Return a checksum of the tokens, whatever the windows; if `quick` of the folder's name, which is a hash of the text."""
        folder, name = self.path.parent, self.path.name
        return checksum(self.dtype.str, folder.name if quick else files_checksum(folder, [name]), name)
