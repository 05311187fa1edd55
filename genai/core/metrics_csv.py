"""Lines of metrics.csv (columns step, name, value), which a crash or a bad disk may have damaged."""

import csv
from pathlib import Path
from typing import NamedTuple

HEAD = "step,name,value\n"


class Row(NamedTuple):
    """One line: what it says, and itself."""

    step: int
    name: str
    value: float
    line: str


def rows(path: Path) -> list[Row]:
    """The lines that can be read, none of a file that is not there; others are left out with one warning.

    A last line without an end is still being written, or was when the run died, and is left out in silence.
    """
    if not path.exists():
        return []
    found, damaged = [], []
    *lines, _ = path.read_text(errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            line.encode()  # no bytes that are no text
            ((step, name, value),) = csv.reader([line])
            found.append(Row(int(step), name, float(value), f"{line}\n"))
        except (ValueError, csv.Error):
            if number > 1 or f"{line}\n" != HEAD:
                damaged.append(number)
    if damaged:
        print(f"warning: {path}: damaged lines are left out: {len(damaged)}, the first is line {damaged[0]}")
    return found
