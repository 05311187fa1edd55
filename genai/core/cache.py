"""Where what is computed once is kept: $XDG_CACHE_HOME/genai, or ~/.cache/genai."""

import os
from collections.abc import Callable
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Of one kind of thing; not made yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genai" / kind


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """`save` to a temporary file that takes the place of `path` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save(temporary)
    temporary.replace(path)
