"""The summary and dry run of a training: layers, data, optimiser, and memory and time of a step, measured on a few steps.

Nothing is written: the steps train a model that is thrown away, with the run's own loop, data stream and precision.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from genai import progress
from genai.data.stream import batches
from genai.train.callbacks import Between, Evaluate, Samples, peak_memory_bytes
from genai.train.lit import LitModel
from genai.train.optim import Chain

WARM_UP = 3  # steps that are not measured: they build caches, compile and choose algorithms
STEPS, SECONDS = 50, 10.0  # at most so many are measured, for about so long, but never fewer than FEWEST
FEWEST = 3
DEPTH = 2

Row = tuple[str, str, str, int]
"""A layer: name, class, shape of its output ("" where it was not called), parameters."""


def summarise(lit: LitModel, steps: int, ranks: int = 1) -> str:
    """Return four lines: the model's size, the data, the optimiser, and how long training goes on."""
    model, data = lit.model, lit.data
    total = sum(p.numel() for p in model.parameters())
    frozen = total - sum(p.numel() for p in model.parameters() if p.requires_grad)
    splits = ", ".join(f"{len(data.splits[key]):,} {key}" for key in ("train", "val", "test") if key in data.splits)
    facts = [f"{data.field} {tuple(data.shape)}", f"{data.classes} classes" if data.classes else ""]
    optimizers: Any = lit.configure_optimizers()
    several = optimizers if isinstance(optimizers, list) else [optimizers]
    parts = [part for one in several for part in (one.optimizers if isinstance(one, Chain) else [one])]
    groups = [(type(part).__name__, part.param_groups[0]) for part in parts]
    rates = " and ".join(f"{name}, lr {group.get('lr_max', group['lr']):g}" for name, group in groups)
    items = data.batch_size * lit.accumulate * ranks
    return "\n".join(
        [
            f"model      {type(model).__name__}, {total:,} parameters"
            + (f", {frozen:,} of them frozen" if frozen else ""),
            f"data       {', '.join(filter(None, facts))}: {splits} items",
            f"optimiser  {rates}",
            f"training   {steps:,} steps of {items:,} items, {steps * items / len(data.splits['train']):.1f} epochs",
        ]
    )


def tabulate(rows: list[Row]) -> str:
    """Return the rows as lines of aligned columns."""
    cells = [("layer", "class", "output", "parameters"), *((*row[:3], f"{row[3]:,}") for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return "\n".join(
        "  ".join(c.rjust(w) if i == 3 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )


@contextmanager
def watch_shapes(model: nn.Module) -> Iterator[dict[nn.Module, tuple[int, ...]]]:
    """Note the shape of the first tensor that each module returns, while the context lasts."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, _: object, output: object) -> None:
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None:
            shapes[module] = tuple(first.shape)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def layers(model: nn.Module, shapes: dict[nn.Module, tuple[int, ...]]) -> list[Row]:
    """Return the modules of a model down to DEPTH, a list of modules as one row; parameters of a row include those below it."""
    rows: list[Row] = []

    def add(module: nn.Module, path: str, depth: int) -> None:
        for name, child in module.named_children():
            count = sum(p.numel() for p in child.parameters())
            inner = [*child.children()] if isinstance(child, nn.ModuleList | nn.ModuleDict) else []
            kind = " + ".join(dict.fromkeys(type(one).__name__ for one in inner)) or type(child).__name__
            called = [one for one in child.modules() if one in shapes]  # itself first, else it is used piece by piece
            shape = shapes[child if child in shapes else called[-1]] if called else None
            shown = f"{len(inner)} x {kind}" if inner else kind
            rows.append((f"{'  ' * (depth - 1)}{path}{name}", shown, "" if shape is None else str(shape), count))
            if depth < DEPTH and not inner:
                add(child, path, depth + 1)

    add(model, "", 1)
    return rows


class Measure(Between):
    """Finds the shapes of layers before the first step, times steps after WARM_UP, and stops the trainer.

    Args:
        callbacks: of the run; `peak_bytes` counts what its evaluations and samples need too, by one batch of an evaluation and
            one network call of the sampler for all of its samples.
    """

    def __init__(self, callbacks: Sequence[L.Callback]):
        self.callbacks = callbacks
        self.rows: list[Row] = []
        self.step_seconds, self.peak_bytes = float("nan"), 0

    def on_train_start(self, trainer: L.Trainer, pl_module: LitModel) -> None:
        batch = next(batches(pl_module.data.splits["train"], 2, 2))
        batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
        eager = torch.compiler.set_stance("force_eager")
        with (
            eager,
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            watch_shapes(pl_module.model) as shapes,
        ):
            pl_module.losses(pl_module.model, batch)
        self.rows = layers(pl_module.model, shapes)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LitModel, *_: object) -> None:
        done = trainer.global_step - min(WARM_UP, trainer.max_steps - 1)
        if done < 0:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        if done == 0:
            self.start = now
        else:
            self.step_seconds = (now - self.start) / done
        enough = done >= FEWEST and (done >= STEPS or now - self.start > SECONDS)
        if enough or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
            self.touch_peaks(pl_module)

    def touch_peaks(self, lit: LitModel) -> None:
        """Use the memory that evaluations and samples between steps use."""
        for callback in self.callbacks:
            if isinstance(callback, Evaluate):
                lit.evaluate("val", lit.data.batch_size)
            elif isinstance(callback, Samples):
                callback.try_out(lit, callback.n)
        self.peak_bytes = peak_memory_bytes()


def report(trainer: L.Trainer, lit: LitModel, measure: Measure, ranks: int) -> str:
    """Train a few steps with a trainer that has `measure` among its callbacks; return what --dry-run prints."""
    summary = summarise(lit, trainer.max_steps, ranks)
    with progress.task("measuring steps"):
        trainer.fit(lit)
    per_step, left = measure.step_seconds, str(timedelta(seconds=round(measure.step_seconds * trainer.max_steps)))
    gib, where = measure.peak_bytes / 2**30, lit.device.type
    memory = "of the GPU at its peak" if where == "cuda" else "of this process at its peak (resident set)"
    alone = f", on one of {ranks} ranks, without the others" if ranks > 1 else ""
    return "\n".join(
        [
            tabulate(measure.rows),
            "",
            summary,
            f"memory     {gib:.2f} GiB {memory}",
            f"time       {per_step:.4g} s a step on {where}{alone}: {left} for all steps, evaluations and samples not counted",
            "dry run: nothing was written",
        ]
    )
