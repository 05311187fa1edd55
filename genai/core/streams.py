"""Standard output and error that cannot end a command: a closed pipe, a full disk or a missing stream costs the lines alone."""

import os
import sys
from typing import Any


class Lossy:
    """A text stream that writes to the null device from the first error of the system on; all else is the stream's."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._redirect()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._redirect()

    def _redirect(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # what is buffered can be written then, also by the interpreter's end
        os.close(null)


def protect_output() -> None:
    """Let this process go on where its stdout or stderr cannot be written, and write characters that they lack as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start: the null device takes its number, lest a file does
            stream = open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Lossy):
            setattr(sys, name, Lossy(stream))


def is_terminal(stream: Any) -> bool:
    """Return whether a stream, which may be an object of the caller's or None, is a terminal."""
    return hasattr(stream, "isatty") and stream.isatty()
