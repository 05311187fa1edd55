"""The one exception for what the user can fix, and the two checks of numbers that most config keys need."""

from numbers import Integral, Real


class UserError(ValueError):
    """An error in one sentence: what was given, what is allowed, which key to change. Scripts print it and exit with
    code 2."""


SEED = 2**63 - 1  # the largest int64, and so the largest seed


def show(value: object) -> str:
    """Return a value for an error: strings in quotes, and the type of what takes more than a line."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 200 and "\n" not in text else f"a value of type {type(value).__name__}"


def at_least(value: object, minimum: int, key: str, most: int = SEED) -> int:
    """Return value. Raises UserError, which names the config key, unless it is a whole number from minimum to most."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not minimum <= int(value) <= most:
        above = isinstance(value, Integral) and int(value) > most
        end = f" and at most {'2^63 - 1' if most == SEED else most}" if above else ""
        raise UserError(f"{key}={show(value)} must be a whole number, at least {minimum}{end}")
    return int(value)


def number(value: object, key: str, low: float, high: float = float("inf"), open_low: bool = False) -> float:
    """Return value. Raises UserError, which names the config key, unless it is a finite number from low to high.

    With open_low it must lie above low.
    """
    if isinstance(value, Real) and not isinstance(value, int | float):  # of numpy
        value = float(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (low < value if open_low else low <= value)
        or not value <= high
        or value == float("inf")
    ):
        least = f"greater than {low:g}" if open_low else f"at least {low:g}"
        most = " and finite" if high == float("inf") else f" and at most {high:g}"
        raise UserError(f"{key}={show(value)} must be a number {least}{most}")
    return value
