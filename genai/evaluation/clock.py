"""Progress of an evaluation: an estimate after its first batch, then the time left."""

import sys
import time


class Clock:
    """Count `total` items and report on stderr how long they will take: continuously on a terminal, else once.

    Args:
        total: number of items.
        what: their name in the report, such as "samples".
    """

    def __init__(self, total: int, what: str):
        self.total, self.what, self.done, self.start = total, what, 0, time.monotonic()
        self.estimated = False

    def add(self, count: int) -> None:
        """Count further items as done and update the report."""
        self.done += count
        spent = time.monotonic() - self.start
        whole = spent / self.done * self.total
        if not self.estimated and whole > 10:
            print(f"{self.total} {self.what} take about {duration(whole)}", file=sys.stderr, flush=True)
        self.estimated = True
        if sys.stderr.isatty():
            left = f"{self.done}/{self.total} {self.what}, {duration(whole - spent)} left "
            print(f"\r\033[K{left}", end="", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Clear the line of the report on a terminal."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Format a duration for reading: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
