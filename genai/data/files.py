"""List and read the files below a folder, or in a zip of it."""

import os
import posixpath
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import IO

from genai.core.errors import UserError
from genai.data.fingerprint import checksum, files_checksum

UNPACKED_BYTES, RATIO = 2**25, 100  # a member of a zip beyond both, unpacked size and ratio, is refused as a zip bomb
LITTER_FOLDERS = ("__MACOSX", "@eaDir")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html")
LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "readme", "license")

Stamp = tuple[int, ...]
"""Size, modification time and change time of a file, or size and CRC-32 in a zip: it differs if the file has changed."""


class Files:
    """The files below a folder, or inside a zip of it, by their relative path.

    Args:
        root: folder or zip.
        version: 2 takes each real file once, however many links lead to it, and understands names in a zip as Windows and tar
            write them; 1 is the behaviour of older runs.
        what: the files are, for errors: images.
        few: number of files that may be of no use, however few there are; infinite for any number.
    """

    def __init__(self, root: str | Path, version: int = 1, what: str = "images", few: float = 1):
        self.root, self.version, self.what, self.few = Path(root), version, what, few
        self.zips: dict[int, tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]] = {}
        self.stamps: dict[str, Stamp] = {}
        self.ignored: Counter[str] = Counter()  # number of files by reason, filled by `names`
        self.skipped: dict[str, str] = {}  # name -> why it cannot be used
        self.total = 0  # number of files that should be images, set by `candidates`

    def __getstate__(self) -> dict:
        return {**self.__dict__, "zips": {}}  # each process opens its own: they would share one file position

    def names(self) -> list[str]:
        """List the files, sorted, without hidden ones. Raises UserError if the root is neither a folder nor a zip."""
        self.ignored.clear()
        if self.root.is_dir():
            self.stamps = self._unique_files() if self.version > 1 else self._all_paths()
        elif zipfile.is_zipfile(self.root):
            self.stamps = {name: (info.file_size, info.CRC) for name, info in self._zip()[1].items()}
        else:
            raise UserError(
                f"data.root={str(self.root)!r} is neither a folder nor an intact zip file: set data.root to one with {self.what}"
            )
        return sorted(name for name in self.stamps if not self._ignore(name))

    def candidates(self, suffixes: tuple[str, ...] = ()) -> list[str]:
        """List the files that are meant to be images, and count the others: texts, and what lacks all of the suffixes, if any."""
        names = [name for name in self.names() if not self._is_litter(name, suffixes)]
        self.total = len(names)
        return names

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. Raises UserError for a member of a zip that unpacks to far more than images do."""
        if self.root.is_dir():
            return (self.root / name).open("rb")
        archive, infos = self._zip()
        info = infos[name]
        if info.file_size > max(UNPACKED_BYTES, RATIO * info.compress_size):
            raise UserError(
                f"{self.root / name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, which no "
                f"{self.what[:-1]} does: take it out of the zip, or change data.root"
            )
        return archive.open(info)

    def read(self, name: str) -> bytes:
        """Read a file. Raises UserError as `open` does."""
        with self.open(name) as file:
            return file.read()

    def skip(self, name: str, why: str, total: int) -> None:
        """Record a file that cannot be used. Raises UserError as `check` does."""
        self.skipped[name] = why
        self.check(total)

    def drop(self, problems: Mapping[str, str], left: int) -> None:
        """Record files that cannot be used, by name with the reason. Raises UserError as `check` does, or if none is left."""
        self.skipped |= problems
        if not left:
            why = f" ({describe_skipped(self.skipped)})" if self.skipped else ""
            raise UserError(
                f"data.root={str(self.root)!r} holds no {self.what}{why}: set data.root to a folder, or a zip of one, that does"
            )
        self.check(self.total)

    def check(self, total: int) -> None:
        """Raise UserError if more than `few` files, and more than 1 % of `total`, cannot be used."""
        if len(self.skipped) > max(self.few, total // 100):
            raise UserError(
                f"{len(self.skipped)} of the {total} files in data.root={str(self.root)!r} cannot be used, which is more than "
                f"1 %: {describe_skipped(self.skipped)}: repair or remove them, or change data.root"
            )

    def fingerprint(self, names: Sequence[str], quick: bool) -> str:
        """Return a checksum of files in order: of their contents, or if `quick` of their names, without folders, and sizes."""
        if self.root.is_dir() and not quick:
            return files_checksum(self.root, names)
        if self.root.is_dir():
            return checksum([(name.rpartition("/")[2], os.stat(self.root / name).st_size) for name in names])
        infos = [(name, self._zip()[1][name]) for name in names]
        return checksum([(n.rpartition("/")[2], i.file_size) if quick else (i.file_size, i.CRC) for n, i in infos])

    def _is_litter(self, name: str, suffixes: tuple[str, ...]) -> bool:
        """Tell whether a file is not meant to be an image, and count it if so."""
        if self.version == 1:
            return name.endswith(".jsonl")  # captions
        base = posixpath.basename(name).lower()
        what = "texts" if base.endswith(TEXT_SUFFIXES) else "of the system" if base in LITTER else None
        if what is None and suffixes and not base.endswith(suffixes):
            what = f"{posixpath.splitext(base)[1] or 'without a suffix'}"
        if what:
            self.ignored[what] += 1
        return what is not None

    def _ignore(self, name: str) -> bool:
        """Tell whether a file is hidden or belongs to the operating system, and count it if so."""
        parts = name.split("/")
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            self.ignored["hidden"] += 1
            return True
        if self.version > 1 and any(part in LITTER_FOLDERS for part in parts):
            self.ignored["of the system"] += 1
            return True
        return False

    def _all_paths(self) -> dict[str, Stamp]:
        """Return every path to a file, also through links, with its stamp."""
        walk = [(Path(at).relative_to(self.root), names) for at, _, names in os.walk(self.root, followlinks=True)]
        return {(at / name).as_posix(): _stamp(self.root / at / name) for at, names in walk for name in names}

    def _unique_files(self) -> dict[str, Stamp]:
        """Return one path to each real file with its stamp, a path without links where there are several.

        Links to a folder above the root and what is not a regular file are left out. Folders are walked before links, so that
        a file's own path is found first.
        """
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
                if os.path.isdir(entry):  # entry.is_dir() raises for a link that leads to itself
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
        """Open the zip, once in each process; returns it and its files by name."""
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
    """Return the stamp of a file, empty if there is no such file."""
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns
    except OSError:
        return ()


def print_summary(
    files: Files, parts: Mapping[str, Sized], class_names: Sequence[str] | None, notes: Sequence[str]
) -> None:
    """Print to stderr, on the first rank, what was found and what is not used."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "")).strip("0"):
        return
    of = "" if class_names is None else f" of {len(class_names)} classes"
    counts = ", ".join(f"{len(parts[key])} {key}" for key in ("train", "val", "test"))
    lines = [f"{files.root}: {sum(map(len, parts.values()))} {files.what}{of} ({counts})", *notes]
    if files.skipped:
        lines.append(f"skipped {len(files.skipped)} of {files.total} files: {describe_skipped(files.skipped)}")
    if files.ignored:
        lines.append("ignored: " + ", ".join(f"{n} {what}" for what, n in sorted(files.ignored.items())))
    print("\n  ".join(lines), file=sys.stderr)


