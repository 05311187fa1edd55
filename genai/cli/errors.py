"""Errors of the command line: one sentence and exit code 2, and the nearest name to a wrong one."""

import contextlib
import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

from genai.core.errors import UserError

# Errors of a disk that is full or cannot be written, or of too long a name, whichever package raised them.
UNUSABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def fail(error: UserError) -> NoReturn:
    """Print the sentence, without the middle of long values, and exit with code 2."""
    print(f"error: {cut_values(str(error))}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Within, a UserError, and a file that cannot be used, is printed as one sentence and exits with code 2."""
    try:
        yield
    except UserError as error:
        fail(error)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        fail(UserError(f"{error.filename or 'a file'} cannot be used ({error.strerror}): make room, or name another"))


def cut_values(sentence: str) -> str:
    """Return the sentence with every typed value, and every word, of more than 300 characters cut to 80 of them."""
    typed = {part for argument in sys.argv for part in (argument, *argument.split("=", 1)) if len(part) > 300}
    for part in sorted(typed, key=len):  # the value before the argument that contains it
        sentence = sentence.replace(part, _cut(part))
    return re.sub(r"\S{301,}?(?=[:;,]?(?:\s|$))", lambda word: _cut(word[0]), sentence)


def _cut(text: str) -> str:
    return f"{text[:60]}...{text[-20:]} ({len(text)} characters)"


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
