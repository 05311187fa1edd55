"""Reads metrics.csv (columns step, name, value), of which a crash or a bad disk may have damaged lines."""

import csv
from pathlib import Path
from typing import NamedTuple

HEAD = "step,name,value\n"
RENAMED = {"deceit": "adversarial_loss"}  # last part of a name in older runs -> its name today


class Row(NamedTuple):
    """One line of the file: its three columns, and its text."""

    step: int
    name: str
    value: float
    line: str


def rows(path: Path) -> list[Row]:
    """Return the readable lines of metrics.csv, none if there is no such file; damaged lines are left out with one
    warning.

    A last line without a newline is still being written, or was when the run died, and is left out silently.
    """
    if not path.exists():
        return []
    found, damaged = [], []
    *lines, _ = path.read_text(errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            line.encode()  # raises where the file holds bytes that are not UTF-8
            ((step, name, value),) = csv.reader([line])
            group, slash, last = name.rpartition("/")
            found.append(Row(int(step), f"{group}{slash}{RENAMED.get(last, last)}", float(value), f"{line}\n"))
        except (ValueError, csv.Error):
            if number > 1 or f"{line}\n" != HEAD:
                damaged.append(number)
    if damaged:
        print(f"warning: {path}: damaged lines are left out: {len(damaged)}, the first is line {damaged[0]}")
    return found
