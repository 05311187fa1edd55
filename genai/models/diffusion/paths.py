"""Affine paths x = alpha x0 + sigma eps, and the one place where eps, x0 and v are converted into each other.

Every parameterisation is a linear target u x0 + v eps; solving it together with the path for x0 gives

    x0 = p x + q out,   p = v / (alpha v - sigma u),   q = -sigma / (alpha v - sigma u).
"""

from typing import Literal, TypeVar

from torch import Tensor

from genai.core.errors import UserError

Parameterization = Literal["eps", "x0", "v"]
Number = TypeVar("Number", float, Tensor)


def combination(kind: Parameterization, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """(u, v) of the training target u x0 + v eps; v-prediction is Salimans & Ho 2022, appendix D."""
    if kind == "eps":
        return 0 * alpha, 0 * alpha + 1
    if kind == "x0":
        return 0 * alpha + 1, 0 * alpha
    if kind == "v":
        return -sigma, alpha
    raise UserError(f"model.parameterization={kind!r} is none of eps, x0, v")


def to_x0(kind: Parameterization, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """(p, q) with x0 = p x + q out, for floats or tensors of any one shape; sigma > 0, and alpha > 0 for eps."""
    u, v = combination(kind, alpha, sigma)
    scale = 1 / (alpha * v - sigma * u)
    return v * scale, -sigma * scale
