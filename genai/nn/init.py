"""Initialisation of weights."""

from torch import nn


def zero(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero and return it, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
