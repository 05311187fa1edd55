"""Packages that an installation may lack."""

import importlib
from typing import Any

from genai.core.errors import UserError


def load(package: str, extra: str, what: str) -> Any:
    """Import a package of one of the extras. Raises UserError, which says `what` needs it and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing(package, extra, what) from error


def missing(package: str, extra: str, what: str) -> UserError:
    """Return the error that says `what` needs a package of one of the extras, and how to install it."""
    return UserError(
        f'{what} needs the package {package.partition(".")[0]}: pip install "genai-lab[{extra}]", in a checkout '
        f'pip install -e ".[{extra}]"'
    )
