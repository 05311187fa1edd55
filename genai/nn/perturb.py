"""Random changes of sound that leave what is said, for models that should not depend on the speaker or the microphone."""

import torch
from torch import Tensor, nn

from genai.core.errors import number

TAPS = 8  # of the filter


class Perturb(nn.Module):
    """Play each clip (1, T) at another speed and place, through another filter, and with noise; only in training mode.

    The speed changes pitch, formants and tempo at once, as a tape does (Ko et al., "Audio Augmentation for Speech Recognition",
    2015): a factor e^u, u uniform in [-speed, speed]. What follows the last sample other than 0 is not part of a clip, which is
    then placed at random among such zeros. The filter is y_t = x_t + a_1 x_{t-1} + ... + a_7 x_{t-7}, a_k ~ N(0, (tilt / k)^2).
    Draws come from torch's random state.

    Args:
        speed: largest change of ln(speed).
        tilt: standard deviation of a_1.
        gain: standard deviation of ln(amplitude).
        noise: largest standard deviation of white noise; each clip's is uniform in [0, noise] with probability 1/2, else 0.

    Raises UserError for an argument out of range.
    """

    def __init__(self, speed: float = 0.3, tilt: float = 0.5, gain: float = 0.5, noise: float = 0.01):
        super().__init__()
        self.speed = number(speed, "perturb.speed", 0, 2)
        self.tilt = number(tilt, "perturb.tilt", 0, 1)
        self.gain = number(gain, "perturb.gain", 0, 5)
        self.noise = number(noise, "perturb.noise", 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map clips (B, 1, T) in [-1, 1] to the same shape and range; the identity in evaluation mode."""
        if not self.training:
            return x
        n, _, length = x.shape
        u = torch.rand(n, 3, device=x.device)
        ratio = ((2 * u[:, 0] - 1) * self.speed).exp()
        steps = torch.arange(length, device=x.device)
        size = ((x[:, 0] != 0) * (steps + 1)).amax(1)
        start = (u[:, 1] * (length - size / ratio).clamp_min(0)).floor()
        y = self.resample(x[:, 0], (steps - start[:, None]) * ratio[:, None], size)
        y = self.filter(y)
        y = y * (torch.randn(n, 1, device=x.device) * self.gain).exp()
        y = y + (2 * u[:, 2:3] - 1).clamp_min(0) * self.noise * torch.randn_like(y)
        return y.clamp(-1, 1)[:, None]

    def filter(self, x: Tensor) -> Tensor:
        """Return x (B, T), each row through a random filter of its own."""
        k = torch.arange(1, TAPS, device=x.device)
        a = torch.randn(len(x), TAPS - 1, device=x.device) * self.tilt / k
        kernel = nn.functional.pad(a.flip(1), (0, 1), value=1.0)  # its last tap is that of x_t
        return nn.functional.conv1d(nn.functional.pad(x, (TAPS - 1, 0))[None], kernel[:, None], groups=len(x))[0]

    def resample(self, x: Tensor, at: Tensor, size: Tensor) -> Tensor:
        """Return x (B, T) at the fractional places `at` (B, T'), linearly interpolated; 0 outside [0, size - 1], size (B,)."""
        inside = (at >= 0) & (at <= (size - 1)[:, None])
        low = at.floor().clamp(0, x.shape[1] - 2)
        weight = (at - low).clamp(0, 1)
        index = low.long()
        return torch.lerp(x.gather(1, index), x.gather(1, index + 1), weight) * inside


class Warp(nn.Module):
    """Stretch and shift spectrograms, weight their bands, cover them by noise and mask parts of them; only in training mode.

    Maps are in the scale of `LogMel`, where silence is -1. Bands are shifted and stretched as a vocal tract of another length
    does (Jaitly and Hinton, "Vocal Tract Length Perturbation", 2013); time is stretched; a random walk over bands is added,
    with a random level; the floor is raised to noise for half of the maps; some bands and some frames are silenced (Park
    et al., "SpecAugment", 2019). Draws come from torch's random state.

    Args:
        time, bands: largest change of ln(duration), and of ln(frequency scale).
        level: standard deviation of the level; the random walk's steps have an eighth of it.
        mask: largest share of bands, and of frames, that are silenced.

    Raises UserError for an argument out of range.
    """

    def __init__(self, time: float = 0.2, bands: float = 0.12, level: float = 0.15, mask: float = 0.1):
        super().__init__()
        self.time, self.bands = number(time, "warp.time", 0, 2), number(bands, "warp.bands", 0, 1)
        self.level, self.mask = number(level, "warp.level", 0, 2), number(mask, "warp.mask", 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map spectrograms (B, 1, mels, frames) to the same shape; the identity in evaluation mode."""
        if not self.training:
            return x
        n, _, height, width = x.shape
        u = 2 * torch.rand(n, 4, device=x.device) - 1
        affine = torch.zeros(n, 2, 3, device=x.device)
        affine[:, 0, 0], affine[:, 1, 1] = (u[:, 0] * self.time).exp(), (u[:, 1] * self.bands).exp()
        affine[:, 1, 2] = affine[:, 1, 1] - 1 + u[:, 2] * self.bands / 2  # about the lowest band
        at = nn.functional.affine_grid(affine, list(x.shape), align_corners=False)
        x = nn.functional.grid_sample(x + 1, at, align_corners=False) - 1
        walk = torch.randn(n, 1, height, 1, device=x.device).cumsum(2) / 8
        x = x + (x > -0.99) * self.level * (torch.randn(n, 1, 1, 1, device=x.device) + walk)
        floor = torch.rand(n, 1, 1, 1, device=x.device) * 1.2 - 1.6  # below -1 for half of them
        x = torch.maximum(x, floor + torch.randn_like(x) * 0.1 * (floor > -1))
        kept = (
            uncovered(n, height, self.mask, x.device)[:, None, :, None]
            & uncovered(n, width, self.mask, x.device)[:, None, None]
        )
        return x.where(kept, -1.0)


def uncovered(n: int, length: int, share: float, device: torch.device) -> Tensor:
    """Return bool (n, length), False in one random piece of each row of at most this share of it."""
    at = torch.arange(length, device=device)
    begin, size = (torch.rand(n, 1, device=device) * most for most in (length, length * share))
    return (at < begin) | (at >= begin + size)
