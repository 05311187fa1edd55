"""Files that are written whole or not at all, and never through a symbolic link."""

import contextlib
import csv
import io
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from genai.core.errors import UserError


def write(path: Path, save: Callable[[BinaryIO], object], within: Path | None = None, hint: str = "") -> None:
    """Write a file atomically: `save` fills a new temporary file in the same folder, which is flushed to disk and renamed.

    A symbolic link at `path` is replaced, not followed, and what a failure leaves of the temporary file is deleted.

    Args:
        within: a folder, such as a run directory, that the file must really lie in, whatever symbolic links say.
        hint: how to choose another place, for the error's end.

    Raises UserError if the folder or the file cannot be written, such as on a full disk or a read-only one, or leads out of
    `within`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with check_writable(path, hint):
        make_folder(path.parent, within)
        try:
            with open(temporary, "xb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def write_text(path: Path, text: str, within: Path | None = None, hint: str = "") -> None:
    """Write UTF-8 text as `write` does."""
    write(path, lambda file: file.write(text.encode(errors="surrogateescape")), within, hint)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], hint: str = "") -> None:
    """Write rows, at least one and all with the keys of the first, under a head of these as `write` does."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, lines.getvalue(), hint=hint)


def replace(path: Path, target: Path) -> None:
    """Move a complete file over another one in the same folder. Raises UserError if that fails."""
    with check_writable(target):
        os.replace(path, target)
        _sync(target.parent)


def make_folder(folder: Path, within: Path | None = None) -> None:
    """Make a folder and those above it. Raises UserError if symbolic links lead it out of `within`."""
    if within is not None:
        check_inside(folder, within)
    folder.mkdir(parents=True, exist_ok=True)


def check_inside(path: Path, within: Path) -> None:
    """Raise UserError if symbolic links lead a path out of a folder that it seems to lie in."""
    if not path.resolve().is_relative_to(within.resolve()):
        raise UserError(
            f"{path} leads out of {within} by a symbolic link: delete the link, nothing is written through it"
        )


def check_folder(folder: Path, key: str) -> None:
    """Raise UserError unless a folder exists or could be made; nothing is made."""
    above = folder
    try:
        while not os.path.lexists(above):
            if len(os.fsencode(above.name)) > 255:
                raise UserError(f"{key}={folder} has a name of {len(above.name)} characters: name a shorter one")
            above = above.parent
        if not above.is_dir():
            raise UserError(f"{key}={folder} cannot be a folder, for {above} is not one: name another")
        if above != folder and not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"{key}={folder} cannot be written: name another folder, or allow writing in {above}")
    except OSError as error:
        raise UserError(f"{key}={folder} cannot be a folder ({error.strerror}): name another") from error


@contextlib.contextmanager
def check_writable(path: Path, hint: str = "") -> Iterator[None]:
    """Turn an OSError of writing `path` into a UserError that says which file, why, and `hint`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # which torch.save hides
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise UserError(
            f"{path} cannot be written ({reason}): {hint or 'make room, or name another folder'}"
        ) from error


def _sync(folder: Path) -> None:
    """Flush a rename to disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