def copies(
    files: Files, splits: Mapping[str, Sequence[str]], content: Callable[[str], object]
) -> list[tuple[str, str]]:
    """Return (file, file of another split) pairs with the same bytes, one for each file that has such a copy.

    `content` is a checksum of a file by name; it is asked for only where files of two splits have one size.
    """
    where = {name: key for key, names in splits.items() for name in names}
    sizes: dict[int, list[str]] = {}
    for name in where:
        sizes.setdefault(files.stamps[name][0], []).append(name)
    first: dict[tuple[int, object], dict[str, str]] = {}
    found = []
    for size, names in sizes.items():
        if len({where[name] for name in names}) < 2:
            continue
        for name in names:
            same = first.setdefault((size, content(name)), {})
            found += [(name, other) for key, other in [*same.items()][:1] if key != where[name]]
            same.setdefault(where[name], name)
    return found


def describe_copies(found: Sequence[tuple[str, str]], what: str) -> list[str]:
    """Return a sentence on the pairs of `copies`; none if there are none."""
    if not found:
        return []
    return [
        f"{len(found)} are exact copies of {what} in another split, such as {found[0][0]} of {found[0][1]}: "
        f"metrics on held-out {what} will be too good"
    ]


def describe_skipped(skipped: dict[str, str]) -> str:
    """Describe skipped files: each of the five most frequent reasons, with its first file and the number of others."""
    parts = []
    for why, count in Counter(skipped.values()).most_common(5):
        first = next(name for name, other in skipped.items() if other == why)
        parts.append(f"{first} {why}" + (f" (and {count - 1} more)" if count > 1 else ""))
    return ", ".join(parts)
