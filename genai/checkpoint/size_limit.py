"""A bound on the size of models that are built from somebody's file."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genai.core.errors import UserError


class SizeLimit(TorchDispatchMode):
    """Stop the construction of a model that is far larger than its file, before the memory or the time is spent.

    Operations and the elements of their outputs are counted. The allowance is generous (eight elements for each stored one, 30
    operations for each tensor): initialisations make temporary tensors.

    Args:
        elements, tensors: numbers of those in the file.
        error: raised when the allowance is spent.
    """

    def __init__(self, elements: int, tensors: int, error: UserError):
        super().__init__()
        self.error = error
        # The constants let the smallest models through, whose overhead outweighs their weights.
        self.elements, self.operations = 8 * elements + 2**24, 30 * tensors + 5000

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.operations -= 1
        self.elements -= _count_elements(func, [*args, *(kwargs or {}).values()])
        if self.operations < 0 or self.elements < 0:
            raise self.error
        return func(*args, **(kwargs or {}))


# Operations whose output size is a scalar argument, not a list of sizes.
_SIZE_FROM_SCALARS = ("arange", "linspace", "logspace", "eye", "randperm", "tril_indices", "triu_indices")


def _count_elements(func: Any, arguments: list[Any]) -> float:
    """Estimate from an operation's arguments how many elements its output will have."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    sizes = [
        math.prod(map(abs, a)) for a in arguments if isinstance(a, list | tuple) and all(type(n) is int for n in a)
    ]
    name = func.overloadpacket.__name__
    if name in _SIZE_FROM_SCALARS:
        sizes += [abs(a) ** (2 if name == "eye" else 1) for a in arguments if type(a) in (int, float)]
    if name == "repeat":
        sizes = [n * t.numel() for n in sizes for t in tensors]
    if len(tensors) > 1 and torch.Tag.pointwise in func.tags:
        sizes.append(math.prod(torch.broadcast_shapes(*(t.shape for t in tensors))))
    return max(sizes, default=0)
