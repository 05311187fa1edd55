"""One training run, from a composed config to a run directory."""

import contextlib
import copy
import functools
import logging
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from omegaconf import DictConfig, OmegaConf

from genai import checkpoint, progress
from genai.checkpoint.build import DATA, MODELS, RUN, build_stored, build_typed, packages_of
from genai.checkpoint.load import trusted_packages
from genai.cli import check_unchanged
from genai.cli.door import compose
from genai.core import files, precision, rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Preparable
from genai.core.stored import PRETRAINED
from genai.data.base import Data, random_subset
from genai.data.fingerprint import split_checksum
from genai.data.stream import batches
from genai.modalities.base import Modality
from genai.modalities.stored import difference, nodes_of
from genai.ranges import check as ranges
from genai.train import codec, trackers
from genai.train.callbacks import Cards, File, Progress, Samples, Stop
from genai.train.dry_run import Measure, report, summarise
from genai.train.lit import LitModel
from genai.train.lock import ELSEWHERE, lock_run
from genai.train.optim import idle_from
from genai.train.record import Record
from genai.train.strategy import Ranks, detect_ranks

LOOKED_AT = 4096  # samples that a model may look at before its first step
Known = tuple[Modality, dict[str, Modality]]
"""The modality of what a model makes, and those of its conditions."""

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true")  # fp16 would need its loss scaled


def train(cfg: DictConfig | Sequence[str]) -> Path:
    """Train from Python, see `genai.train.Train`."""
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
    """Train as `cfg` says; returns the run directory. Raises UserError for what the user can mend.

    Everything is built before anything is written, and nobody else can write to that directory meanwhile. `command` says that
    this process is a command of its own, which more processes can be started from, as trainer.devices=2 needs.
    """
    at_least(cfg.trainer.devices, 1, "trainer.devices")
    ranks = detect_ranks(os.environ, cfg.trainer.devices)
    if ranks.world > 1 and not ranks.launcher and not command:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices} starts processes, which a call from Python cannot: use the command genai "
            "train, or start this script by torchrun"
        )
    cfg.trainer.devices = ranks.here
    with _quiet(), ranks, contextlib.ExitStack() as held:
        return _run(cfg, ranks, held)


def dry_run(cfg: DictConfig) -> None:
    """Print what `run(cfg)` would train, with the memory and time of a step measured on a few steps; writes nothing.

    Raises UserError for what `run` would refuse, and for resume=.
    """
    if cfg.resume is not None:
        raise UserError("--dry-run measures a new run: leave resume= out, or --dry-run")
    ranks = detect_ranks(os.environ, at_least(cfg.trainer.devices, 1, "trainer.devices"))
    with _quiet(), contextlib.ExitStack() as held:
        cfg.trainer.devices = 1
        _run(cfg, Ranks(), held, ranks.world)


