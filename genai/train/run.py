"""One training run, from a composed config to a run directory."""

import contextlib
import copy
import functools
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from omegaconf import DictConfig, OmegaConf

from genai import checkpoint, progress
from genai.checkpoint.build import DATA, MODELS, RUN, build_stored, build_typed, packages_of
from genai.checkpoint.load import trusted_packages
from genai.cli.door import compose
from genai.core import files, precision, rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Preparable
from genai.data.base import Data, random_subset
from genai.data.fingerprint import split_checksum
from genai.data.stream import batches
from genai.modalities.stored import nodes_of
from genai.ranges import check as ranges
from genai.train import codec, trackers
from genai.train.callbacks import Cards, File, Progress, Samples, Stop
from genai.train.dry_run import Measure, report, summarise
from genai.train.folder import check_unused, choose_folder, write_config
from genai.train.hardware import choose_device, choose_hardware
from genai.train.init_from import load_initial_weights
from genai.train.lock import lock_run
from genai.train.loop import build_loop
from genai.train.record import Record
from genai.train.resume import check_same_items, check_same_modalities
from genai.train.strategy import Ranks, detect_ranks

PREPARE_SAMPLES = 4096  # at most so many training samples are measured before the first step


def train(cfg: DictConfig | Sequence[str]) -> Path:
    """Train in this process and return the run directory: the body of `genai.train.Train`."""
    cfg = copy.deepcopy(cfg) if isinstance(cfg, DictConfig) else compose(cfg)
    OmegaConf.set_struct(cfg, False)
    if "max_steps" not in cfg:
        raise UserError("this is not a config of training: compose it with genai.compose([...])")
    ranges.check(cfg, "train")
    try:
        return run(cfg, command=False)
    except SystemExit as stopped:
        if stopped.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from None
        raise


def run(cfg: DictConfig, command: bool = True) -> Path:
    """Train as `cfg` says and return the run directory.

    Everything is built before anything is written, and the directory is locked against other processes.

    Args:
        cfg: a composed config, which is changed.
        command: whether this process is a command, which can be started again for each of several devices; a notebook cannot.

    Raises:
        UserError: the config is wrong, or training had to stop.
        SystemExit: a signal, after the step is finished and the checkpoint is saved.
    """
    at_least(cfg.trainer.devices, 1, "trainer.devices")
    ranks = detect_ranks(os.environ, cfg.trainer.devices)
    if ranks.world > 1 and not ranks.launcher and not command:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices} starts processes, which a call from Python cannot: use the command genai "
            "train, or start this script by torchrun"
        )
    cfg.trainer.devices = ranks.here
    with _silence_lightning(), ranks, contextlib.ExitStack() as locks:
        return _run(cfg, ranks, locks)


def dry_run(cfg: DictConfig) -> None:
    """Print what `run(cfg)` would train, with the memory and time of a step measured on a few steps. Nothing is written.

    Raises:
        UserError: as `run` does, and for resume=.
    """
    if cfg.resume is not None:
        raise UserError("--dry-run measures a new run: leave resume= out, or --dry-run")
    ranks = detect_ranks(os.environ, at_least(cfg.trainer.devices, 1, "trainer.devices"))
    with _silence_lightning(), contextlib.ExitStack() as locks:
        cfg.trainer.devices = 1
        _run(cfg, Ranks(), locks, ranks.world)


