"""Optimisers: functions of a model, or of the named parameters of one of its parts, that return one torch Optimizer.

Its parameter groups carry their learning-rate schedule.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from genai.core.errors import UserError, at_least, number
from genai.train.muon import Muon


def adamw(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    lr: float,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    lr_min: float = 0.0,
    lazy_every: int | None = None,
    schedule: str = "cosine",
    cooldown: float = 0.2,
) -> Optimizer:
    """Return fused AdamW, with weight decay on matrices and kernels only. See `lr_at` for the schedule's arguments.

    Args:
        lazy_every: steps between two uses of a lazy regulariser: with c = k / (k + 1) the rate becomes c lr and the
            betas beta^c (Karras et al., "StyleGAN2", 2020, appendix B); None for no such regulariser.

    Raises UserError for a rate or a schedule out of range.
    """
    if lr <= 0:
        raise UserError(f"optim.lr={lr} must be greater than 0")
    rates = _schedule(lr_min, warmup_steps, decay_steps, schedule, cooldown)
    if lazy_every is not None:
        c = at_least(lazy_every, 1, "optim.lazy_every") / (lazy_every + 1)
        lr, rates["lr_min"], betas = c * lr, c * lr_min, [beta**c for beta in betas]
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    return _adamw([p for _, p in named], lr, betas, weight_decay, rates)


SCHEDULES = "cosine", "constant", "wsd"
FLEXIBLE = "lr_min", "warmup_steps", "decay_steps", "schedule", "cooldown"  # keys that a resumed run may change


def _schedule(
    lr_min: float, warmup_steps: int, decay_steps: int | None, schedule: str, cooldown: float
) -> dict[str, Any]:
    """Return a parameter group's schedule without lr_max. Raises UserError if it is out of range."""
    if schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={schedule} must be one of {', '.join(SCHEDULES)}")
    number(cooldown, "optim.cooldown", 0, 1, open_low=True)
    if schedule == "wsd" and decay_steps is None:
        raise UserError(
            "optim.schedule=wsd ends at optim.decay_steps, which is null: give it a number, or schedule=constant"
        )
    return dict(zip(FLEXIBLE, (lr_min, warmup_steps, decay_steps, schedule, cooldown), strict=True))


def _adamw(
    parameters: Sequence[nn.Parameter],
    lr: float,
    betas: Sequence[float],
    weight_decay: float,
    rates: Mapping[str, object],
) -> Optimizer:
    """Return AdamW with a group that decays, for parameters of two and more dimensions, and one that does not."""
    by_decay: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}  # one group if nothing decays
    for p in parameters:
        if p.requires_grad:
            by_decay[weight_decay if p.ndim >= 2 else 0.0].append(p)
    groups = [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]
    groups = [{**group, "lr_max": lr, **rates} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(float(betas[0]), float(betas[1])), fused=True)


