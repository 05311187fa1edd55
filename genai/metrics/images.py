"""Likeness of two images of the same scene: a value for each pair, whose mean over pairs is what is reported.

Images are in [-1, 1] unless `low` and `span`, the range's width, say otherwise.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.shapes import mean_flat

WINDOW, SIGMA = 11, 1.5


def psnr(x: Tensor, y: Tensor, span: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of x, y (B, ...) in decibels (B,): 10 log10 of span^2 over the mean squared error.

    Infinite for equal samples. The mean of these is higher than the ratio of the pooled error, so say which it is.
    Raises UserError for unlike shapes.
    """
    _alike(x, y)
    return -10 * (mean_flat((x - y) ** 2) / span**2).log10()


def ssim(x: Tensor, y: Tensor, low: float = -1.0, span: float = 2.0) -> Tensor:
    """Structural similarity of images x, y (B, C, H, W) -> (B,), 1 for equal ones (Wang et al. 2004, equation 13).

    A Gaussian window of 11 x 11 with deviation 1.5, wherever it lies wholly inside, K1 = 0.01 and K2 = 0.03, in
    float64; the mean over places and channels. It compares brightnesses from black, so `low` is taken off first:
    without that, values around 0 give another figure, and a negative is nearly equal to its image. Raises UserError for
    unlike shapes or images smaller than the window.
    """
    _alike(x, y)
    if x.ndim != 4 or min(x.shape[2:]) < WINDOW:
        raise UserError(
            f"images {tuple(x.shape)} must be (B, C, H, W) with at least {WINDOW} by {WINDOW} pixels for SSIM"
        )
    x, y = x.double() - low, y.double() - low
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mx, my, xx, yy, xy = (_blur(image) for image in (x, y, x * x, y * y, x * y))
    means = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    return mean_flat(means * (2 * (xy - mx * my) + c2) / (xx - mx**2 + yy - my**2 + c2))


def _blur(x: Tensor) -> Tensor:
    """Gaussian means of (B, C, H, W) -> (B, C, H - 10, W - 10), one direction after the other."""
    weights = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-0.5 * (weights / SIGMA) ** 2).exp()
    weights = weights / weights.sum()
    flat = x.flatten(0, 1)[:, None]  # (B C, 1, H, W)
    return F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1)).view(*x.shape[:2], -1)


def _alike(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise UserError(f"samples of shape {tuple(x.shape)} and {tuple(y.shape)} cannot be compared one by one")
