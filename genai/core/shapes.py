"""The one helper that lets a per-sample scalar meet a tensor; silent broadcasting of `t` is a known way to be wrong."""

from torch import Tensor


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """View t of shape (B,) as (B, 1, ..., 1) in x's dtype, so that it scales each sample of x (B, ...).

    Raises ValueError if t is not one number per sample of x.
    """
    if t.shape != x.shape[:1]:
        raise ValueError(f"expected one number per sample, shape ({x.shape[0]},), got {tuple(t.shape)}")
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def mean_flat(x: Tensor) -> Tensor:
    """Mean over every dimension but the first: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)
