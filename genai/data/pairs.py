"""Data sets of pairs of texts, and files of them."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import checksum
from genai.data.scan import reason
from genai.modalities import pairs as modalities
from genai.modalities import tokenizers
from genai.modalities.tokenizers import Tokenizer, WithSpecials, Word

Pair = tuple[str, str]
"""A source and a target."""

EXAMPLES = 100  # sources of the validation split that a checkpoint keeps, to show


class Pairs(Data):
    """Pairs of texts, tokenized once. All pairs of one source are in one split.

    Args:
        pairs: in any order, none of them empty.
        tokenizer: of sources: byte, char, word, or bpe with `vocab_size` ids.
        target_tokenizer: as `tokenizer`, with `target_vocab_size`; None for one tokenizer of both sides.
        longest: tokens of a source or target; longer pairs are left out, which is said.
        val, test: fractions of the sources for validation and test.
        shape: [tokens of the longest target, its end included]; None takes the data's own.
        levels, source_levels: vocabulary sizes of targets and sources; None takes the tokenizer's.
        field, classes, batch_size, num_workers: see `Data`.
        source_specials: give sources the ids of [MASK], [CLS], [SEP] and [PAD] after those of the text; [SEP] ends them.
        learn_from: further texts that the tokenizer of sources learns from.

    Raises UserError for shares that leave nothing to train on, and for facts that differ from the data's own.
    """

    more_facts = ("source_levels",)

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: str,
        target_tokenizer: str | None,
        vocab_size: int | None,
        target_vocab_size: int | None,
        longest: int,
        val: float,
        test: float,
        field: str,
        shape: Sequence[int] | None,
        classes: None,
        levels: int | None,
        source_levels: int | None,
        batch_size: int,
        num_workers: int = 0,
        source_specials: bool = False,
        learn_from: Sequence[str] = (),
    ):
        at_least(longest, 1, "data.longest")
        targets: dict[str, dict[str, None]] = {}
        for source, target in pairs:
            targets.setdefault(source, {})[target] = None
        parts = _split([*targets], val, test)
        of_sources = [*targets]
        of_targets = [target for each in targets.values() for target in each]
        if target_tokenizer is None:
            if target_vocab_size is not None:
                raise UserError(
                    f"data.target_vocab_size={target_vocab_size} is for a tokenizer of targets alone: set data.target_tokenizer"
                )
            if source_specials:
                raise UserError(
                    "data.source_specials=true is for sources with a tokenizer of their own: set data.target_tokenizer"
                )
            own = theirs = _learn(tokenizer, of_sources + of_targets, vocab_size, "")
        else:
            own = _learn(tokenizer, [*of_sources, *learn_from], vocab_size, "", not source_specials)
            own = WithSpecials(own, closed=True) if source_specials else own
            theirs = _learn(target_tokenizer, of_targets, target_vocab_size, "target_")
        rows = {
            source: (modalities.with_end(own, source), [modalities.with_end(theirs, target) for target in each])
            for source, each in targets.items()
        }
        kept = {source: row for source, row in rows.items() if max(map(len, [row[0], *row[1]])) <= longest + 1}
        if dropped := [source for source in rows if source not in kept]:
            print(
                f"{len(dropped)} of {len(rows)} sources are left out, as they or their targets have more than {longest} tokens "
                f"(data.longest), such as {dropped[0][:60]!r}",
                file=sys.stderr,
            )
        splits: dict[str, Split] = {}
        for name, part in parts.items():
            if not (found := [kept[source] for source in part if source in kept]):
                raise UserError(
                    f"the {name} split has no pairs of at most {longest} tokens a side: give more pairs, or a larger "
                    "data.longest"
                )
            characters = [len(target) for source in part if source in kept for target in targets[source]]
            splits[name] = PairSplit(found, every=name == "train", characters=sum(characters) / len(characters))
        self.source_levels = own.vocab_size
        one = all(len(target) == 2 for _, each in kept.values() for target in each)
        self.labels = len({int(target[0]) for _, each in kept.values() for target in each}) if one else None
        """The number of different targets if each is one token; else None."""
        if source_levels is not None and source_levels != own.vocab_size:
            raise UserError(
                f"data.source_levels={source_levels}, but this data has {own.vocab_size}: correct it or set it to null"
            )
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=splits,
            found_shape=[max(len(target) for _, each in kept.values() for target in each)],
            class_names=None,
            found_levels=theirs.vocab_size,
            modality=modalities.Target(theirs),
        )
        examples = [source for source in parts["val"] if source in kept][:EXAMPLES]
        self.conditions["source"] = modalities.Source(own, examples)


class PairSplit:
    """A split of pairs; with `every` an item is a pair, else a source with the first of its targets.

    A batch has `source` int64 (B, S), see `modalities.pairs.Source`; `tokens` int64 (B, 1 + T), the end of document, then target
    and end, padded with ends; and their `mask`. Both are as long as the longest of the batch.

    Args:
        items: of each source its ids (S,) and the ids of its targets (T,), all with the end of document.
        characters: of a target, on average.
    """

    augments = False

    def __init__(self, items: Sequence[tuple[Tensor, Sequence[Tensor]]], every: bool, characters: float):
        self.targets = [list(each) for _, each in items]
        chosen = [each if every else each[:1] for each in self.targets]
        self.rows = [(source, target) for (source, _), each in zip(items, chosen, strict=True) for target in each]
        self.owners = [i for i, each in enumerate(chosen) for _ in each]
        self.lengths = torch.tensor([len(source) + len(target) for source, target in self.rows])
        self.end = int(self.targets[0][0][-1])
        self.tokens = sum(len(target) for _, target in self.rows)
        self.characters = characters * len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        sources, targets = zip(*(self.rows[i] for i in index.tolist()), strict=True)
        tokens = pad_sequence([*targets], batch_first=True, padding_value=self.end)
        tokens = torch.cat([torch.full((len(tokens), 1), self.end), tokens], 1)
        lengths = torch.tensor([len(target) for target in targets])
        at = torch.arange(tokens.shape[1])
        return {
            "source": modalities.pad_sources(sources),
            "tokens": tokens,
            "mask": (at > 0) & (at <= lengths[:, None]),
        }

    def references(self, index: Tensor) -> list[list[list[int]]]:
        """Return all targets of the sources of items `index` (B,), without their ends."""
        return [[target[:-1].tolist() for target in self.targets[self.owners[i]]] for i in index.tolist()]

    def fingerprint(self, quick: bool) -> str:
        sides = [torch.cat(side) for side in zip(*self.rows, strict=True)]
        return checksum(*sides, self.lengths, len(self.targets), quick=quick)


def _split(sources: list[str], val: float, test: float) -> dict[str, list[str]]:
    """Return the sources of each split, in a fixed random order."""
    number(val, "data.val", 0, 1)
    number(test, "data.test", 0, 1)
    if not (val > 0 and val + test < 1):
        raise UserError(f"data.val={val}, data.test={test}: shares above 0 (test may be 0) that leave some to train")
    n = len(sources)
    sizes = {"test": max(round(n * test), 1) if test else 0, "val": max(round(n * val), 1)}
    if n <= sum(sizes.values()):
        raise UserError(f"there are {n} different sources, too few to set some aside for validation and test: add some")
    order = np.random.default_rng(0).permutation(n).tolist()
    cuts = [sizes["test"], sizes["test"] + sizes["val"]]
    parts = {"train": order[cuts[1] :], "val": order[cuts[0] : cuts[1]], "test": order[: cuts[0]]}
    return {name: [sources[i] for i in part] for name, part in parts.items() if part}


def _learn(kind: str, texts: Sequence[str], vocab_size: int | None, which: str, end: bool = True) -> Tokenizer:
    """Learn a tokenizer from texts, by default with an end of document. Raises UserError that names data.<which>tokenizer."""
    if kind == "word":
        if vocab_size is not None:
            raise UserError(f"data.{which}vocab_size={vocab_size} is for bpe, and this tokenizer is word: leave it out")
        return Word.learn(texts, end)
    size_bytes = sum(len(text) for text in texts)
    return tokenizers.learn(
        kind, (f"{text}\n" if kind == "bpe" else text for text in texts), size_bytes, vocab_size, end
    )


def pairs(path: str, target_path: str | None = None, **facts: Any) -> Pairs:
    """Build the data set of the pairs in a file, or in two.

    Args:
        path: UTF-8: .jsonl with a `source` and a `target` in each line; of any other name lines of source, tab and target.
        target_path: file with the targets of the sources in `path`, line by line.
        facts: further arguments of `Pairs`.

    Pairs with an empty side are left out, counted and named. Raises UserError for a file that cannot be read as that, and for two
    files of different length.
    """
    lines = _lines(path, "data.path")
    if target_path is not None:
        theirs = _lines(target_path, "data.target_path")
        if len(lines) != len(theirs):
            raise UserError(
                f"{path} has {len(lines)} lines and {target_path} {len(theirs)}: line k of data.target_path must be the target "
                "of line k of data.path"
            )
        found: Iterable[Pair] = zip(lines, theirs, strict=True)
    else:
        found = _json_pairs(path, lines) if path.endswith((".jsonl", ".ndjson")) else _tab_pairs(path, lines)
    kept, empty = [], []
    for at, (source, target) in enumerate(found, 1):
        source, target = source.strip(), target.strip()
        if source and target:
            kept.append((source, target))
        else:
            empty.append((at, "source" if target else "target" if source else "source and target"))
    if not kept:
        raise UserError(f"data.path={path!r} has no pairs with both a source and a target: name another file")
    if empty:
        named = ", ".join(f"line {at} ({side})" for at, side in empty[:3]) + (", ..." if len(empty) > 3 else "")
        print(f"{path}: {len(empty)} of {len(lines)} pairs are left out, as a side is empty: {named}", file=sys.stderr)
    return Pairs(kept, **facts)


def _lines(path: str, key: str) -> list[str]:
    """Return the lines of a UTF-8 file without their ends. Raises UserError that names the config key."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{key}={path!r} cannot be read ({error.strerror}): name a file of pairs") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path!r} is not UTF-8 ({reason(error)}): convert the file") from error
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _tab_pairs(path: str, lines: Sequence[str]) -> Iterator[Pair]:
    for at, line in enumerate(lines, 1):
        sides = line.split("\t")
        if len(sides) > 2 or (len(sides) < 2 and line.strip()):
            raise UserError(
                f"data.path={path!r}, line {at}, has {len(sides) - 1} tabs: a line is a source, a tab and a target (or name the "
                "file of targets with data.target_path)"
            )
        yield sides[0], sides[-1] if len(sides) == 2 else ""


def _json_pairs(path: str, lines: Sequence[str]) -> Iterator[Pair]:
    for at, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else {}
            sides = entry.get("source") or "", entry.get("target") or ""
            if not all(isinstance(side, str) for side in sides):
                raise TypeError("source and target must be strings")
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"data.path={path!r}, line {at}, is not JSON with source and target ({error})") from None
        yield sides
