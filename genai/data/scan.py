"""What is in a folder of images, or in a zip of one: every file once, and what it holds as far as that is cheap to say."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import posixpath
import time
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.core.files import write_text
from genai.data import decode, fingerprint
from genai.data.fingerprint import checksum, of_files

UNPACKED_BYTES, RATIO = 2**25, 100  # of a zip's member that unpacks to over 100 times its size: no file of images does
TEXTS = (".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html")
LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "readme", "license")
LITTER_FOLDERS = ("__MACOSX", "@eaDir")
READ_WHOLE = 2**18  # bytes of a file that is read at once, for its end and its checksum too
MANY = ("TIFF", "GIF", "PNG", "WEBP", "AVIF")  # formats whose further pages or frames are pictures of their own
GREY = "1", "L", "LA", "La", "I", "I;16", "I;16B", "F"  # Pillow's modes without colour
ENDS = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",
    "PNG": b"IEND\xaeB`\x82",
    "GIF": b";",
}  # a file without it may be cut short
FORMAT = 1  # of a kept scan

Stamp = tuple[int, ...]
"""What changes when a file does: its size, then the times of its modification and change, or a zip's CRC-32."""


class Files:
    """The files below a folder, or inside a zip of it, by their relative path.

    Args:
        version: 2 takes each real file once, however many links lead to it, and understands a zip's names as Windows and tar
            write them; 1 is what runs from before did.
    """

    def __init__(self, root: str | Path, version: int = 1):
        self.root, self.version = Path(root), version
        self.zips: dict[int, tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]] = {}
        self.stamps: dict[str, Stamp] = {}
        self.ignored: Counter[str] = Counter()  # by what it is, since `names`
        self.skipped: dict[str, str] = {}  # name -> why it cannot be used
        self.total = 0  # files that should be images, since a `Scan`

    def __getstate__(self) -> dict:
        return {**self.__dict__, "zips": {}}  # by process, for two cannot share one file position

    def names(self) -> list[str]:
        """Sorted, without hidden ones. Raises UserError if there is no such folder or zip."""
        self.ignored.clear()
        if self.root.is_dir():
            self.stamps = self._once() if self.version > 1 else self._below()
        elif zipfile.is_zipfile(self.root):
            self.stamps = {name: (info.file_size, info.CRC) for name, info in self._zip()[1].items()}
        else:
            raise UserError(
                f"data.root={str(self.root)!r} is neither a folder nor an intact zip file: set data.root to one with images"
            )
        return sorted(name for name in self.stamps if not self._ignore(name))

    def open(self, name: str) -> IO[bytes]:
        """Raises UserError for a zip's member that unpacks to far more than images do."""
        if self.root.is_dir():
            return (self.root / name).open("rb")
        archive, infos = self._zip()
        info = infos[name]
        if info.file_size > max(UNPACKED_BYTES, RATIO * info.compress_size):
            raise UserError(
                f"{self.root / name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, as no image does: take it "
                "out of the zip, or change data.root"
            )
        return archive.open(info)

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def skip(self, name: str, why: str, of: int) -> None:
        """Count a file that cannot be used. Raises as `check` does."""
        self.skipped[name] = why
        self.check(of)

    def check(self, of: int) -> None:
        """Raises UserError if more than one, and more than 1 %, of `of` files cannot be used."""
        if len(self.skipped) > max(1, of // 100):
            raise UserError(
                f"{len(self.skipped)} of the {of} files in data.root={str(self.root)!r} cannot be used, which is more than "
                f"1 %: {told(self.skipped)}: mend or remove them, or change data.root"
            )

    def fingerprint(self, names: Sequence[str], quick: bool) -> str:
        """Checksum of files in order: of their contents, or if `quick` of their names, without folders, and sizes."""
        if self.root.is_dir() and not quick:
            return of_files(self.root, names)
        if self.root.is_dir():
            return checksum([(name.rpartition("/")[2], os.stat(self.root / name).st_size) for name in names])
        infos = [(name, self._zip()[1][name]) for name in names]
        return checksum([(n.rpartition("/")[2], i.file_size) if quick else (i.file_size, i.CRC) for n, i in infos])

    def _ignore(self, name: str) -> bool:
        parts = name.split("/")
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            self.ignored["hidden"] += 1
            return True
        if self.version > 1 and any(part in LITTER_FOLDERS for part in parts):
            self.ignored["of the system"] += 1
            return True
        return False

    def _below(self) -> dict[str, Stamp]:
        """Every path to a file, through links too."""
        walk = [(Path(at).relative_to(self.root), names) for at, _, names in os.walk(self.root, followlinks=True)]
        return {(at / name).as_posix(): _stamp(self.root / at / name) for at, names in walk for name in names}

    def _once(self) -> dict[str, Stamp]:
        """One path to each real file, of several one without links; what is above the root, or no file, is left out."""
        top = os.path.realpath(self.root)
        folders, links, seen, found = [("", top)], [], set(), {}
        linked: list[tuple[str, str]] = []
        while folders or links:
            at, path = folders.pop() if folders else links.pop(0)
            if path in seen or (at and f"{top}/".startswith(f"{path}/".replace("//", "/"))):
                self.ignored["links to what is here already"] += 1
                continue
            seen.add(path)
            try:
                entries = sorted(os.scandir(path), key=lambda entry: entry.name)
            except OSError as error:
                self.ignored[f"folders that cannot be read ({error.strerror})"] += 1
                continue
            for entry in entries:
                name = f"{at}{entry.name}"
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                        (links if entry.is_symlink() else folders).append((f"{name}/", real))
                    else:
                        self.ignored["hidden"] += 1
                elif entry.is_symlink():
                    linked.append((name, os.path.realpath(entry.path)))
                elif entry.is_file():
                    found[entry.path] = name
        for name, path in linked:
            if found.setdefault(path, name) != name:
                self.ignored["links to what is here already"] += 1
        return {name: _stamp(path) for path, name in found.items()}

    def _zip(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        """The zip, and its files by name."""
        pid = os.getpid()
        if pid not in self.zips:
            archive = zipfile.ZipFile(self.root)
            infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            if self.version > 1:
                names = ((name.replace("\\", "/"), info) for name, info in infos.items())
                infos = {posixpath.normpath(name).lstrip("/"): info for name, info in names if not name.endswith("/")}
            self.zips[pid] = archive, infos
        return self.zips[pid]


def _stamp(path: str | Path) -> Stamp:
    """Empty if there is no such file."""
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns
    except OSError:
        return ()


@dataclasses.dataclass
class Facts:
    """What a scan says of a file: `problem`, or of an image its upright size, Pillow's mode, whether it has more than 8 bits
    and transparency, its pages, and where they were asked for a checksum and its extreme values."""

    problem: str = ""
    height: int = 0
    width: int = 0
    mode: str = ""
    deep: bool = False
    transparent: bool = False
    pages: int = 1
    checksum: str = ""
    low: float = 0.0
    high: float = 0.0
    measured: bool = False


class Scan:
    """The facts of all images among some files.

    They are kept in $XDG_CACHE_HOME/genai or ~/.cache/genai, each for as long as its file's stamp stays, so that a header
    is read once and then only looked at for changes, at a fraction of the time (`benchmarks.folder`).

    Raises UserError if there are no images, or if more than one file, and more than 1 %, cannot be used.
    """

    def __init__(self, files: Files):
        from PIL import __version__

        self.files, version = files, files.version
        names = [name for name in files.names() if not self._is_litter(name)]
        self.path = cache_folder("scans") / f"{checksum(str(files.root.resolve()), FORMAT, version, __version__)}.json"
        kept, self.changed = _kept(self.path), False
        self.found: dict[str, Facts] = {}
        self.problems: dict[str, Facts] = {}
        files.total = len(names)
        for name in names:
            stamp, facts = kept.get(name, ((), None))
            if facts is None or stamp != files.stamps[name]:
                facts, self.changed = self._facts(name), True
            self.found[name] = facts
        self.drop()

    def drop(self) -> None:
        """Leave out, and count, what has a problem. Raises UserError if that is too much, or all."""
        self.problems |= {name: facts for name, facts in self.found.items() if facts.problem}
        self.found = {name: facts for name, facts in self.found.items() if not facts.problem}
        self.files.skipped |= {name: facts.problem for name, facts in self.problems.items()}
        if not self.found:
            why = f" ({told(self.files.skipped)})" if self.files.skipped else ""
            raise UserError(
                f"data.root={str(self.files.root)!r} holds no images{why}: set data.root to a folder, or a zip of one, that does"
            )
        self.files.check(self.files.total)

    def measure(self) -> tuple[float, float] | None:
        """The range of values of images of more than 8 bits, None if there are none: from 0 to the largest number of as many
        bits as the values take, to 1 for fractions; from the least to the largest value where some are negative, or
        fractions over 1.

        What cannot be decoded is left out and counted.
        """
        deep = {name: facts for name, facts in self.found.items() if facts.deep}
        for name, facts in deep.items():
            if not facts.measured:
                self.changed = facts.measured = True
                try:
                    with decode.opened(
                        BytesIO(self.files.read(name)), self.files.root / name, self.files.stamps[name][0]
                    ) as image:
                        facts.low, facts.high = decode.extremes(image)
                except (UserError, MemoryError):
                    raise
                except Exception as error:  # Pillow raises almost anything on a broken file
                    facts.problem = reason(error)
        self.drop()
        deep = [facts for facts in deep.values() if not facts.problem]
        if not deep:
            return None
        low, high = min(f.low for f in deep), max(f.high for f in deep)
        if low < 0 or (high > 1 and any(f.mode == "F" for f in deep)):
            return low, high if high > low else low + 1
        return 0, 2 ** int(high).bit_length() - 1 if high > 1 else 1

    def copies(self, splits: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
        """Files of a split with the same bytes as one of another split, each with the first of these; by size, then checksum."""
        where = {name: key for key, names in splits.items() for name in names}
        sizes: dict[int, list[str]] = {}
        for name in where:
            sizes.setdefault(self.files.stamps[name][0], []).append(name)
        first: dict[tuple[int, str], dict[str, str]] = {}
        found = []
        for size, names in sizes.items():
            if len({where[name] for name in names}) < 2:
                continue
            for name in names:
                same = first.setdefault((size, self._checksum(name)), {})
                found += [(name, other) for key, other in [*same.items()][:1] if key != where[name]]
                same.setdefault(where[name], name)
        return found

    def keep(self) -> None:
        """Write what was found to where the next scan looks for it, where that can be done."""
        if not self.changed:
            return
        stamps, now = self.files.stamps, time.time_ns()
        facts = {**self.problems, **self.found}
        settled = {
            name: [stamps[name], dataclasses.astuple(one)] for name, one in facts.items()
            if stamps[name] and now - max(stamps[name][1:]) > fingerprint.RACY_NS
        }  # fmt: skip
        if settled:
            with contextlib.suppress(UserError):
                write_text(self.path, json.dumps(settled))

    def _is_litter(self, name: str) -> bool:
        if self.files.version == 1:
            return name.endswith(".jsonl")  # captions
        base = posixpath.basename(name).lower()
        what = "texts" if base.endswith(TEXTS) else "of the system" if base in LITTER else None
        if what:
            self.files.ignored[what] += 1
        return what is not None

    def _facts(self, name: str) -> Facts:
        try:
            return self._read(name)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # as in `measure`
            return Facts(problem=reason(error))

    def _read(self, name: str) -> Facts:
        files, size = self.files, (self.files.stamps[name] or (0,))[0]
        if files.stamps[name] and not size:
            return Facts(problem="is empty")
        with files.open(name) as file:
            digest = ""
            if size <= READ_WHOLE:
                content = file.read()
                file, digest = BytesIO(content), _digest(content)
            with decode.opened(file, files.root / name, size, large=files.version > 1) as image:
                swapped = decode.sideways(image)
                facts = Facts(
                    height=image.width if swapped else image.height, width=image.height if swapped else image.width,
                    mode=image.mode, deep=decode.is_deep(image), transparent=decode.is_transparent(image), checksum=digest,
                    pages=image.n_frames if image.format in MANY and getattr(image, "is_animated", False) else 1,
                )  # fmt: skip
                end = ENDS.get(image.format or "")
                if files.version > 1 and end and not _ends(file, end) and (digest or files.root.is_dir()):
                    image.seek(0)
                    image.draft(None, (1, 1))
                    image.load()  # which says whether the file is cut short
        return facts

    def _checksum(self, name: str) -> str:
        if not self.files.root.is_dir():
            return str(self.files.stamps[name][1])
        facts = self.found[name]
        if not facts.checksum:
            facts.checksum, self.changed = _digest(self.files.read(name)), True
        return facts.checksum


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _ends(file: IO[bytes], end: bytes) -> bool:
    """Whether a file ends as its format does, give or take a few zeros."""
    at = file.tell()
    file.seek(max(file.seek(0, os.SEEK_END) - 64, 0))
    tail = file.read()
    file.seek(at)
    return tail.rstrip(b"\0").endswith(end)


def _kept(path: Path) -> dict[str, tuple[Stamp, Facts]]:
    """What a scan kept; nothing where there is none yet, or the file is damaged."""
    kinds = [type(value) for value in dataclasses.astuple(Facts())]
    found: dict[str, tuple[Stamp, Facts]] = {}
    try:
        for name, (stamp, values) in json.loads(path.read_text()).items():
            if [type(value) for value in values] != kinds or not all(type(number) is int for number in stamp):
                raise TypeError(name)
            found[name] = tuple(stamp), Facts(*values)
    except OSError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        print(f"warning: {path} is damaged ({type(error).__name__}): made again")
        return {}
    return found


def reason(error: BaseException) -> str:
    """What is wrong with a file, as the end of a sentence that begins with its name."""
    from PIL import UnidentifiedImageError

    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UnidentifiedImageError):
        return "is no image that Pillow reads"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({os.strerror(error.errno)})"
    if any(word in text.lower() for word in ("truncated", "unexpected end")) or isinstance(error, EOFError):
        return "is cut short"
    return text if text.startswith("has ") else f"is damaged ({text})"


def told(skipped: dict[str, str]) -> str:
    """What is wrong with files: each reason once, with how many files and the first of them."""
    parts = []
    for why, count in Counter(skipped.values()).most_common(5):
        first = next(name for name, other in skipped.items() if other == why)
        parts.append(f"{first} {why}" + (f" (and {count - 1} more)" if count > 1 else ""))
    return ", ".join(parts)


def vanished(error: BaseException) -> bool:
    """Whether it is the system that did not hand a file over, which another try may mend, and not what is in it."""
    return isinstance(error, OSError) and error.errno is not None and error.errno != errno.EINVAL
