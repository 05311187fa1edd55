"""Ctrl-C and SIGTERM before the first step, while packages load and objects are built: one line, exit code 130 or 143.

A script calls `exit_on_signal` before its imports, which take seconds, and runs its task in `raise_on_signal`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_before: dict[int, Any] = {}  # handlers that were there, by signal
_received: int | None = None


def exit_on_signal() -> None:
    """Exit at once on a signal, since nothing can be half-done while packages load; ignored signals stay ignored."""
    _install(_leave)


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """Turn a signal within the context into an exception, so that what runs can clean up, and exit with its code.

    It does so even if the exception is swallowed; while a package is being imported it exits at once. Raises
    KeyboardInterrupt for SIGINT and SystemExit for SIGTERM.
    """
    global _received
    _received = None
    _install(_raise)
    unraisable, sys.unraisablehook = sys.unraisablehook, _unraisable
    try:
        yield
    except BaseException:
        if _received is None:
            raise
        _leave(_received)
    finally:
        sys.unraisablehook = unraisable
        for number, handler in _before.items():
            signal.signal(number, handler)
        _before.clear()


def _install(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in SIGNALS:
        present = signal.getsignal(number)
        if present is not signal.SIG_IGN:
            _before.setdefault(number, present)
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None = None) -> None:
    """Exit without the interpreter's own shutdown, which may fail half-way through an import."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by signal {number}\n".encode())
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None or _is_importing(frame):
        _leave(number)
    _received = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _unraisable(problem: Any) -> None:
    """Handle an exception that nobody can catch, such as one raised in a destructor."""
    if _received is not None:
        _leave(_received)
    sys.__unraisablehook__(problem)
