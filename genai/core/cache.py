"""The cache folder: $XDG_CACHE_HOME/genai, or ~/.cache/genai."""

import os
from pathlib import Path

CACHE_HINT = "make room, or name another cache folder in the environment variable XDG_CACHE_HOME"


def cache_folder(kind: str) -> Path:
    """Return the cache folder of one kind of thing; it is not created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genai" / kind
