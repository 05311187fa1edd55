"""Exponential moving average of a model's trainable parameters, kept in a second module and never swapped in."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.precision import upcast


def decay_at(n: int, decay: float, power: float | None, ramp: float | None = None) -> float:
    """Return the decay of update n = 1, 2, ...: the least of `decay`, 1 - (1 + n)^-power and 2^(-1 / (ramp (n - 1))).

    None leaves a bound out. power = 1 averages all weights since the start equally until `decay` is reached. The last
    bound is a half-life of `ramp` (n - 1) updates (Karras et al., "Training Generative Adversarial Networks with
    Limited Data", 2020, whose code has ramp = 0.05).
    """
    if power is not None:
        decay = min(decay, 1 - (1 + n) ** -power)
    if ramp is not None:
        decay = min(decay, 2 ** (-1 / (ramp * (n - 1))) if n > 1 else 0.0)
    return decay


class EMA:
    """An exponential moving average of a model's weights in a second module, `module`.

    It equals the live weights until the first update; buffers are copied. The average is float32 or wider: an update
    moves a weight by less than half precision can represent.

    Args:
        model: the live model.
        decay: the largest decay, in [0, 1]; 0 shares the live weights.
        power, ramp: warm-up of the decay, both None for a constant one; see `decay_at`.
        named_parameters: the parameters to average, None for all trained ones; `module` shares the others with the live
            model.

    Raises UserError for a decay out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        power: float | None = 0.75,
        named_parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
        ramp: float | None = None,
    ):
        if not 0 <= decay <= 1:
            raise UserError(f"ema.decay={decay} must be between 0 (the live weights) and 1")
        self.decay, self.power, self.ramp, self.updates = decay, power, ramp, 0
        self.names = [
            name
            for name, p in (model.named_parameters() if named_parameters is None else named_parameters)
            if p.requires_grad
        ]
        mine = set(self.names)
        shared = {id(p): p for name, p in model.named_parameters() if name not in mine}
        self.module = copy.deepcopy(model, shared).eval()
        self._pair(model)

    def _pair(self, model: nn.Module) -> None:
        average, trained = dict(self.module.named_parameters()), dict(model.named_parameters())
        self.live: list[Tensor] = [trained[name] for name in self.names]
        self.average: list[Tensor] = [average[name].requires_grad_(False) for name in self.names]
        self.narrow = False
        for mine, live in zip(self.average, self.live, strict=True):
            mine.data = upcast(mine.data)
            self.narrow |= mine.dtype != live.dtype
        self.buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))
        if self.decay == 0:  # the live weights: share their memory
            for mine, live in zip(self.average, self.live, strict=True):
                mine.data = live.data

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights by one update."""
        self.updates += 1
        if self.average and self.decay > 0:
            decay = decay_at(self.updates, self.decay, self.power, self.ramp)
            torch._foreach_lerp_(self.average, self.upcast_live(), 1 - decay)
        for mine, live in self.buffers:
            mine.copy_(live)

    def upcast_live(self) -> list[Tensor]:
        """Return the live parameters in float32 or wider."""
        return [upcast(live) for live in self.live] if self.narrow else self.live

    def distance(self) -> Tensor:
        """Return the norm of the difference between average and live weights, a scalar on the device."""
        if not self.average:
            return torch.zeros(())
        return torch.stack(torch._foreach_norm(torch._foreach_sub(self.average, self.upcast_live()))).norm()

    def to(self, device: torch.device, model: nn.Module) -> None:
        """Move the average to a device and pair it with the live model there."""
        self.module.to(device)
        self._pair(model)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name, tied ones under each name; frozen ones and buffers are the live
        model's."""
        averaged = {id(p) for p in self.average}
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: p.data for name, p in named if id(p) in averaged}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Load averaged parameters by name, and the number of updates behind them."""
        self.updates = updates
        for name, mine in zip(self.names, self.average, strict=True):
            mine.copy_(state[name])
