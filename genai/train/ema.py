"""Exponential moving average of a model's trainable parameters, kept in a second module and never swapped in."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.precision import upcast


def decay_at(n: int, decay: float, power: float | None, ramp: float | None = None) -> float:
    """Decay of update n = 1, 2, ...: at most `decay`, 1 - (1 + n)^-power and, with a half-life of `ramp` (n - 1) updates,
    2^(-1 / (ramp (n - 1))); None leaves that bound out.

    power = 1 averages all weights since the start equally until `decay` is reached. A ramp is that of Karras et al.,
    "Training Generative Adversarial Networks with Limited Data", 2020, whose code has 0.05.
    """
    if power is not None:
        decay = min(decay, 1 - (1 + n) ** -power)
    if ramp is not None:
        decay = min(decay, 2 ** (-1 / (ramp * (n - 1))) if n > 1 else 0.0)
    return decay


class EMA:
    """`module` holds the average: equal to the live weights until the first update, buffers copied, never trained. In float32 or
    wider: a half-precision weight is further from the next one than an update moves its average.

    Args:
        model: the live model.
        decay: the largest decay, in [0, 1].
        power, ramp: of the warm-up of the decay, both None for a constant one; see `decay_at`.
        named_parameters: those to average, None for all that are trained; `module` shares the others with the live model.
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
        """Move the average towards the live weights; once per optimiser step."""
        self.updates += 1
        if self.average and self.decay > 0:
            decay = decay_at(self.updates, self.decay, self.power, self.ramp)
            torch._foreach_lerp_(self.average, self.upcast_live(), 1 - decay)
        for mine, live in self.buffers:
            mine.copy_(live)

    def upcast_live(self) -> list[Tensor]:
        """The live weights as wide as their average."""
        return [upcast(live) for live in self.live] if self.narrow else self.live

    def distance(self) -> Tensor:
        """Euclidean distance between average and live weights, a scalar on their device."""
        if not self.average:
            return torch.zeros(())
        return torch.stack(torch._foreach_norm(torch._foreach_sub(self.average, self.upcast_live()))).norm()

    def to(self, device: torch.device, model: nn.Module) -> None:
        """Follow the live model to its device."""
        self.module.to(device)
        self._pair(model)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by name, tied ones by each of theirs; frozen ones and buffers are the live model's."""
        averaged = {id(p) for p in self.average}
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: p.data for name, p in named if id(p) in averaged}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        self.updates = updates
        for name, mine in zip(self.names, self.average, strict=True):
            mine.copy_(state[name])
