"""Loads and samples every checkpoint of a folder as somebody might who trusts it, and says what became of it.

`python -m tests.checkpoint.victim FOLDER` prints a JSON line for each file: what it was refused with or null, seconds of a core,
MB of memory above what the first one took, and everything that was written, started or called up meanwhile.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

import genai
from genai.core.errors import UserError

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DEEDS = ("os.", "subprocess.", "socket.", "shutil.", "urllib.", "tempfile.", "ctypes.dlopen", "pty.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")


def main(folder: Path) -> None:
    seen: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        wrote = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if wrote or (event.startswith(DEEDS) and event not in HARMLESS):
            seen.append(f"{event} {arguments[0] if arguments else ''}")

    torch.set_num_threads(1)
    first, *others = sorted(folder.glob("*.ckpt"))
    try_it(first)  # imports at first use are not changes made by the others
    sys.addaudithook(watch)
    start = peak()
    for path in [first, *others]:
        seen.clear()
        began = time.process_time()
        answer = try_it(path)
        facts = {
            "file": path.name,
            "answer": answer,
            "seconds": time.process_time() - began,
            "mb": peak() - start,
            "deeds": seen,
        }
        print(json.dumps(facts), flush=True)


def try_it(path: Path) -> str | None:
    """None if it loads and samples, else what it was refused with; anything but a UserError is reported by its name."""
    try:
        genai.sample(genai.load(path), n=2)
    except UserError as error:
        return str(error)
    except BaseException as error:
        return f"TRACEBACK {type(error).__name__}: {error}"
    return None


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
