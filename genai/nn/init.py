"""First values of weights."""

from torch import nn


def zero(module: nn.Module) -> nn.Module:
    """The module with its parameters set to zero: a residual branch that starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
