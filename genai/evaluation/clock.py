"""How long an evaluation takes: an estimate after its first part, then the time that is left."""

import sys
import time


class Clock:
    """Counts `total` things of a kind; says on the error stream how long they will take, once where that is no terminal."""

    def __init__(self, total: int, what: str):
        self.total, self.what, self.done, self.start = total, what, 0, time.monotonic()
        self.shown = False

    def add(self, count: int) -> None:
        self.done += count
        spent = time.monotonic() - self.start
        whole = spent / self.done * self.total
        if not self.shown and whole > 10:
            print(f"{self.total} {self.what} take about {duration(whole)}", file=sys.stderr, flush=True)
        self.shown = True
        if sys.stderr.isatty():
            left = f"{self.done}/{self.total} {self.what}, {duration(whole - spent)} left "
            print(f"\r\033[K{left}", end="", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Of a person's kind: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
