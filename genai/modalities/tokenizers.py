"""Tokenizers: text to ids and back. A checkpoint holds its tokenizer as plain values, so that sampling needs no other file.

Ids run from 0; with `end` one id, the last of our own tokenizers, is the end of a document, which is also in front of the first.
"""

import contextlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from genai.core import stored
from genai.core.errors import UserError
from genai.core.protocols import SPECIALS

SAMPLE_BYTES = 64 * 2**20  # of text at most that BPE learns its merges from
PARALLEL = "TOKENIZERS_PARALLELISM"
"""The environment variable by which the library tokenizers uses several threads: false or true."""
ONE_THREAD = "no"
"""The value that this module sets, which the library takes as false, so that a value of the user is not mistaken for it."""
MAX_WORD_BYTES = (
    1024  # longer words are split while learning: each merge rescans its words, and text without spaces is one word
)

LEARNED = "byte", "char", "bpe"
"""Tokenizers that are made from a text; any other name is a file."""


class Tokenizer(Protocol):
    """The interface of tokenizers: `decode` inverts `encode` on every text that can be encoded."""

    vocab_size: int
    end: int | None
    mask: int | None
    """The id that stands for a hidden token, None without special ids."""

    def encode(self, text: str) -> np.ndarray:
        """Encode a text as ids (T,). Raises UserError that names a character without an id."""
        ...

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each of many texts, on all cores where that pays."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; ends of documents are left out, bytes that are not UTF-8 become U+FFFD."""
        ...

    def state(self) -> dict[str, Any]:
        """Return a config node of plain values that restores the tokenizer."""
        ...


class Byte:
    """The 256 bytes of UTF-8: encodes any text, without learning."""

    STATE_TYPES: ClassVar[dict[str, type]] = {}
    mask: int | None = None

    def __init__(self, end: bool = False):
        self.vocab_size, self.end = 256 + end, 256 if end else None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def state(self) -> dict[str, Any]:
        return {"_target_": "genai.modalities.tokenizers.Byte", "end": self.end is not None}


class Char:
    """One id for each character of `chars`, which must be in ascending order of code points.

    Raises UserError for other `chars`.
    """

    STATE_TYPES: ClassVar[dict[str, type]] = {"chars": str}
    mask: int | None = None

    def __init__(self, chars: str, end: bool = False):
        if not chars or any(a >= b for a, b in itertools.pairwise(chars)):
            raise UserError("the characters of a tokenizer are not one or more in the order of code points")
        self.chars, self.codes = chars, np.array([ord(c) for c in chars], dtype=np.uint32)
        self.vocab_size, self.end = len(chars) + end, len(chars) if end else None

    @classmethod
    def learn(cls, chunks: Iterable[str], end: bool = False) -> "Char":
        """Build the tokenizer of all characters that occur in chunks of text."""
        seen: set[str] = set()
        for chunk in chunks:
            seen.update(chunk)
        return cls("".join(sorted(seen)), end)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        wrong = self.codes[ids] != codes
        if wrong.any():
            char = chr(codes[wrong.argmax()])
            raise UserError(
                f"the character {char!r} (U+{ord(char):04X}) is not among the {len(self.chars)} that this tokenizer "
                "learned: leave it out, or train with data.tokenizer=byte, which has no unknown characters"
            )
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.chars[i] for i in ids if i < len(self.chars))

    def state(self) -> dict[str, Any]:
        return {"_target_": "genai.modalities.tokenizers.Char", "chars": self.chars, "end": self.end is not None}


class Word:
    """One id for each word of `words`, different words in ascending order with a space between; a text is words and white space.

    Decoding puts one space between two words. Raises UserError for other `words`.
    """

    STATE_TYPES: ClassVar[dict[str, type]] = {"words": str}
    mask: int | None = None

    def __init__(self, words: str, end: bool = False):
        self.words = words.split(" ")
        if any(a >= b for a, b in itertools.pairwise(self.words)) or self.words != words.split():
            raise UserError("the words of a tokenizer are not one or more in the order of code points")
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.vocab_size, self.end = len(self.words) + end, len(self.words) if end else None

    @classmethod
    def learn(cls, chunks: Iterable[str], end: bool = False) -> "Word":
        """Build the tokenizer of all words that occur in chunks of text, which must not be cut within words."""
        return cls(" ".join(sorted({word for chunk in chunks for word in chunk.split()})), end)

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        if unknown := [word for word in words if word not in self.ids]:
            raise UserError(
                f"the word {unknown[0]!r} is not among the {len(self.words)} that this tokenizer learned: leave it out, or "
                "train with another tokenizer"
            )
        return np.array([self.ids[word] for word in words], dtype=np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids if i < len(self.words))

    def state(self) -> dict[str, Any]:
        return {
            "_target_": "genai.modalities.tokenizers.Word",
            "words": " ".join(self.words),
            "end": self.end is not None,
        }