def _run(cfg: DictConfig, ranks: Ranks, held: contextlib.ExitStack, dry: int = 0) -> Path:
    """See `run`; the run directory is `held` by the first rank as soon as there is one. `dry` is the number of ranks that a dry
    run stands for."""
    trust = trusted_packages(cfg.trust)
    build = (
        build_typed if cfg.resume is None else functools.partial(build_stored, trust=trust, kinds=(MODELS, DATA, RUN))
    )
    if cfg.debug and cfg.resume is None:
        _shrink(cfg)
    at_least(cfg.max_steps, 1, "max_steps")
    at_least(cfg.seed, 0, "seed")
    hardware = _hardware(cfg.trainer, ranks)
    device = _device(hardware, ranks)
    if (tf32 := precision.allow_tf32(device, hardware["precision"])) and ranks.first:
        precision.print_once(tf32)
    for key in ("codec.cache", "data.cache"):
        if (cache := OmegaConf.select(cfg, key)) is not None:
            files.check_folder(Path(cache), key)
    if ranks.first and cfg.resume is not None:
        held.enter_context(lock_run(Path(cfg.resume)))
    folder, resumed = _folder(cfg, ranks)
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
        _same_meaning(*resumed, data.modality, data.conditions)
        _same_items(resumed[0]["trainer"].get("train_split"), train_split, resumed[1])
    torch.manual_seed(rng.mix(cfg.seed))
    model: Any = (
        build(config["model"])
        if resumed is None
        else checkpoint.build_model(config["model"], resumed[0]["model"], trust)
    )
    _check_model(model, data, cfg)
    known = data.modality, checkpoint.model_conditions(model, config, data.conditions)
    checkpoint.fill(model, adopted)
    own = {part.model.pretrained_from for part in adopted.values()}
    del adopted  # and all that their files hold
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model.to(device)
    if resumed is None:
        if cfg.init_from is not None:
            _init_from(model, known, config, own)
        with progress.task("measuring the training data"):
            config["model"] |= _prepare(model, data, device)
    model = (
        precision.cast_for_inference(model, hardware["precision"]) if hardware["precision"] == "bf16-true" else model
    )
    record = Record(folder, writes=ranks.first and not dry)
    lit = _lit(cfg, config, build, model, data, record, resumed[0] if resumed else None)
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
        L.Trainer, **{**hardware, "precision": hardware["precision"].replace("bf16-true", "32-true")},  # the model is in it
        max_steps=cfg.max_steps, max_epochs=-1, logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False, profiler=Unprofiled(),
    )  # fmt: skip
    if dry:
        measure = Measure(callbacks)
        print(report(trainer_of(callbacks=[measure], plugins=[ranks]), lit, measure, dry))
        return folder
    stop, file = Stop(), File(config, nodes_of(*known), train_split, resumed)
    trainer = trainer_of(callbacks=[*callbacks, Progress(), stop], plugins=[file, ranks])
    if ranks.first:
        if resumed is None and cfg.resume is None:
            held.enter_context(lock_run(folder))
            _check_unused(folder)
        _write(folder, config)
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
    """Raise UserError for what is no model, or one of other data."""
    target = cfg.model.get("_target_")
    if not isinstance(model, torch.nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"model._target_={target} has nothing to train: choose another model=, or give it its networks")
    if isinstance(field := getattr(model, "field", None), str) and field != data.field:
        raise UserError(f"model.field={field}, but this data has {data.field}: leave model.field= out")


def _lit(
    cfg: DictConfig, config: dict[str, Any], build: Any, model: torch.nn.Module, data: Data, record: Record,
    resumed: dict | None,
) -> LitModel:  # fmt: skip
    """The loop with its optimisers, which say now what they refuse."""
    for key in ("optim", "discriminator_optim", "ema"):
        if (config.get(key) or {}).get(
            "_target_"
        ) == PRETRAINED:  # it would take the model for the name of a checkpoint
            raise UserError(
                f"{key}._target_={PRETRAINED} makes a model of a checkpoint: choose another {key}._target_="
            )
    optim, ema = build(config["optim"]), build(config["ema"])
    loop = build({**config["loop"], "_partial_": True})
    if not (isinstance(loop.func, type) and issubclass(loop.func, L.LightningModule)):
        raise UserError(f"loop._target_={cfg.loop._target_} is not a training loop: leave loop._target_= out")
    try:
        lit = loop(
            model, data, optim, ema, record,
            seed=cfg.seed, accumulate=cfg.accumulate, clip_norm=cfg.clip_norm, log_every_steps=cfg.log_every_steps,
        )  # fmt: skip
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"loop._target_={cfg.loop._target_} cannot be built: {error}") from error
    _awake(lit.configure_optimizers(), cfg.max_steps, resumed)
    return lit


def _awake(optimizers: Any, steps: int, resumed: dict | None) -> None:
    """Raise UserError if a player's learning rate would be 0 from some step on to the end; a run that was given so many steps
    when that was no error goes on with a warning."""
    for name, optimizer in zip(
        ("optim", "discriminator_optim"), optimizers if isinstance(optimizers, list) else [optimizers], strict=False
    ):
        first = idle_from(optimizer, steps)
        if first is None:
            continue
        what = f"from step {first} to max_steps={steps} the learning rate would be 0 and nothing would be learned"
        if resumed is not None and resumed["config"].get("max_steps") == steps:
            print(f"warning: {what}: stop it there, or go on with {name}.decay_steps=", flush=True)
        else:
            raise UserError(
                f"{what}, since {name}.decay_steps={first}: give {name}.decay_steps={steps} for a longer decay, "
                f"{name}.lr_min= for its floor, or {name}.schedule=constant"
            )


