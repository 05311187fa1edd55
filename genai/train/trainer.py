"""Lightning's Trainer as a run uses it: the loop and its callbacks do what Lightning's own extras would."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler


class Unprofiled(PassThroughProfiler):
    """A profiler that does nothing. Lightning's own makes a generator for each of the fifty sections of a step."""

    def profile(self, action_name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def build_trainer(hardware: dict[str, Any], max_steps: int, folder: Path, **extensions: Any) -> L.Trainer:
    """Return a Trainer that logs, validates, draws, saves and handles signals only as its `callbacks` and `plugins` do.

    Args:
        hardware: what `hardware.choose_hardware` returned. With precision "bf16-true" the model has its dtype already.
    """
    trainer = L.Trainer(
        **{**hardware, "precision": hardware["precision"].replace("bf16-true", "32-true")},
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        profiler=Unprofiled(),
        **extensions,
    )
    # Lightning's handlers run a collective, which hangs if one rank alone gets SIGTERM; `Stop` handles signals instead.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


@contextlib.contextmanager
def silence_lightning() -> Iterator[None]:
    """Suppress what Lightning prints about itself, but for warnings that concern a user."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        logger.setLevel(logging.ERROR)
        for message in (
            ".*does not have many workers.*",
            ".*`isinstance.treespec, LeafSpec.*",
            ".*exists and is not empty.*",
            ".*in eval mode at the start of training.*",  # a first stage that is not trained
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            logger.setLevel(level)
