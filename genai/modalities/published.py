"""Published tokenizers, read from files: a tokenizer.json, the vocabulary and merges of a GPT-2, or the ranks of tiktoken.

Nothing is downloaded. What is read becomes one specification of the `tokenizers` library, which a checkpoint holds as it holds a
tokenizer of our own.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from genai.core.errors import UserError
from genai.modalities.tokenizers import Published, library

WHAT = "a tokenizer.json, a file of ranks such as cl100k_base.tiktoken, or a folder with one or with vocab.json and merges.txt"
PAIRS = ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")
END = "<|endoftext|>"


class Ranks(NamedTuple):
    """The facts that a published file of ranks leaves to its program: how a text is cut into words, and special tokens."""

    pattern: str
    special: dict[str, int]


GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER, SUFFIX = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
RANKS = {
    "gpt2": Ranks(GPT2_WORDS, {END: 50256}),
    "r50k_base": Ranks(GPT2_WORDS, {END: 50256}),
    "p50k_base": Ranks(GPT2_WORDS, {END: 50256}),
    "cl100k_base": Ranks(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]|\s+(?!\S)|\s",
        {
            END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Ranks(
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{SUFFIX}|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END: 199999, "<|endofprompt|>": 200018},
    ),
}


def read(named: str, end: bool) -> Published:
    """Read the tokenizer in a file or folder; with `end` a special token of its own ends documents, or else one id more.

    That is the token that tokenizer_config.json or special_tokens_map.json calls eos_token, or the only special one.

    Raises UserError if there is none, or it cannot be read.
    """
    path = Path(named)
    if path.is_dir():
        return _read_folder(path, end)
    if not path.is_file():
        raise UserError(f"data.tokenizer={named!r} must be byte, char, bpe, or a file or folder that exists: {WHAT}")
    return _read_ranks(path, end) if path.suffix == ".tiktoken" else _read_spec(path, end)


def _read_folder(folder: Path, end: bool) -> Published:
    if (path := folder / "tokenizer.json").is_file():
        return _read_spec(path, end)
    for vocabulary, merges in PAIRS:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _read_merges(folder / vocabulary, folder / merges, end)
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) != 1:
        found = f"{len(ranks)} files of ranks" if ranks else "no tokenizer"
        raise UserError(f"data.tokenizer={str(folder)!r} is a folder with {found}: name {WHAT}")
    return _read_ranks(ranks[0], end)


def _read_spec(path: Path, end: bool) -> Published:
    spec = _text(path)
    found = _json(path, spec)
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise UserError(f"data.tokenizer: {path} is JSON, but not of a tokenizer: name {WHAT}")
    added = found.get("added_tokens")
    special = [str(one.get("content")) for one in added or () if isinstance(one, dict) and one.get("special")]
    return _published(path, spec, special, end)


def _read_merges(vocabulary: Path, merges: Path, end: bool) -> Published:
    """Read the two files of GPT-2's release, and of those that copy it."""
    ids = _json(vocabulary, _text(vocabulary))
    lines = [line for line in _text(merges).split("\n") if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines]
    letters = set(_letters().values())
    if not isinstance(ids, dict) or not letters <= ids.keys() or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"data.tokenizer: {vocabulary} and {merges} are not the byte-level vocabulary and merges of GPT-2's release: "
            "name the tokenizer.json of this tokenizer"
        )
    special = [END] if END in ids else []
    return _published(vocabulary, _byte_level(vocabulary, ids, pairs, GPT2_WORDS, special, False), special, end)


def _read_ranks(path: Path, end: bool) -> Published:
    """Read a file of lines `base64(bytes) rank`: the lower the rank of two neighbours together, the earlier they merge."""
    if path.stem not in RANKS:
        raise UserError(
            f"data.tokenizer: {path} holds ranks, but not how a text is cut into words, which goes by its name: it must be "
            f"one of {', '.join(RANKS)}, as published; name the tokenizer.json of others"
        )
    pattern, special = RANKS[path.stem]
    try:
        pairs = [line.split() for line in _text(path).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(
            f"data.tokenizer: {path} is not a file of ranks, lines of base64 and a number: {error}"
        ) from None
    letters = _letters()
    if any(bytes([i]) not in ranks for i in range(256)) or {*ranks.values()} & {*special.values()}:
        raise UserError(f"data.tokenizer: {path} is not all of the file of ranks {path.stem}: fetch it again")
    name = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # Whatever two tokens make up a third may be merged into it.
    merges = [
        (name[token[:i]], name[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    ids = {name[token]: rank for token, rank in ranks.items()} | special
    return _published(path, _byte_level(path, ids, merges, pattern, [*special], True), [END], end)


def _byte_level(
    path: Path, ids: Mapping[str, int], merges: Any, pattern: str, special: list[str], whole_words: bool
) -> str:
    """Return the specification of a byte-level BPE; `whole_words` are tokens wherever they are one, whatever the merges."""
    made = library()
    try:
        bpe = made.Tokenizer(made.models.BPE(dict(ids), merges, ignore_merges=whole_words))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"data.tokenizer: {path} and its merges do not fit together: {error}") from None
    words = made.pre_tokenizers.Split(made.Regex(pattern), "isolated")
    letters = made.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = made.pre_tokenizers.Sequence([words, letters])
    bpe.decoder = made.decoders.ByteLevel()
    bpe.add_special_tokens(special)
    return bpe.to_str()


def _published(path: Path, spec: str, special: list[str], end: bool) -> Published:
    """Return the tokenizer of a specification; `special` are its special tokens."""
    token = ""
    if end:
        names = path.with_name("tokenizer_config.json"), path.with_name("special_tokens_map.json")
        for config in (_json(one, _text(one)) for one in names if one.is_file()):
            named = config.get("eos_token") if isinstance(config, dict) else None
            named = named.get("content") if isinstance(named, dict) else named
            token = token or (named if isinstance(named, str) else "")
        token = token or (special[0] if len(special) == 1 else "")
    try:
        return Published(spec, token, end)
    except UserError as error:
        raise UserError(f"data.tokenizer: {path}: {error}") from None


def _letters() -> dict[int, str]:
    """Return the letter that stands for each byte in GPT-2's files: itself where it is printed, else one from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.tokenizer: {path} cannot be read ({error}): name {WHAT}") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.tokenizer: {path} is not JSON ({error}): name {WHAT}") from None
