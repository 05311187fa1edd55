"""Data sets of text: one file, the lines of a file, the files of a folder."""

import http.client
import json
import os
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genai import progress
from genai.core import stored
from genai.core.errors import UserError, at_least, number
from genai.data.base import Data
from genai.data.mixture import Mixture
from genai.data.text_sources import Corpora, Embedded, Lines, Source, TextFiles
from genai.data.token_files import Windows, learn_of_all, prepare
from genai.modalities import text as modalities
from genai.modalities.tokenizers import WithSpecials, from_state
from genai.modalities.words import Words


class Text(Data):
    """A text, or several that are mixed, tokenized once, in splits of windows.

    Args:
        source: of the text, or `Corpora`.
        tokenizer: byte, char, or bpe with `vocab_size` ids; or a file or folder of a published one.
        val, test: fractions of the text for validation and test.
        overlap: tokens of context that consecutive evaluation windows share.
        cache: folder of prepared texts, default $XDG_CACHE_HOME/genai or ~/.cache/genai.
        specials: give the vocabulary the ids of [MASK], [CLS], [SEP] and [PAD] after those of the text.
        words: give each token the number of its word, for models that hide whole words.
        shape: [context length in tokens].
        levels: vocabulary size; None takes the tokenizer's.
        field, classes, batch_size, num_workers: see `Data`.
        separate: keep documents apart: a token is predicted from those of its own document in the window alone.

    Raises UserError for `separate` where a text has no documents, shares that leave nothing to train on, or a split that is too
    short for one window.
    """

    def __init__(
        self,
        source: Source | Corpora,
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
        separate: bool = False,
        specials: bool = False,
        words: bool = False,
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
        corpora = source.sources if isinstance(source, Corpora) else {"": source}
        at = Path(cache) if cache else None
        learned = (
            tokenizer if len(corpora) == 1 else learn_of_all([*corpora.values()], tokenizer, vocab_size, shares, at)
        )
        size = vocab_size if isinstance(learned, str) else None
        folders = {name: prepare(one, learned, size, shares, at) for name, one in corpora.items()}
        metas = {name: json.loads((folder / "meta.json").read_text()) for name, folder in folders.items()}
        own = from_state(next(iter(metas.values()))["tokenizer"])
        self.words, self.tokenizer = own.vocab_size, WithSpecials(own) if specials else own
        if separate and self.tokenizer.end is None:
            raise UserError(
                "data.separate=true is for a text of documents: leave it out, or choose data=lines or text_folder"
            )
        end, splits = self.tokenizer.end if separate else None, {}
        edges = Words.of(self.tokenizer) if words else None
        for name in shares:
            parts = {}
            for of, folder in folders.items():
                path, meta = folder / f"{name}.bin", metas[of]
                facts = meta["dtype"], meta["characters"][name], length, overlap, name == "train", end, edges
                parts[of] = part = Windows(path, *facts)
                if part.tokens <= length:
                    which = f"{name} split of {of}" if of else f"{name} split"
                    raise UserError(
                        f"the {which} has {part.tokens} tokens, too few for one window of {length} + 1: give more text, a "
                        f"shorter data.shape, or {'smaller shares to others' if name == 'train' else f'a larger data.{name}'}"
                    )
            splits[name] = Mixture(parts, source.proportions) if isinstance(source, Corpora) else parts[""]
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

    @property
    def values(self) -> int:
        return self.words  # special ids are not in the text


def file_at(path: str, url: str | None) -> Path:
    """Return the path of a text file, downloaded from `url` if absent. Raises UserError if there is none, or it is empty."""
    target = Path(path)
    if not target.exists() and url is not None:
        if stored.is_building():
            raise UserError(
                f"there is no data.path={path!r}, and nothing is downloaded because a checkpoint says so: python train.py "
                "with the data= it was trained on downloads it"
            )
        _download(target, url)
    if not target.is_file():
        raise UserError(f"data.path={path!r} is not a file: set data.path to a UTF-8 text file")
    if target.stat().st_size == 0:
        raise UserError(f"data.path={path!r} is empty: set data.path to a text file with content")
    return target


def read_file(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read ({why}): set data.path to UTF-8 text") from None


def _download(target: Path, url: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    existed = target.parent.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with progress.task(f"downloading {url}"), urllib.request.urlopen(url, timeout=30) as answer:
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
    """Build the data set of one UTF-8 file, as one continuous text."""
    return Text(TextFiles([file_at(path, url)], documents=False), **facts)


def lines(path: str, url: str | None = None, **facts: Any) -> Text:
    """Build the data set of a UTF-8 file in which each line is a document, such as names or SMILES molecules."""
    return Text(Lines([file_at(path, url)], documents=True), **facts)


def text_folder(path: str, pattern: str, hidden: bool = True, links: bool = False, **facts: Any) -> Text:
    """Build the data set of all UTF-8 files below a folder whose names match `pattern`, sorted by path; each is a document.

    Args:
        hidden: whether to include files whose name, or a folder of whose path, begins with a dot.
        links: whether to follow links to folders; each file is then read once, however many paths lead to it.
        facts: further arguments of `Text`.

    Raises UserError if no file matches.
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
        for p in sorted(files, key=lambda p: real[p] != here / p.relative_to(root)):  # own paths before links
            once.setdefault(real[p], p)
        files = sorted(once.values())
    source = TextFiles(files, documents=True)
    data = Text(source, **facts)
    if copies := source.copies(data.shares):
        n, example = sum(map(len, copies)), " and ".join(str(p) for p in copies[0][:2])
        print(f"{n} files of {path} have exact copies in other splits, such as {example}", file=sys.stderr)
    return data


def mixed_text(paths: Sequence[str], proportions: Sequence[float] | None, pattern: str, **facts: Any) -> Text:
    """Build the data set of several corpora that are mixed in proportions in training; evaluations score each as well.

    Args:
        paths: a UTF-8 file or a folder for each corpus; each file is a document.
        proportions: how often a training window is of each corpus; None for their sizes in bytes.
        pattern: of the names of the files below folders.
        facts: further arguments of `Text`.

    Raises UserError for fewer than two corpora, one that is given twice or has no text, and proportions that do not fit.
    """
    files = {path: _corpus(path, pattern) for path in paths}
    if len(files) < max(len(paths), 2):
        raise UserError(f"data.paths={[*paths]} must be two or more different files or folders")
    named = {Path(path).stem: path for path in files}
    named = named if len(named) == len(files) else {path: path for path in files}
    sources = {name: TextFiles(files[path], documents=True) for name, path in named.items()}
    if proportions is None:
        proportions = [source.size_bytes for source in sources.values()]
    if len(proportions) != len(files):
        raise UserError(f"data.proportions={[*proportions]} must be a number for each of the {len(files)} data.paths")
    for share in proportions:
        number(share, "data.proportions", 0, open_low=True)
    return Text(Corpora(sources, proportions), **facts)


def _corpus(path: str, pattern: str) -> list[Path]:
    """Return the files of a corpus. Raises UserError if there are none with text."""
    root = Path(path)
    if root.is_dir():
        try:
            found = sorted(p for p in root.rglob(pattern) if p.is_file() and not _is_hidden(p, root))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"data.pattern={pattern!r} is not a pattern of file names ({error}): try *.txt") from None
    else:
        found = [root] if root.is_file() else []
    if not (found := [p for p in found if p.stat().st_size]):
        raise UserError(
            f"data.paths: {path!r} holds no text: name a UTF-8 file, or a folder of {pattern} (data.pattern)"
        )
    return found


def _folders(root: Path, hidden: bool, links: bool) -> Iterator[Path]:
    """Yield a folder and all below it, then with `links` those that links lead to, each real folder once.

    Links to a folder above the root are not followed, and hidden ones only with `hidden`.
    """
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
    """Build the data set of the topics of Python's `help()`: half a million characters, part of every installation."""
    from pydoc_data.topics import topics

    return Text(Embedded("\n\n".join(topics[name].strip() for name in sorted(topics))), **facts)
