"""A flag that is set while objects are built from a stored config.

Such a thing reads what is there: it downloads nothing, and writes nothing where the file chooses.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_building = ContextVar("building what a file says", default=False)


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Until its end, `is_building` is true."""
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def is_building() -> bool:
    """Whether the one who calls is being built because a file says so, and not because the user typed it."""
    return _building.get()