class Chain(Optimizer):
    """Several optimisers of disjoint parameters as one: one list of groups, one state, one step."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = list(optimizers)
        super().__init__([group for part in optimizers for group in part.param_groups], {})
        self.found_inf: Any = None
        self._step_supports_amp_scaling = all(getattr(p, "_step_supports_amp_scaling", False) for p in optimizers)
        self._share()

    def _share(self) -> None:
        """Make the parts use this optimiser's groups and state."""
        groups = iter(self.param_groups)
        for part in self.optimizers:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __setstate__(self, state: dict) -> None:  # what load_state_dict ends with
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part."""
        loss = None if closure is None else closure()
        for part in self.optimizers:
            part.found_inf = self.found_inf  # type: ignore[attr-defined]
            part.step()
        return loss


def muon(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    lr: float,
    adamw_lr: float,
    momentum: float = 0.95,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    lr_min: float = 0.0,
    schedule: str = "cosine",
    cooldown: float = 0.2,
) -> Optimizer:
    """Return Muon (Jordan et al., 2024) for the matrices of linear layers, and AdamW for embeddings, output heads and
    the rest.

    A head is a linear layer named `head`. lr_min is a fraction of each of the two learning rates; see `lr_at`. Raises
    UserError for rates out of range, and for a model without inner linear layers.
    """
    if lr <= 0 or adamw_lr <= 0:
        raise UserError(f"optim.lr={lr} and optim.adamw_lr={adamw_lr} must be greater than 0")
    if not isinstance(model, nn.Module):
        raise UserError(
            "optim=muon needs a whole model, and the adversarial loop gives it the parameters of one network: use optim=adamw"
        )
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [m.weight for name, m in named.items() if name.split(".")[-1] != "head" and id(m.weight) not in tied]
    matrices = [p for p in matrices if p.requires_grad]
    if not matrices:
        raise UserError("optim=muon has nothing to do: this model has no linear layers inside, use optim=adamw")
    rates = _schedule(lr_min, warmup_steps, decay_steps, schedule, cooldown)
    inner = Muon(
        [{"params": matrices, "lr_max": lr, **rates, "lr_min": lr * lr_min}],
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
    )
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return Chain([inner, _adamw(rest, adamw_lr, betas, weight_decay, {**rates, "lr_min": adamw_lr * lr_min})])


def lr_at(
    step: int,
    lr_max: float,
    lr_min: float,
    warmup_steps: int,
    decay_steps: int | None,
    schedule: str = "cosine",
    cooldown: float = 0.2,
) -> float:
    """Return the learning rate of update step = 0, 1, ...: linear warm-up, then the schedule.

    cosine: half a cosine down to lr_min at decay_steps. constant: lr_max throughout. wsd (warm-up, stable, decay; Hu et
    al., "MiniCPM", 2024): lr_max, and in the last `cooldown` fraction of decay_steps lr_min + (lr_max - lr_min) (1 -
    sqrt(progress)) (Hägele et al., 2024). After decay_steps it stays at lr_min; decay_steps None keeps lr_max.
    """
    if step < warmup_steps:
        return lr_max * (step + 1) / warmup_steps
    if decay_steps is None or schedule == "constant":
        return lr_max
    start = warmup_steps if schedule == "cosine" else max(warmup_steps, round(decay_steps * (1 - cooldown)))
    progress = min(max((step - start) / max(decay_steps - start, 1), 0.0), 1.0)
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - math.sqrt(progress)
    return lr_min + (lr_max - lr_min) * left


def set_lr(optimizer: Optimizer, step: int) -> float | None:
    """Give each group that carries a schedule its learning rate for update `step`; returns the first group's."""
    for group in optimizer.param_groups:
        if "lr_max" in group:
            group["lr"] = rate_of(group, step)
    return optimizer.param_groups[0].get("lr")


def rate_of(group: Mapping[str, Any], step: int) -> float:
    """Return a group's learning rate for update `step`; stored groups without a schedule follow a cosine."""
    rest = {key: group[key] for key in ("schedule", "cooldown") if key in group}
    return lr_at(step, *(group[k] for k in ("lr_max", "lr_min", "warmup_steps", "decay_steps")), **rest)


def idle_from(optimizer: Optimizer, steps: int) -> int | None:
    """Return the first of the updates 0, ..., steps - 1 from which a group's rate is 0 to the end, None if none is."""
    first = [steps]
    for group in optimizer.param_groups:
        if "lr_max" in group and steps > 0 and rate_of(group, steps - 1) == 0:
            first.append(max(group["decay_steps"], group["warmup_steps"]))  # all that falls has fallen then
    return min(first) if min(first) < steps else None


def reschedule(groups: Sequence[dict[str, Any]], fresh: Sequence[Mapping[str, Any]]) -> None:
    """Give the stored groups of an optimiser the schedule of the present config; their lr_max stays."""
    for group, now in zip(groups, fresh, strict=False):
        if "lr_max" in group:
            group.update({key: now[key] for key in FLEXIBLE if key in now})
