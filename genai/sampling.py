"""Sampling from a loaded checkpoint, the same from the command line and from Python."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai import checkpoint
from genai.checkpoint import Loaded
from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, OnStep


def sample(
    loaded: Loaded,
    n: int = 16,
    seed: int = 0,
    label: Any = None,
    sampler: dict | None = None,
    batch_size: int = 256,
    on_step: OnStep | None = None,
    **arguments: Any,
) -> Batch:
    """n samples; sample i depends on seed + i, its label and the sampler, and on nothing else.

    Args:
        label: index, name or a list of them; shorter lists repeat. None takes the classes in turn.
        sampler: a config node, default the one the checkpoint was trained with.
        batch_size: samples made at once.
        on_step: called as on_step(step so far, steps of all batches, state).
        arguments: of the sampler, such as steps or guidance.

    Returns:
        what the sampler made, on the CPU, with `seeds` (n,) and, for a conditional model, `label` (n,).
    """
    at_least(n, 1, "n")
    at_least(batch_size, 1, "batch_size")
    at_least(seed, 0, "seed")
    run = bind(loaded, sampler or loaded.config["sampler"], arguments)
    seeds = rng.seed_range(seed, n)
    labels = resolve_labels(label, n, loaded)
    chunks, starts = [], range(0, n, batch_size)
    for k, start in enumerate(starts):
        part = slice(start, start + batch_size)
        cond = None if labels is None else {"label": labels[part]}
        progress = None if on_step is None else _shifted(on_step, k, len(starts))
        chunks.append(run(loaded.model, seeds[part], cond, progress))
    batch = {name: torch.cat([chunk[name].cpu() for chunk in chunks]) for name in chunks[0]}
    return {**batch, "seeds": seeds, **({} if labels is None else {"label": labels})}


def _shifted(on_step: OnStep, k: int, chunks: int) -> OnStep:
    return lambda i, steps, state: on_step(k * steps + i, chunks * steps, state)


def bind(loaded: Loaded, node: dict, arguments: dict[str, Any]) -> Callable[..., Batch]:
    """The sampler of a config node with arguments of its own changed. Raises UserError for one that it lacks."""
    own = [key for key in node if not key.startswith("_")]
    for key in arguments:
        if key not in own:
            raise UserError(f"the sampler {node['_target_'].rpartition('.')[2]} has no {key}; it has {', '.join(own)}")
    run = checkpoint.build({**node, **arguments}, loaded.trust)
    try:
        inspect.signature(run).bind(None, None, None, None)
    except TypeError as error:
        raise UserError(f"the sampler {node['_target_']} cannot be called: {error}") from error
    return run


def resolve_labels(label: Any, n: int, loaded: Loaded) -> Tensor | None:
    """Indices (n,) of the labels asked for, None for an unconditional model. Raises UserError for one it lacks."""
    names = loaded.assets.get("class_names")
    classes = loaded.config["model"].get("classes")
    if classes is None:
        if label is not None:
            raise UserError(f"label={label} was given, but this model is unconditional: leave label= out")
        return None
    if label is None:
        return torch.arange(n) % classes
    wanted = list(label) if isinstance(label, list | tuple) else [label]
    if not wanted:
        raise UserError("label=[] is empty: leave label= out for every class in turn")
    indices = torch.tensor([_index(value, names, classes) for value in wanted])
    return indices.repeat(-(-n // len(indices)))[:n]


def _index(value: Any, names: list[str] | None, classes: int) -> int:
    if names and str(value) in names:
        return names.index(str(value))
    if isinstance(value, int) and 0 <= value < classes:
        return value
    shown = f", or one of {', '.join(names[:20])}" if names else ""
    raise UserError(f"label={value} is not a class of this model: give an index from 0 to {classes - 1}{shown}")


def run(cfg: Any) -> Path:
    """`sample.py`: load, sample with a progress bar, write pictures and samples.npz; returns their folder."""
    from omegaconf import OmegaConf

    from genai.data.io import write_samples

    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU here: use device=cpu or auto")
    trust = [cfg.trust] if isinstance(cfg.trust, str) else list(cfg.trust or [])
    loaded = checkpoint.load(cfg.ckpt, cfg.weights, device, trust)
    node: dict[str, Any] = OmegaConf.to_container(cfg.sampler, resolve=True)  # type: ignore[assignment]
    if cfg.prompt is not None:
        raise UserError(f"prompt={cfg.prompt!r} was given, but this model takes no text: use label=")
    if cfg.guidance is not None:
        node["guidance"] = cfg.guidance
    label = OmegaConf.to_container(cfg.label) if OmegaConf.is_list(cfg.label) else cfg.label
    with bar() as on_step:
        batch = sample(loaded, cfg.n, cfg.seed, label, node, cfg.batch_size, on_step)
    out = Path(cfg.out) if cfg.out is not None else _unused(loaded.path.parent)
    field = loaded.config["data"]["field"]
    write_samples(out, field, batch[field], batch.get("label"), batch["seeds"], rng.RNG_VERSION)
    print(f"{cfg.n} samples of {loaded.path} (step {loaded.step}, {cfg.weights} weights): {out}/grid.png, samples.npz")
    return out


def _unused(folder: Path) -> Path:
    """The first of samples/0001, samples/0002, ... of the run that is not there yet; beside a checkpoint of no run."""
    base = (folder.parent if folder.name == "checkpoints" else folder) / "samples"
    return next(path for i in range(1, 10**6) if not (path := base / f"{i:04d}").exists())


@contextlib.contextmanager
def bar() -> Iterator[OnStep]:
    """An on_step that draws a progress bar; nothing where output is no terminal."""
    from rich.progress import Progress

    with Progress(disable=not sys.stdout.isatty(), transient=True) as progress:
        task = progress.add_task("sampling", total=None)
        yield lambda i, n, state: progress.update(task, completed=i + 1, total=n)