class BPE:
    """Byte-level byte-pair encoding (Sennrich et al. 2016) by the `tokenizers` library, restored from its JSON `spec`.

    Raises UserError for the spec of another kind of tokenizer.
    """

    STATE_TYPES: ClassVar[dict[str, type]] = {"spec": str}
    mask: int | None = None

    def __init__(self, spec: str, end: bool = False):
        try:
            found = json.loads(spec)
            parts = {name: part.get("type") for name, part in found.items() if isinstance(part, dict)}
            extras = [name for name, part in found.items() if isinstance(part, list) and part]
            if parts != {"pre_tokenizer": "ByteLevel", "decoder": "ByteLevel", "model": "BPE"} or extras:
                raise UserError("the spec of a tokenizer is not that of a byte-level BPE alone")
            self.spec, self.bpe = spec, library().Tokenizer.from_str(spec)
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"the spec of a tokenizer cannot be read: {error}") from error
        self.words = self.bpe.get_vocab_size()
        self.vocab_size, self.end = self.words + end, self.words if end else None

    @classmethod
    def learn(cls, chunks: Iterable[str], vocab_size: int, end: bool = False) -> "BPE":
        """Learn merges of the most frequent pairs until there are `vocab_size` ids, including the end of document.

        Words longer than MAX_WORD_BYTES are learned from in parts, so that the time is linear in the text.
        """
        made = library()
        bpe = made.Tokenizer(made.models.BPE())
        words = made.pre_tokenizers.ByteLevel(add_prefix_space=False)
        parts = made.pre_tokenizers.Split(made.Regex(f".{{1,{MAX_WORD_BYTES}}}"), "isolated")
        bpe.pre_tokenizer = made.pre_tokenizers.Sequence([words, parts])
        bpe.decoder = made.decoders.ByteLevel()
        trainer = made.trainers.BpeTrainer(
            vocab_size=vocab_size - end,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=sorted(made.pre_tokenizers.ByteLevel.alphabet()),
        )
        with _on_all_cores():
            bpe.train_from_iterator(chunks, trainer)
        bpe.pre_tokenizer = words
        return cls(bpe.to_str(), end)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array(self.bpe.encode(text).ids, dtype=np.int64)
        except (TypeError, UnicodeEncodeError):
            raise UserError(
                f"{text!r} contains bytes that are not UTF-8, which data.tokenizer=bpe cannot encode"
            ) from None

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return _encode_all(self.bpe, texts, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        return self.bpe.decode([i for i in ids if i < self.words], skip_special_tokens=False)

    def state(self) -> dict[str, Any]:
        return {"_target_": "genai.modalities.tokenizers.BPE", "spec": self.spec, "end": self.end is not None}


class Published:
    """A tokenizer of others, restored from the JSON `spec` of the `tokenizers` library, see `genai.modalities.published`.

    Special tokens are ids of their own: a text that has their letters stays text. Some tokenizers do not keep a text as it is;
    `decode` then gives back what is left of it.

    Args:
        spec: as in a tokenizer.json.
        token: that ends a document; "" for one that is added after the others.
        end: whether documents end with it.

    Raises UserError for a spec that is none, and a token that it does not have.
    """

    STATE_TYPES: ClassVar[dict[str, type]] = {"spec": str, "token": str}
    mask: int | None = None

    def __init__(self, spec: str, token: str = "", end: bool = False):
        try:
            self.library = library().Tokenizer.from_str(spec)
            self.library.no_truncation()
            self.library.no_padding()
            self.library.encode_special_tokens = True
            ids = self.library.get_vocab(with_added_tokens=True)
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"the spec of a tokenizer cannot be read: {error}") from error
        if not ids:
            raise UserError("the spec of a tokenizer has no tokens")
        if token and token not in ids:
            raise UserError(f"the token {token!r}, which ends documents, is not in the vocabulary of this tokenizer")
        self.spec, self.token, words = spec, token, max(ids.values()) + 1
        self.end = ids.get(token, words) if end else None
        self.vocab_size = max(words, -1 if self.end is None else self.end + 1)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.array(self.library.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        except (TypeError, UnicodeEncodeError):
            raise UserError(f"{text!r} contains bytes that are not UTF-8, which this tokenizer cannot encode") from None

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return _encode_all(self.library, texts, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode([i for i in ids if i != self.end], skip_special_tokens=False)

    def state(self) -> dict[str, Any]:
        target = "genai.modalities.tokenizers.Published"
        return {"_target_": target, "spec": self.spec, "token": self.token, "end": self.end is not None}


class WithSpecials:
    """Another tokenizer with the ids of `SPECIALS` after its own.

    `encode` never returns them, so a text that has the letters "[MASK]" stays text; `decode` shows them by name.

    Args:
        inner: the other tokenizer.
        closed: whether documents end with [SEP], which `decode` then leaves out; `inner` must have no end of its own.
    """

    def __init__(self, inner: Tokenizer, closed: bool = False):
        if type(closed) is not bool or (closed and inner.end is not None):
            raise UserError(
                "a tokenizer WithSpecials has one end of documents, [SEP] or that of the tokenizer inside it"
            )
        self.inner, self.words, self.closed = inner, inner.vocab_size, closed
        self.end = self.words + SPECIALS.index("[SEP]") if closed else inner.end
        self.vocab_size = self.words + len(SPECIALS)
        self.mask: int | None = self.words + SPECIALS.index("[MASK]")

    def encode(self, text: str) -> np.ndarray:
        return self.inner.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.inner.encode_all(texts)

    def decode(self, ids: Sequence[int]) -> str:
        runs = itertools.groupby((i for i in ids if i != self.end), lambda i: i >= self.words)
        return "".join(
            "".join(SPECIALS[i - self.words] for i in run) if special else self.inner.decode([*run])
            for special, run in runs
        )

    def state(self) -> dict[str, Any]:
        closed = {"closed": True} if self.closed else {}  # older files have no such key
        return {"_target_": "genai.modalities.tokenizers.WithSpecials", "inner": self.inner.state(), **closed}


def from_state(node: dict[str, Any]) -> Tokenizer:
    """Restore a tokenizer from its `state()`; only those of this project are built.

    Raises UserError for any other description.
    """
    if not isinstance(node, dict):
        raise UserError(f"a tokenizer is described by a dict with a _target_, not by a {type(node).__name__}")
    arguments = stored.up_to_date(node)
    target = arguments.pop("_target_", None)
    if target == f"{__name__}.WithSpecials":
        if arguments.keys() - {"closed"} != {"inner"} or "inner" in (inner := arguments["inner"]):
            raise UserError("a tokenizer WithSpecials is described by the tokenizer inside it and closed alone")
        return WithSpecials(from_state(inner), arguments.get("closed", False))
    kind = {f"{__name__}.{kind.__name__}": kind for kind in (Byte, Char, Word, BPE, Published)}.get(str(target))
    if kind is None:
        raise UserError(f"{target} is not a tokenizer of this project")
    if {name: type(value) for name, value in arguments.items()} != {**kind.STATE_TYPES, "end": bool}:
        raise UserError(f"a tokenizer {kind.__name__} is described by {', '.join([*kind.STATE_TYPES, 'end'])} alone")
    return kind(**arguments)


def learn(kind: str, chunks: Iterator[str], size_bytes: int, vocab_size: int | None, end: bool) -> Tokenizer:
    """Build the tokenizer `kind` (byte, char or bpe), learned from chunks of a text of about `size_bytes`.

    Raises UserError for an invalid kind or vocab_size.
    """
    if kind == "bpe":
        least = 256 + end
        if not isinstance(vocab_size, int) or vocab_size < least:
            raise UserError(f"data.vocab_size={vocab_size} must be a whole number, at least {least}, for bpe")
        return BPE.learn(subsample(chunks, size_bytes), vocab_size, end)
    if vocab_size is not None:
        raise UserError(f"data.vocab_size={vocab_size} is for data.tokenizer=bpe, this is {kind}: leave it out")
    if kind == "byte":
        return Byte(end)
    if kind == "char":
        return Char.learn(chunks, end)
    raise UserError(f"data.tokenizer={kind!r} must be one of {', '.join(LEARNED)}")


def subsample(chunks: Iterator[str], size_bytes: int, seed: int = 0) -> Iterator[str]:
    """Yield the chunks of a text, or a random subset of about SAMPLE_BYTES, which is then reported."""
    if size_bytes <= SAMPLE_BYTES:
        yield from chunks
        return
    share, draw = SAMPLE_BYTES / size_bytes, random.Random(seed)
    print(f"bpe: learning from {SAMPLE_BYTES / 2**20:.0f} of {size_bytes / 2**20:.0f} MiB, drawn with seed {seed}")
    yield from (chunk for chunk in chunks if draw.random() < share)


def _encode_all(made: Any, texts: Sequence[str], encode: Callable[[str], np.ndarray]) -> list[np.ndarray]:
    """Encode texts by the library's tokenizer on all cores; `encode` says what is wrong with one that cannot be encoded."""
    try:
        with _on_all_cores():
            found = made.encode_batch_fast([*texts], add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        return [encode(text) for text in texts]
    return [np.array(one.ids, dtype=np.int64) for one in found]


@contextlib.contextmanager
def _on_all_cores() -> Iterator[None]:
    """Return a context in which the library uses a thread for each core, unless the user's environment says otherwise.

    Outside of it there is one thread, so that processes that fork, such as workers of a loader, need not be warned of.
    """
    chosen = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true" if chosen in (None, ONE_THREAD) else chosen
    try:
        yield
    finally:
        os.environ[PARALLEL] = ONE_THREAD if chosen is None else chosen


def library() -> Any:
    """Return the package tokenizers. Raises UserError if it is not installed."""
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("a tokenizer of this kind needs the package tokenizers: pip install tokenizers") from error
    return tokenizers
