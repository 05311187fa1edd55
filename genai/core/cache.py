"""Where what is computed once is kept: $XDG_CACHE_HOME/genai, or ~/.cache/genai."""

import os
from pathlib import Path

CACHE_HINT = "make room, or name another cache folder in the environment variable XDG_CACHE_HOME"


def cache_folder(kind: str) -> Path:
    """Of one kind of thing; not made yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genai" / kind
