"""Progress of what takes long: a bar in a terminal; elsewhere a line after 5 seconds, then at least one every 30 seconds.

All long waits use `task` or `track`. A thread draws, so that a single call that blocks, such as a compilation, is reported too.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from genai.core import streams

SOON, OFTEN = 5.0, 25.0  # seconds until the first line of a task, and between lines: 30 with the thread's own delay
AFTER = 0.5  # seconds until a bar is drawn, so that quick tasks do not flicker

Item = TypeVar("Item")


class Task:
    """One wait: its name, and how many of its `total` units are done (total None: unknown)."""

    def __init__(self, what: str, total: int | None = None, unit: str = "", start: float = 0.0):
        self.what, self.total, self.unit = what, total, unit
        self.done, self.note, self.shown = 0, "", False
        self.start, self.first = start, 0

    def add(self, count: int = 1) -> None:
        self.done += count

    def to(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def restart(self, now: float, done: int) -> None:
        """Measure the time left from here on, for what came before was slower, such as a first step that compiles."""
        self.start, self.first = now, done

    def per_second(self, now: float) -> float | None:
        """Units a second since the start; None before there is any."""
        return (self.done - self.first) / (now - self.start) if self.done > self.first and now > self.start else None

    def head(self) -> str:
        count = "" if self.total is None else f" {self.done}/{self.total}"
        return f"{self.what}{count}{f' {self.unit}' if count and self.unit else ''}"

    def tail(self, now: float) -> str:
        rate = self.per_second(now)
        left = f"{duration(now - self.start)} so far"
        if self.total is not None:
            left = f"{duration((self.total - self.done) / rate)} left" if rate else ""
        return "  ".join(part for part in (self.note, left) if part)

    def line(self, now: float) -> str:
        return f"{self.head()}  {self.tail(now)}".rstrip()


class Board:
    """Shows the open tasks of this process, the innermost last: one bar each, or all in one line.

    Args:
        clock: seconds, monotonic.
        threaded: whether a thread calls `tick`; a test calls it itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, threaded: bool = True):
        self.clock, self.threaded = clock, threaded
        self.silent = False
        """True if nothing is shown, as in all ranks but the first."""
        self.tasks: list[Task] = []
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.stream, self.terminal, self.kept, self.printed_at = "stderr", False, False, 0.0
        self.bar: Any = None
        self.rows: dict[Task, Any] = {}

    def open(self, task: Task, stream: str = "stderr", kept: bool = False) -> Task:
        """Begin to show a task on "stdout" or "stderr", if it is the outermost; its bar is `kept` at the end or erased."""
        with self.lock:
            task.start = self.clock()
            self.tasks.append(task)
            if len(self.tasks) == 1 and not self.silent:
                self.stream, self.kept, self.printed_at = stream, kept, task.start
                self.terminal = streams.is_terminal(getattr(sys, stream))
                self.closed = threading.Event()
                if self.threaded:
                    threading.Thread(target=self._run, args=(self.closed,), daemon=True).start()
        return task

    def close(self, task: Task) -> None:
        with self.lock:
            if task in self.tasks:
                self.tasks.remove(task)
            if not self.tasks:
                self.closed.set()
                if self.bar is not None:
                    self.bar.stop()
                    self.bar, self.rows = None, {}

    def tick(self, now: float | None = None, at_once: bool = False) -> None:
        """Draw the bars, or print a line if one is due; `at_once` draws and prints whatever the time."""
        with self.lock:
            if not self.tasks or self.silent:
                return
            now = self.clock() if now is None else now
            if self.terminal:
                if at_once or self.bar is not None or now - self.tasks[0].start > AFTER:
                    self._draw(now)
            elif (
                at_once
                or now - self.printed_at >= OFTEN
                or any(not task.shown and now - task.start >= SOON for task in self.tasks)
            ):
                self._print(now)

    def _print(self, now: float) -> None:
        line = "; ".join(task.line(now) for task in [t for t in self.tasks[:-1] if t.total] + self.tasks[-1:])
        self.printed_at = now
        for task in self.tasks:
            task.shown = True
        with contextlib.suppress(OSError, ValueError):  # the stream may be closed by then
            print(line, file=getattr(sys, self.stream), flush=True)

    def _draw(self, now: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress

        if self.bar is None:
            columns = "{task.fields[head]}", BarColumn(), "{task.fields[tail]}"
            console = Console(file=getattr(sys, self.stream))
            self.bar = Progress(*columns, console=console, auto_refresh=False, transient=not self.kept)
            self.bar.start()
        for task in [task for task in self.rows if task not in self.tasks]:
            self.bar.remove_task(self.rows.pop(task))
        for task in self.tasks:
            fields = {"head": task.head(), "tail": task.tail(now)}
            if task not in self.rows:
                self.rows[task] = self.bar.add_task("", total=task.total, **fields)
            self.bar.update(self.rows[task], completed=task.done, total=task.total, **fields)
        self.bar.refresh()

    def _run(self, closed: threading.Event) -> None:
        while not closed.wait(0.25 if self.terminal else 1.0):
            self.tick()


board = Board()


@contextlib.contextmanager
def task(what: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Shows a wait on stderr for as long as the context lasts; `add` and `to` of the Task say how far it is."""
    shown = board.open(Task(what, total, unit))
    try:
        yield shown
    finally:
        board.close(shown)


def track(
    items: Iterable[Item],
    what: str,
    total: int | None = None,
    unit: str = "",
    count: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """The items themselves, shown as a task; each counts as `count(item)` units once it has been used."""
    with task(what, total, unit) as shown:
        for item in items:
            yield item
            shown.add(count(item))


def follow(shown: Task) -> Callable[[int, int, Any], None]:
    """An on_step, see `core.protocols.OnStep`, that shows a sampler's steps as those of a task."""
    return lambda i, n, state: shown.to(i + 1, n)


def console(**options: Any) -> Any:
    """Return a rich console that prints tables on stdout, 200 columns wide where it is not a terminal."""
    from rich.console import Console

    return Console(width=None if streams.is_terminal(sys.stdout) else 200, **options)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
