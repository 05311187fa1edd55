"""Checks against silent broadcasting: one scalar per sample, and outputs of the expected shape."""

from collections.abc import Sequence

from torch import Tensor

from genai.core.errors import UserError


def check_shape(x: Tensor, shape: Sequence[int], key: str) -> Tensor:
    """Return x, which must be (B, *shape). Raises UserError, which names the config key of the network that made it."""
    if x.shape[1:] != tuple(shape):
        raise UserError(
            f"{key} makes {list(x.shape[1:])} of an item, and the model needs {list(shape)}: choose another, or other sizes"
        )
    return x


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """View t of shape (B,) as (B, 1, ..., 1) in x's dtype, so that it scales each sample of x (B, ...).

    Raises ValueError if t is not one number per sample of x.
    """
    if t.shape != x.shape[:1]:
        raise ValueError(f"expected one number per sample, shape ({x.shape[0]},), got {tuple(t.shape)}")
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def mean_flat(x: Tensor) -> Tensor:
    """Average over every dimension but the first: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)
