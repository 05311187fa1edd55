"""Experiment trackers. None of them may prompt, hang or stop a run."""

import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger

from genai.cards import table


def none(folder: Path, name: str, config: dict) -> None:
    """No tracker; metrics.csv is written all the same."""


def tensorboard(folder: Path, name: str, config: dict) -> Logger:
    """Event files below the run directory (`pip install tensorboard`)."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from genai.core.errors import UserError

    try:
        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from error


def wandb(folder: Path, name: str, config: dict, project: str, timeout_seconds: float = 30) -> Logger | None:
    """Weights & Biases: online where the machine is logged in and the server answers, offline otherwise.

    The run's id follows from its directory, so that a resumed run goes on under the same id.
    """
    from lightning.pytorch.loggers import WandbLogger

    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    run = _started(folder, timeout_seconds, project=project, name=name, config=config)
    if run is None:
        return None
    run.define_metric("*", step_metric="trainer/global_step")
    return WandbLogger(experiment=run)


def _started(folder: Path, timeout_seconds: float, **arguments: Any) -> Any:
    """A W&B run whose id follows from a directory, online or offline; None, with the reason said, if it cannot be."""
    import wandb

    arguments |= {
        "dir": folder,
        "id": hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        "resume": "allow",
        "settings": wandb.Settings(init_timeout=timeout_seconds, silent=True, console="off"),
    }
    reason = _offline_because(wandb)
    modes: list[Any] = ["offline"] if reason else ["online", "offline"]
    for mode in modes:
        try:
            run = wandb.init(mode=mode, **arguments)
        except Exception as error:  # whatever the account or the network does, training goes on
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if mode == "offline":
            print(f"wandb: offline ({reason}); wandb sync {Path(run.dir).parent} uploads it")
        else:
            print(f"wandb: {run.url}")
        return run
    print(f"wandb: no run ({reason}); what was measured is in {folder} all the same")
    return None


def _offline_because(wandb) -> str | None:
    """Why the server need not be tried, None if it should be."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if not wandb.login(prompt=False):
        return "not logged in, see wandb login"
    url = urlparse(wandb.setup().settings.base_url)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
    except OSError as error:
        return f"{url.hostname} does not answer ({error})"
    return None


def finish(failed: bool) -> None:
    """Close the tracker's run, as crashed if it failed."""
    import sys

    if (module := sys.modules.get("wandb")) is not None and module.run is not None:
        module.finish(exit_code=int(failed))


def log_cards(folder: Path, found: Sequence[dict[str, Any]]) -> None:
    """Cards as a table of the W&B run of a run directory, which is opened again for it."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    arguments = {key: value for key, value in config["logger"].items() if key != "_target_" and key != "_partial_"}
    if (logger := wandb(folder, config["name"], config, **arguments)) is not None:
        logger.log_table("cards", *table(found))  # type: ignore[attr-defined]
        finish(False)


def log_comparison(rows: Sequence[Mapping[str, Any]], page: Path, project: str) -> None:
    """The table of `genai.compare` and its page as one W&B run."""
    import wandb

    run = _started(page.parent, 30, project=project, name="compare", job_type="compare")
    if run is not None:
        run.log({"comparison": wandb.Table(list(rows[0]), [[row.get(column) for column in rows[0]] for row in rows])})
        run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        run.finish()
