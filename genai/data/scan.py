"""Read the headers of a folder of image files once, and cache what they say from one start to the next."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import time
from io import BytesIO
from pathlib import Path
from typing import IO

from genai import progress
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.core.files import write_text
from genai.data import fingerprint
from genai.data.files import Files, Stamp
from genai.data.fingerprint import checksum
from genai.modalities import decode

SMALL_BYTES = 2**18  # files up to this size are read whole, which gives their end and checksum too
MULTI_PAGE = ("TIFF", "GIF", "PNG", "WEBP", "AVIF")  # formats whose further pages or frames are separate images
GREY_MODES = "1", "L", "LA", "La", "I", "I;16", "I;16B", "F"  # Pillow's modes without colour
END_MARKERS = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",
    "PNG": b"IEND\xaeB`\x82",
    "GIF": b";",
}  # a file that does not end with its format's marker may be cut short
UNREAD = "cannot be read"  # begins the problem of a file that the system did not read
FORMAT = 1  # version of the cached scan


@dataclasses.dataclass
class Facts:
    """The facts of one file.

    Attributes:
        problem: why the file cannot be used, empty for an image.
        height, width: of the upright image, in pixels.
        mode: Pillow's mode.
        deep: whether it has more than 8 bits per channel.
        transparent: whether it has transparent pixels, or may have.
        pages: number of pages or frames.
        checksum: of the file, empty where it was not computed yet.
        low, high: least and largest value of a deep image, if `measured`.
    """

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

    They are cached in $XDG_CACHE_HOME/genai or ~/.cache/genai, each until its file's stamp changes, so that a header is read
    only once (see `benchmarks.folder` for the time that saves).

    Raises UserError if there are no images, or if more than one file, and more than 1 %, cannot be used.
    """

    def __init__(self, files: Files):
        from PIL import __version__

        self.files, version, names = files, files.version, files.candidates()
        self.path = cache_folder("scans") / f"{checksum(str(files.root.resolve()), FORMAT, version, __version__)}.json"
        cached, self.changed = _read_cache(self.path), False
        self.found: dict[str, Facts] = {}
        self.problems: dict[str, Facts] = {}
        for name in progress.track(names, f"scanning {files.root}", len(names), "files"):
            stamp, facts = cached.get(name, ((), None))
            if facts is None or stamp != files.stamps[name]:
                facts, self.changed = self._facts(name), True
            self.found[name] = facts
        self.drop()

    def drop(self) -> None:
        """Move files with a problem to `problems`. Raises UserError if there are too many, or no images are left."""
        self.problems |= {name: facts for name, facts in self.found.items() if facts.problem}
        self.found = {name: facts for name, facts in self.found.items() if not facts.problem}
        self.files.drop({name: facts.problem for name, facts in self.problems.items()}, len(self.found))

    def measure(self) -> tuple[float, float] | None:
        """Return the range of values (black, white) of images of more than 8 bits, None without such images.

        It begins at 0 and ends at 2^bits - 1 for as many bits as the largest value needs, at 1 for fractions. It is the least
        and the largest value where some are negative, or fractions above 1. Images that cannot be decoded are dropped.
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
                except Exception as error:  # Pillow raises almost any exception on a broken file
                    facts.problem = reason(error)
        self.drop()
        deep = [facts for facts in deep.values() if not facts.problem]
        if not deep:
            return None
        low, high = min(f.low for f in deep), max(f.high for f in deep)
        if low < 0 or (high > 1 and any(f.mode == "F" for f in deep)):
            return low, high if high > low else low + 1
        return 0, 2 ** int(high).bit_length() - 1 if high > 1 else 1

    def keep(self) -> None:
        """Write the facts to the cache, if it can be written."""
        if not self.changed:
            return
        stamps, now = self.files.stamps, time.time_ns()
        # A file that could not be read is not kept: it may be readable next time, with the same stamp.
        facts = {
            name: one for name, one in {**self.problems, **self.found}.items() if not one.problem.startswith(UNREAD)
        }
        settled = {
            name: [stamps[name], dataclasses.astuple(one)]
            for name, one in facts.items()
            if stamps[name] and now - max(stamps[name][1:]) > fingerprint.RACY_NS
        }
        if settled:
            with contextlib.suppress(UserError):  # without a writable cache the headers are read again next time
                write_text(self.path, json.dumps(settled))

    def _facts(self, name: str) -> Facts:
        """Return the facts of a file; whatever its decoder raises becomes the `problem`, which `drop` reports."""
        try:
            return self._read(name)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # Pillow raises almost any exception on a broken file
            return Facts(problem=reason(error))

    def _read(self, name: str) -> Facts:
        files, size = self.files, (self.files.stamps[name] or (0,))[0]
        if files.stamps[name] and not size:
            return Facts(problem="is empty")
        with files.open(name) as file:
            digest = ""
            if size <= SMALL_BYTES:
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
                    pages=getattr(image, "n_frames", 1)
                    if image.format in MULTI_PAGE and getattr(image, "is_animated", False)
                    else 1,
                )
                end = END_MARKERS.get(image.format or "")
                if files.version > 1 and end and not _ends(file, end) and (digest or files.root.is_dir()):
                    image.seek(0)
                    image.draft(None, (1, 1))
                    image.load()  # fails if the file is cut short
        return facts

    def checksum(self, name: str) -> str:
        """Return a checksum of a file's bytes."""
        if not self.files.root.is_dir():
            return str(self.files.stamps[name][1])
        facts = self.found[name]
        if not facts.checksum:
            facts.checksum, self.changed = _digest(self.files.read(name)), True
        return facts.checksum


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _ends(file: IO[bytes], end: bytes) -> bool:
    """Tell whether a file ends with its format's marker, apart from trailing zeros."""
    at = file.tell()
    file.seek(max(file.seek(0, os.SEEK_END) - 64, 0))
    tail = file.read()
    file.seek(at)
    return tail.rstrip(b"\0").endswith(end)


def _read_cache(path: Path) -> dict[str, tuple[Stamp, Facts]]:
    """Read the cached facts by file; an empty dict where there are none yet, or the cache is damaged."""
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
    """Describe what is wrong with a file, as the end of a sentence that begins with its name."""
    from PIL import UnidentifiedImageError

    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that Pillow reads"
    if isinstance(error, OSError) and error.errno:
        return f"{UNREAD} ({os.strerror(error.errno)})"
    if any(word in text.lower() for word in ("truncated", "unexpected end")) or isinstance(error, EOFError):
        return "is cut short"
    return text if text.startswith("has ") else f"is damaged ({text})"


def is_read_error(error: BaseException) -> bool:
    """Tell whether the system could not read a file, which may work at another time, rather than its content being damaged."""
    return isinstance(error, OSError) and error.errno is not None and error.errno != errno.EINVAL
