"""One training run, from a composed config to a run directory."""

import contextlib
import functools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from genai import checkpoint, progress
from genai.checkpoint.build import DATA, MODELS, RUN, build_stored, build_typed, packages_of
from genai.checkpoint.load import trusted_packages
from genai.cli.door import check_training, compose
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
from genai.train.trainer import build_trainer, silence_lightning

PREPARE_SAMPLES = 4096  # at most so many training samples are measured before the first step


def train(cfg: DictConfig | Sequence[str]) -> Path:
    """Train in this process and return the run directory: the body of `genai.train.Train`."""
    cfg = check_training(cfg) if isinstance(cfg, DictConfig) else compose(cfg)
    OmegaConf.set_struct(cfg, False)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            return run(cfg, command=False)
    except SystemExit as stopped:  # Lightning answers a KeyboardInterrupt of a callback with code 1
        if stopped.code == 128 + signal.SIGINT or isinstance(stopped.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def run(cfg: DictConfig, command: bool = True) -> Path:
    """Train as `cfg` says and return the run directory.

    Everything is built before anything is written, and the directory is locked against other processes. In another thread than
    the main one, signals are left to the program.

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
            "train, or start this script with torchrun"
        )
    cfg.trainer.devices = ranks.here
    with silence_lightning(), ranks, contextlib.ExitStack() as locks:
        return _run(cfg, ranks, locks)


def dry_run(cfg: DictConfig) -> None:
    """Print what `run(cfg)` would train, with the memory and time of a step measured on a few steps. Nothing is written.

    Raises:
        UserError: as `run` does, and for resume=.
    """
    if cfg.resume is not None:
        raise UserError("--dry-run measures a new run: leave resume= out, or --dry-run")
    ranks = detect_ranks(os.environ, at_least(cfg.trainer.devices, 1, "trainer.devices"))
    with silence_lightning(), contextlib.ExitStack() as locks:
        cfg.trainer.devices = 1
        _run(cfg, Ranks(), locks, ranks.world)


def _run(cfg: DictConfig, ranks: Ranks, locks: contextlib.ExitStack, dry: int = 0) -> Path:
    """Train as `run` says, or measure.

    Args:
        ranks: the processes that train together, of which this is one.
        locks: takes the lock of the run directory, on the first rank.
        dry: 0 to train; else only measure, in one process, a run of `dry` processes.
    """
    trust = trusted_packages(cfg.trust)
    build = (
        build_typed if cfg.resume is None else functools.partial(build_stored, trust=trust, kinds=(MODELS, DATA, RUN))
    )
    hardware, device = _check_settings(cfg, ranks)
    if ranks.first and cfg.resume is not None:
        locks.enter_context(lock_run(Path(cfg.resume)))
    folder, resumed = choose_folder(cfg, ranks)
    data, train_split = _load_data(cfg, build)
    with progress.task("loading other checkpoints"):
        adopted = checkpoint.adopt_all(cfg, build, trust, resumed is not None)
    config: dict[str, Any] = {**OmegaConf.to_container(cfg, resolve=True), "resume": None}  # type: ignore[dict-item]
    if resumed is not None:
        check_same_modalities(*resumed, data.modality, data.conditions)
        check_same_items(resumed[0]["trainer"].get("train_split"), train_split, resumed[1])
    model, modalities = _build_model(cfg, config, build, trust, data, resumed, adopted)
    own = {part.model.pretrained_from for part in adopted.values()}
    del adopted  # frees the content of their files
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model.to(device)
    if resumed is None:
        if cfg.init_from is not None:
            load_initial_weights(model, modalities, config, own)
        with progress.task("measuring the training data"):
            config["model"] |= _prepare(model, data, device)
    if hardware["precision"] == "bf16-true":
        model.to(torch.bfloat16)
    record = Record(folder, writes=ranks.first and not dry)
    lit = build_loop(cfg, config, build, model, data, record, resumed[0] if resumed else None)
    # what follows is tried before anything is written; Samples tries again when training starts
    callbacks = _build_callbacks(config["callbacks"], build)
    _try_out(callbacks, lit, config, packages_of(config) if cfg.resume is None else trust, ranks.first)
    tracker = trackers.none
    if config["logger"] is not None:
        tracker = trackers.check(build({**config["logger"], "_partial_": True}))
    if cfg.get("codec") is not None and cfg.codec.cache is not None and not dry:
        if resumed is not None:
            checkpoint.load_weights(model, resumed[0]["model"], resumed[1])
        codec.precompute(model, data, cfg)
    if cfg.compile:
        for net in model.nets().values():
            net.compile()
    ranks.start(device.type == "cuda")
    trainer_of = functools.partial(build_trainer, hardware, cfg.max_steps, folder)
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
        record.tracker = tracker(folder, cfg.name, {**config, "parameters": parameters})
        print(summarise(lit, cfg.max_steps, ranks.world))
        where = f"{trainer.strategy.root_device}" + (f", {ranks.world} ranks" if ranks.world > 1 else "")
        started = f" that {ranks.launcher} started" if ranks.launcher else ""
        print(f"{folder}: {parameters:,} parameters, {cfg.max_steps} steps on {where}{started}")
    failed = True
    try:
        with stop.handle_signals():
            trainer.fit(lit, ckpt_path=resumed[1] if resumed else None)
        failed = False
    finally:
        trackers.finish(failed, record.tracker)
    if ranks.first:
        print(f"done: look at {folder}/samples, and sample with python sample.py ckpt={folder}")
    return folder


def _check_settings(cfg: DictConfig, ranks: Ranks) -> tuple[dict[str, Any], torch.device]:
    """Return Lightning's arguments and the device; raises UserError for settings that the rest of the config does not decide."""
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
    return hardware, device


def _load_data(cfg: DictConfig, build: Any) -> tuple[Data, dict[str, Any]]:
    """Return the data, whose facts go into `cfg`, and what a checkpoint notes of its training split."""
    with progress.task("loading the data"):
        data = build(OmegaConf.to_container(cfg.data, resolve=True))
    for fact in ("shape", "classes", "levels", *(fact for fact in data.more_facts if fact in cfg.data)):
        cfg.data[fact] = getattr(data, fact)
    if cfg.resume is None:
        ranges.check_agreement(cfg)
    with progress.task("reading the training data"):
        train = data.splits["train"]
        return data, {"items": len(train), "checksum": split_checksum(train, quick=True)}


def _build_model(
    cfg: DictConfig,
    config: dict[str, Any],
    build: Any,
    trust: tuple[str, ...],
    data: Data,
    resumed: tuple[dict, Path] | None,
    adopted: dict[str, Any],
) -> tuple[Any, tuple[Any, dict[str, Any]]]:
    """Return the model on the CPU, with the weights of its `adopted` parts, and the modalities of its output and conditions.

    Raises:
        UserError: it has no parameters to train, does not fit the memory, or is for another kind of data.
    """
    torch.manual_seed(rng.mix(cfg.seed))
    node = config["model"]
    try:
        model: Any = build(node) if resumed is None else checkpoint.build_model(node, resumed[0]["model"], trust)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"this model does not fit the memory for data of shape {data.shape}: choose another model=, or smaller data"
        ) from error
    target = cfg.model.get("_target_")
    if not isinstance(model, torch.nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"model._target_={target} has nothing to train: choose another model=, or give it its networks")
    if isinstance(field := getattr(model, "field", None), str) and field != data.field:
        raise UserError(f"model.field={field}, but this data has {data.field}: leave model.field= out")
    modalities = data.modality, checkpoint.model_conditions(model, config, data.conditions)
    checkpoint.fill(model, adopted)
    return model, modalities


def _build_callbacks(nodes: dict[str, Any], build: Any) -> list[L.Callback]:
    """Return the callbacks of a config; raises UserError for an object that is not one."""
    callbacks = {name: build(node) for name, node in nodes.items() if node is not None}
    for name, callback in callbacks.items():
        if not isinstance(callback, L.Callback):
            target = nodes[name].get("_target_")
            raise UserError(f"callbacks.{name}._target_={target} is not a subclass of lightning.Callback: make it one")
    return [*callbacks.values()]


def _try_out(callbacks: list[Any], lit: Any, config: dict[str, Any], trust: tuple[str, ...], first: bool) -> None:
    """Sample and measure once as the callbacks will; raises UserError where one cannot. Cards are of the first rank alone."""
    for callback in callbacks:
        with progress.task("trying out the sampler and the metrics"):
            if isinstance(callback, Samples):
                callback.try_out(lit)
            elif isinstance(callback, Cards) and first:
                callback.try_out(lit, config, trust)


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


if __name__ == "__main__":
    raise SystemExit("error: this module is not a command: type genai train, or python train.py")
