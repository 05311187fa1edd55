"""Kinds of ranges: each tells whether it holds a value, and its string completes the sentence "key=value must be ..."."""

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

from genai.core.errors import SEED


class Range(Protocol):
    """The interface of ranges."""

    def holds(self, value: object) -> bool:
        """Tell whether a value is allowed."""
        ...

    def __str__(self) -> str:
        """Complete the sentence "key=value must be ..."."""
        ...


def format_value(value: object) -> str:
    """Format a value as on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        text = f"[{', '.join(map(format_value, value))}]"
    else:
        text = f"{value:g}" if isinstance(value, int) and abs(value) > 2**64 else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def limit(value: float) -> str:
    """Format a bound for reading."""
    if value == SEED:
        return "2^63 - 1"
    power = round(math.log10(value)) if value >= 1e6 else 0
    return f"10^{power}" if power and value == 10**power else f"{value:g}"


@dataclass(frozen=True)
class Number:
    """A finite number from low to high; `above` and `below` exclude the ends, `whole` allows integers only."""

    low: float
    high: float
    unit: str = ""
    null: bool = False
    whole: bool = False
    above: bool = False
    below: bool = False

    def holds(self, value: object) -> bool:
        if value is None:
            return self.null
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)  # nan is in no interval

    def interval(self) -> str:
        low = f"{'greater than' if self.above else 'at least'} {limit(self.low)}"
        return f"{low} and {'below' if self.below else 'at most'} {limit(self.high)}"

    def __str__(self) -> str:
        kind = f"a {'whole ' if self.whole else ''}number{f' of {self.unit}' if self.unit else ''}"
        return f"{kind}{', ' if self.whole or self.unit else ' '}{self.interval()}{', or null' if self.null else ''}"


@dataclass(frozen=True)
class Choice:
    """One of a few words, numbers or booleans."""

    values: tuple[Any, ...]
    null: bool = False

    def holds(self, value: object) -> bool:
        if value is None:
            return self.null
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        return " or ".join([", ".join(map(format_value, self.values)), *(["null"] if self.null else [])])


@dataclass(frozen=True)
class Text:
    """A string that matches a pattern, by default any that is not blank; `what` describes it."""

    what: str
    match: str = r"(?s).*\S.*"
    null: bool = False

    def holds(self, value: object) -> bool:
        return self.null if value is None else isinstance(value, str) and re.fullmatch(self.match, value) is not None

    def __str__(self) -> str:
        return f"{self.what}{', or null' if self.null else ''}"


@dataclass(frozen=True)
class Many:
    """A list of `least` to `most` values in a range, or with `alone` also a single one."""

    each: Any
    least: int = 1
    most: int = 10**6
    null: bool = False
    alone: bool = False

    def holds(self, value: object) -> bool:
        if value is None:
            return self.null
        if not isinstance(value, list):
            return self.alone and self.each.holds(value)
        return self.least <= len(value) <= self.most and all(map(self.each.holds, value))

    def __str__(self) -> str:
        size = f"{self.least}" if self.least == self.most else f"{self.least} or more" if self.least else ""
        alone = f"{self.each}, or " if self.alone else ""
        end = "; or null" if self.null else ""
        like = f"[a] of 1 value, {self.each}" if self.most == 1 else ""
        like = like or f"[a,b] of {f'{size} values' if size else 'values'}, each {self.each}"
        return f"{alone}a list like {like}{end}"


@dataclass(frozen=True)
class Either:
    """A value of one kind or of another."""

    one: Any
    other: Any

    def holds(self, value: object) -> bool:
        return self.one.holds(value) or self.other.holds(value)

    def __str__(self) -> str:
        return f"{self.one}, or {self.other}"


@dataclass(frozen=True)
class Node:
    """A config node with a `_target_`."""

    null: bool = False

    def holds(self, value: object) -> bool:
        return self.null if value is None else isinstance(value, dict) and "_target_" in value

    def __str__(self) -> str:
        return "a node with a _target_" + (", or null to leave it out" if self.null else "")


class Named:
    """A name, or {name: node}."""

    def holds(self, value: object) -> bool:
        if isinstance(value, dict):
            return len(value) == 1 and all(isinstance(key, str) and Node().holds(node) for key, node in value.items())
        return isinstance(value, str) and value.strip() != ""

    def __str__(self) -> str:
        return "a name or {name: {_target_: my_lab.Metric}}"


class Group:
    """A group of keys, which are set one by one."""

    def holds(self, value: object) -> bool:
        return isinstance(value, dict)

    def __str__(self) -> str:
        return "a group of keys: set one of them"


class Row:
    """A baseline by name, with the keys that differ from its file."""

    def holds(self, value: object) -> bool:
        return isinstance(value, dict) and "baseline" in value

    def __str__(self) -> str:
        return "such as {baseline: gmm, components: 3}"


class Free:
    """Any value but a dict, or a non-empty list of such values; the code that uses it checks more."""

    def holds(self, value: object) -> bool:
        if isinstance(value, list):
            return bool(value) and all(self.holds(one) and one is not None for one in value)
        return value is None or not isinstance(value, dict)

    def __str__(self) -> str:
        return "a value or a list that is not empty, or null"
