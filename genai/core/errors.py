"""The one exception that means "the person at the keyboard can fix this"."""


class UserError(ValueError):
    """One sentence: what was given, what is allowed, which key to change. Scripts print it and exit with code 2."""


def at_least(value: object, minimum: int, key: str) -> int:
    """value, checked to be a whole number >= minimum. Raises UserError that names the config key."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserError(f"{key}={value} must be a whole number, at least {minimum}")
    return value
