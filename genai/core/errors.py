"""The one exception that means "the person at the keyboard can fix this"."""


class UserError(ValueError):
    """One sentence: what was given, what is allowed, which key to change. Scripts print it and exit with code 2."""


SEED = 2**63 - 1  # the largest whole number that a tensor, and so a seed, can hold


def at_least(value: object, minimum: int, key: str, most: int = SEED) -> int:
    """value, checked to be a whole number from minimum to most. Raises UserError that names the config key."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= most:
        above = isinstance(value, int) and value > most
        end = f" and at most {'2^63 - 1' if most == SEED else most}" if above else ""
        raise UserError(f"{key}={value} must be a whole number, at least {minimum}{end}")
    return value


def number(value: object, key: str, low: float, high: float = float("inf"), open_low: bool = False) -> float:
    """value, checked to be a finite number from low (or above it) to high. Raises UserError that names the config key."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (low < value if open_low else low <= value)
        or not value <= high
        or value == float("inf")
    ):
        least = f"greater than {low:g}" if open_low else f"at least {low:g}"
        most = " and finite" if high == float("inf") else f" and at most {high:g}"
        raise UserError(f"{key}={value} must be a number {least}{most}")
    return value