class Unprofiled(PassThroughProfiler):
    """Lightning's profiler that does nothing, without a generator for each of the fifty times a step it is asked to."""

    def profile(self, action_name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def _shrink(cfg: DictConfig) -> None:
    """debug=true: five steps of eight samples, no tracker, everything that happens between steps at the end."""
    cfg.max_steps, cfg.log_every_steps, cfg.data.batch_size = 5, 1, 8
    cfg.logger = {"_target_": "genai.train.trackers.none"}
    for callback in filter(None, cfg.callbacks.values()):
        callback.update({k: min(v, 8) for k, v in callback.items() if isinstance(v, int)})


def _hardware(trainer: DictConfig, ranks: Ranks) -> dict[str, Any]:
    """Lightning's arguments for accelerator, devices, nodes, precision and how ranks share a step."""
    accelerator = trainer.accelerator
    if trainer.precision not in PRECISIONS:
        raise UserError(f"trainer.precision={trainer.precision} must be one of {', '.join(PRECISIONS)}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={accelerator}, but torch sees no GPU here: use trainer.accelerator=cpu or auto"
        )
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):  # Apple's has no float64, which tables and means need
        raise UserError(f"trainer.accelerator={accelerator} must be one of auto, cpu, gpu, cuda")
    gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if gpu and ranks.here > torch.cuda.device_count():
        raise UserError(f"trainer.devices={ranks.here}, but there are {torch.cuda.device_count()} GPUs here")
    most = max(2, os.cpu_count() or 1)
    if not gpu and not ranks.launcher and ranks.here > most:
        raise UserError(
            f"trainer.devices={ranks.here} would be as many processes on a CPU of {most} cores: use at most {most}"
        )
    return {
        "accelerator": "gpu" if gpu else "cpu",
        "devices": ranks.here,
        "num_nodes": ranks.world // ranks.here,
        "precision": precision.precision_of(trainer.precision, "cuda" if gpu else "cpu", "trainer.precision"),
        "strategy": "ddp" if ranks.world > 1 else "auto",
    }


def _device(hardware: dict[str, Any], ranks: Ranks) -> torch.device:
    """Where this rank trains, and what comes before the first step is computed."""
    return torch.device("cuda", ranks.local) if hardware["accelerator"] == "gpu" else torch.device("cpu")


def _prepare(model: Any, data: Data, device: torch.device) -> dict[str, Any]:
    """Let a model on `device` look at some of its training data, if it wants to; what it measured of its arguments."""
    if not isinstance(model, Preparable):
        return {}
    looked_at = batches(random_subset(data.splits["train"], LOOKED_AT), data.batch_size)
    return dict(model.prepare({name: value.to(device) for name, value in batch.items()} for batch in looked_at))


def _folder(cfg: DictConfig, ranks: Ranks) -> tuple[Path, tuple[dict, Path] | None]:
    """The run directory, not yet made, and what to resume from."""
    if cfg.resume is not None:
        folder = Path(cfg.resume)
        found = checkpoint.newest(folder)
        if found is None:
            print(f"{folder} has no checkpoint yet: it starts again from step 0")
            return folder, None
        _check_state(*found)
        check_unchanged(OmegaConf.to_container(cfg, resolve=True), found[0]["config"], folder)  # type: ignore[arg-type]
        if found[0]["step"] >= cfg.max_steps:
            raise UserError(
                f"{folder} has already done its {found[0]['step']} steps: give a larger max_steps= to go on"
            )
        return folder, found
    return Path(ranks.agree(lambda: str(_new_folder(cfg)))), None


STATE = {
    "epoch": int, "global_step": int, "pytorch-lightning_version": str, "loops": dict, "callbacks": dict,
    "optimizer_states": list, "lr_schedulers": list, "ema_updates": int, "means": dict,
}  # fmt: skip


def _check_state(content: dict, path: Path) -> None:
    """Raise UserError unless a checkpoint has what going on from it needs."""
    trainer = content["trainer"]
    wrong = [key for key, kind in STATE.items() if type(trainer.get(key)) is not kind]
    split = trainer.get("train_split")
    if split is not None and not (type(split) is dict and split.keys() == {"items", "checksum"}):
        wrong.append("train_split")
    if wrong:
        raise UserError(
            f"{path} cannot be gone on from: its trainer has no {', '.join(wrong)}; it can be sampled, or init_from="
        )


