"""Perceptual distances of images, which compare features instead of pixels: modules `(x, y) -> (B,)`, never trained.

The distance is the squared difference of feature vectors at each position, each normalised to length 1, averaged over
positions and layers (Zhang et al., "The Unreasonable Effectiveness of Deep Features", 2018, eq. 1, with all weights w
equal).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core import rng, stored
from genai.core.errors import UserError, at_least
from genai.core.precision import KeepPrecision, keep_precision

NETS = ("vgg", "alex", "squeeze")


class RandomFeatures(KeepPrecision):
    """Features of a small convolutional pyramid with fixed random filters, which need no download.

    Args:
        shape: shape of the images, (C, H, W).
        channels: features of each layer.
        layers: number of layers, each at half the size of the one before.

    Raises UserError for fewer than 1 layer.
    """

    def __init__(self, shape: Sequence[int], channels: int = 32, layers: int = 3):
        super().__init__()
        self.layers = at_least(layers, 1, "model.perceptual.layers")
        for k in range(layers):
            size = (channels, shape[0] if k == 0 else channels, 3, 3)
            filters = rng.normal(torch.tensor([k]), size, stream=rng.MODEL)[0] * (2 / (9 * size[1])) ** 0.5
            self.register_buffer(f"filters{k}", filters, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of x and y (B, C, H, W), (B,)."""
        total = x.new_zeros(len(x))
        for k in range(self.layers):
            x, y = (F.relu(F.conv2d(t, getattr(self, f"filters{k}"), padding=1)) for t in (x, y))
            total = total + (F.normalize(x) - F.normalize(y)).square().sum(1).flatten(1).mean(1)
            if min(x.shape[2:]) > 1:
                x, y = (F.avg_pool2d(t, 2) for t in (x, y))
        return total / self.layers


class LPIPS(KeepPrecision):
    """The learned distance of the package `lpips`, on images with any number of channels.

    Its network is published and never trained: it stays in evaluation mode and out of parameters and state, and copies
    of a model share it. A model loaded from a file loads it at first use, so sampling and encoding work without the
    package.

    Args:
        net: "vgg", "alex" or "squeeze", whose weights torchvision finds or downloads.

    Raises UserError if the package or the weights are missing.
    """

    def __init__(self, net: str = "vgg"):
        super().__init__()
        if net not in NETS:
            raise UserError(f"model.perceptual.net={net} must be one of {', '.join(NETS)}")
        self.net = net
        self.loaded: list[nn.Module] = []  # in a list, so that nn.Module does not register it
        if not stored.is_building():
            self.loaded.append(self.load())

    def load(self) -> nn.Module:
        """Load the published network. Raises UserError if the package or the weights are missing."""
        try:
            import lpips  # type: ignore[import-not-found]

            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                return lpips.LPIPS(net=self.net, verbose=False).requires_grad_(False).eval()
        except ModuleNotFoundError:
            raise UserError(
                "model.perceptual=LPIPS needs the package lpips: pip install lpips, or choose RandomFeatures"
            ) from None
        except OSError as error:  # a download that failed
            raise UserError(
                f"the weights of {self.net} for model.perceptual=LPIPS cannot be had ({error}): choose RandomFeatures"
            ) from None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of x and y (B, 1 or 3, H, W), (B,)."""
        if x.shape[1] == 1:
            x, y = x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)
        if not self.loaded:
            self.loaded.append(self.load().to(x.device))
        return self.loaded[0](x, y).flatten()

    def _apply(self, fn: Callable, recurse: bool = True) -> "LPIPS":
        for net in self.loaded:
            net._apply(lambda t: keep_precision(t, fn(t)), recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: object) -> None:
        """Load nothing: files of an older format may hold the network's weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "LPIPS":
        return self
