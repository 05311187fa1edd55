"""Optimisers: functions of a model that return one torch Optimizer, whose groups carry their learning-rate schedule."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from genai.core.errors import UserError


def adamw(
    model: nn.Module,
    lr: float,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    lr_min: float = 0.0,
) -> Optimizer:
    """Fused AdamW; weight decay on matrices and kernels only. See `lr_at` for the schedule's arguments."""
    if lr <= 0:
        raise UserError(f"optim.lr={lr} must be greater than 0")
    by_decay: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}  # one group if nothing decays
    for p in model.parameters():
        if p.requires_grad:
            by_decay[weight_decay if p.ndim >= 2 else 0.0].append(p)
    groups = [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]
    schedule = {"lr_max": lr, "lr_min": lr_min, "warmup_steps": warmup_steps, "decay_steps": decay_steps}
    groups = [{**group, **schedule} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)


def lr_at(step: int, lr_max: float, lr_min: float, warmup_steps: int, decay_steps: int | None) -> float:
    """Learning rate of update step = 0, 1, ...: linear warm-up, then half a cosine down to lr_min at decay_steps.

    Past decay_steps it stays at lr_min; decay_steps None keeps lr_max.
    """
    if step < warmup_steps:
        return lr_max * (step + 1) / warmup_steps
    if decay_steps is None:
        return lr_max
    progress = min((step - warmup_steps) / max(decay_steps - warmup_steps, 1), 1.0)
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: Optimizer, step: int) -> float | None:
    """Give each group that carries a schedule its learning rate for update `step`; returns the first group's."""
    for group in optimizer.param_groups:
        if "lr_max" in group:
            group["lr"] = lr_at(step, *(group[k] for k in ("lr_max", "lr_min", "warmup_steps", "decay_steps")))
    return optimizer.param_groups[0].get("lr")
