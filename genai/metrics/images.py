"""Similarity of two images of the same scene, one value for each pair.

Images are in [-1, 1], or in [low, low + span].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.shapes import mean_flat

WINDOW, SIGMA = 11, 1.5


def psnr(x: Tensor, y: Tensor, span: float = 2.0) -> Tensor:
    """Compute the peak signal-to-noise ratio of x, y (B, ...) in dB, (B,): 10 log10 of span^2 over the mean squared error.

    It is infinite for equal samples. The mean over samples is higher than the ratio of the pooled error. Raises UserError for
    different shapes.
    """
    _check_shapes(x, y)
    return -10 * (mean_flat((x - y) ** 2) / span**2).log10()


def ssim(x: Tensor, y: Tensor, low: float = -1.0, span: float = 2.0) -> Tensor:
    """Compute the structural similarity of images x, y (B, C, H, W), (B,), 1 for equal ones (Wang et al. 2004, equation 13).

    It is the mean over positions and channels with a Gaussian window of 11 x 11 pixels and deviation 1.5, at all positions
    inside the image, K1 = 0.01 and K2 = 0.03, in float64. `low` is subtracted first, as SSIM compares intensities from
    black: with values around 0 a negative would count as nearly equal to its image.

    Raises UserError for different shapes, or images smaller than the window.
    """
    _check_shapes(x, y)
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
    """Average (B, C, H, W) with the Gaussian window, one direction after the other, to (B, C, H - 10, W - 10)."""
    weights = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-0.5 * (weights / SIGMA) ** 2).exp()
    weights = weights / weights.sum()
    flat = x.flatten(0, 1)[:, None]  # (B C, 1, H, W)
    return F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1)).view(*x.shape[:2], -1)


def _check_shapes(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise UserError(f"samples of shape {tuple(x.shape)} and {tuple(y.shape)} cannot be compared one by one")