def _new_folder(cfg: DictConfig) -> Path:
    """The run directory of a new run, which holds none yet."""
    if cfg.run_dir is None:
        stamp = Path("runs") / cfg.name / time.strftime("%Y-%m-%d_%H-%M-%S")
        twins = (stamp.with_name(f"{stamp.name}_{n}") for n in range(2, 1000))
        files.check_folder(stamp, "run_dir")
        return next(path for path in (stamp, *twins) if not path.exists())
    folder = Path(cfg.run_dir)
    files.check_folder(folder, "run_dir")
    _check_unused(folder)
    return folder


def _check_unused(folder: Path) -> None:
    """Raise UserError if a folder holds a run."""
    if any((folder / name).exists() for name in ("config.yaml", "checkpoints")):
        raise UserError(f"run_dir={folder} already holds a run: resume={folder} goes on with it, or name another")


def _same_meaning(
    content: dict, path: Path, output: Modality, conditions: dict[str, Modality], other: str = ""
) -> None:
    """Raise UserError if a token or a label meant something else when a checkpoint was written; `other` ends its hint."""
    if what := difference(checkpoint.modalities(content), output, conditions):
        raise UserError(
            f"the {what} of this data is not that of {path}: give the data= it was trained on{other and ', ' + other}"
        )


def _same_items(stored: dict[str, Any] | None, found: dict[str, Any], path: Path) -> None:
    """Raise UserError if a run would go on with other training items; a checkpoint from before they were noted says nothing."""
    if stored is not None and stored != found:
        number = found["items"]
        what = f"are {number}" if number != stored["items"] else f"are as many, but others ({found['checksum']})"
        raise UserError(
            f"{path} was trained on {stored['items']} items ({stored['checksum']}), and those of data now {what}: bring the old "
            "data back (data.root= if they moved), or begin a new run from these weights with init_from="
        )


def _init_from(model: torch.nn.Module, known: Known, config: dict[str, Any], own: Collection[Any] = ()) -> None:
    """Load the averaged weights of config's `init_from`, but for frozen parts that have weights of their `own` origin by now.

    Raises UserError, if init_strict, where the weights, or the modalities `known` to both, differ.
    """
    content, path = checkpoint.locate(config["init_from"])
    strict = config["init_strict"]
    if strict:
        _same_meaning(content, path, *known, "or init_strict=false, if only the weights matter")
    frozen = tuple(
        f"{name}." for name, part in checkpoint.pretrained_modules(model)
        if part.pretrained_from.frozen and part.pretrained_from in own
    )  # fmt: skip
    state = {name: tensor for name, tensor in checkpoint.weights_of(content).items() if not name.startswith(frozen)}
    state |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith(frozen)}
    skipped = checkpoint.load_weights(model, state, path, strict)
    without = f", without {', '.join(skipped)}" if skipped else ""
    print(
        f"weights from the average in {path}{without}; also as there: {', '.join(_shared(content['config'], config))}"
    )


def _shared(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The groups of keys, and the keys of data, that two configs share; of data only where they differ in some."""
    groups = [key for key in ("model", "loop", "sampler") if _unnamed(theirs.get(key)) == _unnamed(ours.get(key))]
    data = [key for key, value in ours["data"].items() if key != "_target_" and theirs["data"].get(key, ...) == value]
    return groups + (["data"] if theirs["data"] == ours["data"] else [f"data.{key}" for key in data])


def _unnamed(node: Any) -> Any:
    """A node without the files that other checkpoints in it were read from."""
    return {k: _unnamed(v) for k, v in node.items() if k != "ckpt"} if isinstance(node, dict) else node


def _write(folder: Path, config: dict) -> None:
    """The folder with config.yaml, and git.diff with the commit in its first line where the code is a git checkout."""
    files.write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)), hint=ELSEWHERE)
    source = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, timeout=10).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        if commit:
            files.write_text(folder / "git.diff", f"# commit {commit}\n{git('diff', 'HEAD')}", hint=ELSEWHERE)
    except (OSError, subprocess.TimeoutExpired):
        pass  # no git here, nothing to describe


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning prints about itself; its warnings that concern a user stay."""
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
    raise SystemExit("error: this module is no command: type genai train, or python train.py")
