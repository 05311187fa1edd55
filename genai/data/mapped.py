"""Numbers in a file, read through a memory map."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from genai.core.errors import UserError


class MappedFile:
    """The numbers in a file, (N,) of one type, which each process maps into its memory itself."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype = path, dtype
        self.size = path.stat().st_size // dtype.itemsize
        self.file = self.map = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "file": None, "map": None}

    def numbers(self) -> np.ndarray:
        """Return the numbers (N,).

        Raises UserError if the file has become shorter: reading a mapped page past its end would kill the process.
        """
        if self.file is None:
            self.file = self.path.open("rb")
            weakref.finalize(self, self.file.close)
        if os.fstat(self.file.fileno()).st_size < self.size * self.dtype.itemsize:
            raise UserError(f"{self.path} was cut short while it was in use: start again, and it is prepared again")
        if self.map is None:
            self.map = np.memmap(self.file, self.dtype, "r") if self.size else np.zeros(0, self.dtype)
        return self.map
