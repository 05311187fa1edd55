"""What the files of a folder of images hold, as far as that is cheap to say; kept from one start to the next."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import posixpath
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

from genai import progress
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.core.files import write_text
from genai.data import fingerprint
from genai.data.files import Files, Stamp, describe_skipped
from genai.data.fingerprint import checksum
from genai.modalities import decode

TEXTS = (".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html")
LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "readme", "license")
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
        for name in progress.track(names, f"scanning {files.root}", len(names), "files"):
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
            why = f" ({describe_skipped(self.files.skipped)})" if self.files.skipped else ""
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
        for name, facts in progress.track(deep.items(), "measuring values of", len(deep), "images"):
            if not facts.measured:
                self.changed = facts.measured = True
                try:
                    with decode.open_image(
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
            name: [stamps[name], dataclasses.astuple(one)]
            for name, one in facts.items()
            if stamps[name] and now - max(stamps[name][1:]) > fingerprint.RACY_NS
        }
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
            with decode.open_image(file, files.root / name, size, large=files.version > 1) as image:
                swapped = decode.is_sideways(image)
                facts = Facts(
                    height=image.width if swapped else image.height,
                    width=image.height if swapped else image.width,
                    mode=image.mode,
                    deep=decode.is_deep(image),
                    transparent=decode.is_transparent(image),
                    checksum=digest,
                    pages=image.n_frames if image.format in MANY and getattr(image, "is_animated", False) else 1,
                )
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
        return "is not an image that Pillow reads"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({os.strerror(error.errno)})"
    if any(word in text.lower() for word in ("truncated", "unexpected end")) or isinstance(error, EOFError):
        return "is cut short"
    return text if text.startswith("has ") else f"is damaged ({text})"


def is_missing(error: BaseException) -> bool:
    """Whether it is the system that did not hand a file over, which another try may mend, and not what is in it."""
    return isinstance(error, OSError) and error.errno is not None and error.errno != errno.EINVAL
