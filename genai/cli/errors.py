"""Errors of the command line: one sentence and exit code 2, and the nearest name to a wrong one."""

import difflib
import errno
import sys
from collections.abc import Iterable
from typing import NoReturn

from genai.core.errors import UserError

# Errors of a disk that is full or cannot be written, whichever package raised them.
UNUSABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def fail(error: UserError) -> NoReturn:
    """Print the sentence and exit with code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


SYNONYMS = {  # what other projects call a key
    **dict.fromkeys(
        ("epochs", "max_epochs", "num_epochs", "n_epochs", "iterations", "num_steps", "steps"), "max_steps"
    ),
    **dict.fromkeys(("learning_rate", "optim.learning_rate"), "optim.lr"),
    **dict.fromkeys(("gpus", "devices", "num_gpus"), "trainer.devices"),
    **dict.fromkeys(("checkpoint", "ckpt_path", "model", "run", "run_dir"), "ckpt"),
    **dict.fromkeys(("output", "out_dir", "output_dir", "outdir"), "out"),
    **dict.fromkeys(("num_samples", "n_samples", "samples", "count"), "n"),
    **dict.fromkeys(("dataset", "datasets"), "data"),
    "cfg_scale": "guidance",
    "class": "label",
    "data_dir": "data.root",
    "output_folder": "run_dir",
}


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ", did you mean X?" for the nearest of `words`, else "". A bare name matches the last part of a dotted key."""
    words = list(words)
    if SYNONYMS.get(word) in words:
        return f", did you mean {SYNONYMS[word]}?"
    full = difflib.get_close_matches(word, words, 1, 0.75)
    tails = [w for w in words if w.rpartition(".")[2] == word.rpartition(".")[2]]
    close = difflib.get_close_matches(word, [w.rpartition(".")[2] for w in words], 1, 0.75)
    close = [w for w in words if close and w.rpartition(".")[2] == close[0]]
    found = next(iter([*tails, *full, *close]), None)
    return f", did you mean {found}?" if found else ""