def _run(cfg: DictConfig, ranks: Ranks, locks: contextlib.ExitStack, dry: int = 0) -> Path:
    """Train as `run` says, or measure.

    Args:
        ranks: the processes that train together, of which this is one.
        locks: takes the lock of the run directory, on the first rank.
        dry: 0 to train; otherwise only measure one process, of the `dry` that would train.
    """
    trust = trusted_packages(cfg.trust)
    build = (
        build_typed if cfg.resume is None else functools.partial(build_stored, trust=trust, kinds=(MODELS, DATA, RUN))
    )
    if cfg.debug and cfg.resume is None:
        _shorten(cfg)
    at_least(cfg.max_steps, 1, "max_steps")
    at_least(cfg.seed, 0, "seed")
    hardware = choose_hardware(cfg.trainer, ranks)
    device = choose_device(hardware, ranks)
    if (tf32 := precision.allow_tf32(device, hardware["precision"])) and ranks.first:
        precision.print_once(tf32)
    for key in ("codec.cache", "data.cache"):
        if (cache := OmegaConf.select(cfg, key)) is not None:
            files.check_folder(Path(cache), key)
    if ranks.first and cfg.resume is not None:
        locks.enter_context(lock_run(Path(cfg.resume)))
    folder, resumed = choose_folder(cfg, ranks)
    with progress.task("loading the data"):
        data = build(OmegaConf.to_container(cfg.data, resolve=True))
    for fact in ("shape", "classes", "levels"):
        cfg.data[fact] = getattr(data, fact)
    if cfg.resume is None:
        ranges.check_agreement(cfg)
    with progress.task("reading the training data"):
        train_split = {"items": len(data.splits["train"]), "checksum": split_checksum(data.splits["train"], quick=True)}
    with progress.task("loading other checkpoints"):
        adopted = checkpoint.adopt_all(cfg, build, trust, resumed is not None)
    config: dict[str, Any] = {**OmegaConf.to_container(cfg, resolve=True), "resume": None}  # type: ignore[dict-item]
    if resumed is not None:
        check_same_modalities(*resumed, data.modality, data.conditions)
        check_same_items(resumed[0]["trainer"].get("train_split"), train_split, resumed[1])
    torch.manual_seed(rng.mix(cfg.seed))
    model: Any = (
        build(config["model"])
        if resumed is None
        else checkpoint.build_model(config["model"], resumed[0]["model"], trust)
    )
    _check_model(model, data, cfg)
    modalities = data.modality, checkpoint.model_conditions(model, config, data.conditions)
    checkpoint.fill(model, adopted)
    own = {part.model.pretrained_from for part in adopted.values()}
    del adopted  # and all that their files hold
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model.to(device)
    if resumed is None:
        if cfg.init_from is not None:
            load_initial_weights(model, modalities, config, own)
        with progress.task("measuring the training data"):
            config["model"] |= _prepare(model, data, device)
    model = (
        precision.cast_for_inference(model, hardware["precision"]) if hardware["precision"] == "bf16-true" else model
    )
    record = Record(folder, writes=ranks.first and not dry)
    lit = build_loop(cfg, config, build, model, data, record, resumed[0] if resumed else None)
    callbacks = [build(node) for node in config["callbacks"].values() if node is not None]
    for callback in callbacks:  # before anything is written; on its device it is tried once more
        with progress.task("trying out the sampler and the metrics"):
            if isinstance(callback, Samples):
                callback.try_out(lit)
            elif isinstance(callback, Cards) and ranks.first:
                callback.try_out(lit, config, packages_of(config) if cfg.resume is None else trust)
    tracker = trackers.none
    if config["logger"] is not None:  # before anything is written
        tracker = trackers.check(build({**config["logger"], "_partial_": True}))
    if cfg.get("codec") is not None and cfg.codec.cache is not None and not dry:
        if resumed is not None:
            checkpoint.load_weights(model, resumed[0]["model"], resumed[1])
        codec.precompute(model, data, cfg)
    if cfg.compile:
        for net in model.nets().values():
            net.compile()
    ranks.start(device.type == "cuda")
    trainer_of = functools.partial(
        L.Trainer,
        **{**hardware, "precision": hardware["precision"].replace("bf16-true", "32-true")},  # the model is in it
        max_steps=cfg.max_steps,
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
    )
    if dry:
        measure = Measure(callbacks)
        print(report(trainer_of(callbacks=[measure], plugins=[ranks]), lit, measure, dry))
        return folder
    stop, file = Stop(), File(config, nodes_of(*modalities), train_split, resumed)
    trainer = trainer_of(callbacks=[*callbacks, Progress(), stop], plugins=[file, ranks])
    if ranks.first:
        if resumed is None and cfg.resume is None:
            locks.enter_context(lock_run(folder))
            check_unused(folder)
        write_config(folder, config)
        record.cut(resumed[0]["step"] if resumed else None)
        parameters = sum(p.numel() for p in model.parameters())
        with progress.task("starting the tracker"):
            record.tracker = tracker(folder, cfg.name, {**config, "parameters": parameters})
        where = f"{trainer.strategy.root_device}" + (f", {ranks.world} ranks" if ranks.world > 1 else "")
        print(summarise(lit, cfg.max_steps, ranks.world))
        started = f" that {ranks.launcher} started" if ranks.launcher else ""
        print(f"{folder}: {parameters:,} parameters, {cfg.max_steps} steps on {where}{started}")
    failed = True
    # a collective, which hangs if one rank gets SIGTERM
    trainer._signal_connector.register_signal_handlers = lambda: None
    try:
        with stop.handle_signals():
            trainer.fit(lit, ckpt_path=resumed[1] if resumed else None)
        failed = False
    finally:
        trackers.finish(failed, record.tracker)
    if ranks.first:
        print(f"done: look at {folder}/samples, and sample with python sample.py ckpt={folder}")
    return folder


def _check_model(model: Any, data: Data, cfg: DictConfig) -> None:
    """Raise UserError unless the model has parameters to train and is for this kind of data."""
    target = cfg.model.get("_target_")
    if not isinstance(model, torch.nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"model._target_={target} has nothing to train: choose another model=, or give it its networks")
    if isinstance(field := getattr(model, "field", None), str) and field != data.field:
        raise UserError(f"model.field={field}, but this data has {data.field}: leave model.field= out")


class Unprofiled(PassThroughProfiler):
    """A profiler that does nothing. Lightning's own makes a generator for each of the fifty sections of a step."""

    def profile(self, action_name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def _shorten(cfg: DictConfig) -> None:
    """Shorten a run to five steps of eight samples, without a tracker, for debug=true; every callback is called at its end."""
    cfg.max_steps, cfg.log_every_steps, cfg.data.batch_size = 5, 1, 8
    cfg.logger = {"_target_": "genai.train.trackers.none"}
    for callback in filter(None, cfg.callbacks.values()):
        callback.update({k: min(v, 8) for k, v in callback.items() if isinstance(v, int)})


def _prepare(model: Any, data: Data, device: torch.device) -> dict[str, Any]:
    """Return the arguments that a model on `device` measures on training data, as Preparable models do; others have none."""
    if not isinstance(model, Preparable):
        return {}
    measured = batches(random_subset(data.splits["train"], PREPARE_SAMPLES), data.batch_size)
    return dict(model.prepare({name: value.to(device) for name, value in batch.items()} for batch in measured))


@contextlib.contextmanager
def _silence_lightning() -> Iterator[None]:
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


if __name__ == "__main__":
    raise SystemExit("error: this module is not a command: type genai train, or python train.py")
