"""The start of a W&B run, online where its server answers, else offline; it never prompts, hangs or raises."""

import contextlib
import hashlib
import io
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genai import progress
from genai.core.files import write_text

REACHED_SECONDS = 5.0  # time-out for the server's first answer
_own_variables: set[str] = set()  # of the environment, set until the end of the W&B run that is open


def run_id(folder: Path) -> str:
    """Return the id of a directory's W&B run from its file `wandb_id`, which is made with a new id if there is none.

    An older run, without this file, keeps the id that was derived from its path.
    """
    path = folder / "wandb_id"
    if path.is_file() and re.fullmatch(r"[\w-]{1,64}", found := path.read_text(errors="replace").strip()):
        return found
    if (folder / "wandb").exists() or any((folder / "checkpoints").glob("*.ckpt")):
        fresh = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    else:
        fresh = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8)  # W&B's own sweeps give one
    write_text(path, fresh + "\n", within=folder)
    return fresh


def start_run(folder: Path, timeout_seconds: float, **arguments: Any) -> Any:
    """Start the W&B run of a directory, online or offline; None if neither works. Prints which, and why; never raises.

    Errors of wandb, about accounts, networks or home directories, become part of that line.
    """
    reason, run, output = "", None, io.StringIO()
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # of wandb's own telemetry, which may fail as well
    with own_home(folder), contextlib.ExitStack() as stack:
        try:
            import wandb  # which wraps sys.stdout: before a progress bar or a redirection stands there

            stack.enter_context(progress.task("starting W&B"))
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                arguments |= {
                    "dir": folder,
                    "id": run_id(folder),
                    "resume": "allow",
                    "settings": wandb.Settings(init_timeout=timeout_seconds, silent=True, console="wrap"),
                }
                reason = _reason_offline(wandb)
        except Exception as error:
            reason = first_line(error)
        modes: list[Any] = ["offline"] if reason else ["online", "offline"]
        for mode in modes if "settings" in arguments else ():
            try:
                run = wandb.init(mode=mode, **arguments)
                break
            except Exception as error:
                reason = first_line(error)
                with contextlib.suppress(Exception):
                    wandb.teardown()  # otherwise wandb's service still holds the id of the failed run
    if run is None:
        restore_home()
        print(f"wandb: no run ({reason}); what was measured is in {folder} all the same")
    elif reason:
        print(f"wandb: offline ({reason}); wandb sync {Path(run.dir).parent} uploads it")
    else:
        print(f"wandb: {run.url}")
    return run


def first_line(error: Exception) -> str:
    """Return the kind and the first line of an exception."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


@contextlib.contextmanager
def own_home(folder: Path) -> Iterator[None]:
    """Make wandb keep its own files below `folder` if the home directory cannot be written; `restore_home` ends it."""
    if _is_writable(cache := os.environ.get("XDG_CACHE_HOME")):
        yield
        return
    own = str((folder / "wandb").absolute())
    for key in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):  # read at any time until the run ends
        if key not in os.environ:
            os.environ[key] = own
            _own_variables.add(key)
    os.environ["XDG_CACHE_HOME"] = own  # where wandb's service, which starts now, puts its log
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if cache is not None:
            os.environ["XDG_CACHE_HOME"] = cache


def restore_home() -> None:
    """Let the next run of this process choose a folder for wandb's own files again."""
    while _own_variables:
        os.environ.pop(_own_variables.pop(), None)


def _is_writable(cache: str | None) -> bool:
    """Return True if the user's cache folder, `cache` or that of the home directory, can be written."""
    try:
        folder = Path(cache) if cache else Path.home() / ".cache"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return os.access(folder, os.W_OK)


def _reason_offline(wandb: Any) -> str:
    """Return why a run must be offline, "" if it can be online. Never prompts; takes at most REACHED_SECONDS."""
    if (mode := os.environ.get("WANDB_MODE") or "online") != "online":
        return f"WANDB_MODE={mode}"
    # silent: otherwise a login asks the server for the user's name. verify=False: it would raise without a server.
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if not wandb.login(prompt=False, verify=False):
        return "not logged in, see wandb login"
    return reason_unreachable(settings.base_url)


def reason_unreachable(url: str) -> str:
    """Return why no HTTP server answers at a URL, "" if one does, with any status."""
    import requests

    found = [f"{url} does not answer within {REACHED_SECONDS:g} s"]

    def ask() -> None:
        try:
            requests.head(url, timeout=REACHED_SECONDS, allow_redirects=False).close()
            found.append("")
        except Exception as error:
            inner = getattr(error.args[0] if error.args else None, "reason", None)
            found.append(f"{url} does not answer, {type(inner or error).__name__}")

    asking = threading.Thread(target=ask, daemon=True)  # in a thread, since resolving a host name has no time-out
    asking.start()
    asking.join(REACHED_SECONDS)
    return found[-1]
