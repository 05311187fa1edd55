"""Distances of images that look at features instead of pixels: modules `(x, y) -> (B,)`, never trained.

A distance of features is the squared difference of their vectors at each place, each brought to length 1, mean over places
and layers (Zhang et al., "The Unreasonable Effectiveness of Deep Features", 2018, eq. 1, its weights w all equal).
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
    """Features of a small convolutional pyramid with random filters, always the same ones: nothing to download.

    Args:
        shape: of the images, (C, H, W).
        channels: features of each layer.
        layers: each at half the size of the one before.
    """

    def __init__(self, shape: Sequence[int], channels: int = 32, layers: int = 3):
        super().__init__()
        self.layers = at_least(layers, 1, "model.perceptual.layers")
        for k in range(layers):
            size = (channels, shape[0] if k == 0 else channels, 3, 3)
            filters = rng.normal(torch.tensor([k]), size, stream=rng.MODEL)[0] * (2 / (9 * size[1])) ** 0.5
            self.register_buffer(f"filters{k}", filters, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for k in range(self.layers):
            x, y = (F.relu(F.conv2d(t, getattr(self, f"filters{k}"), padding=1)) for t in (x, y))
            total = total + (F.normalize(x) - F.normalize(y)).square().sum(1).flatten(1).mean(1)
            if min(x.shape[2:]) > 1:
                x, y = (F.avg_pool2d(t, 2) for t in (x, y))
        return total / self.layers


class LPIPS(KeepPrecision):
    """The learned distance of the package `lpips`, on images of any channel count.

    Its network is published and never trained: it stays in evaluation mode, is among nobody's parameters and in no state,
    and copies of a model share it. A model from a file gets it at its first use, so where the package is absent too it
    samples and encodes.

    Args:
        net: "vgg", "alex" or "squeeze", whose weights torchvision finds or downloads.

    Raises UserError if package or weights are not there.
    """

    def __init__(self, net: str = "vgg"):
        super().__init__()
        if net not in NETS:
            raise UserError(f"model.perceptual.net={net} must be one of {', '.join(NETS)}")
        self.net = net
        self.held: list[nn.Module] = []  # which nn.Module does not look into
        if not stored.is_building():
            self.held.append(self.load())

    def load(self) -> nn.Module:
        """The published network."""
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
        if x.shape[1] == 1:
            x, y = x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)
        if not self.held:
            self.held.append(self.load().to(x.device))
        return self.held[0](x, y).flatten()

    def _apply(self, fn: Callable, recurse: bool = True) -> "LPIPS":
        for net in self.held:
            net._apply(lambda t: keep_precision(t, fn(t)), recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: files of a time at which its numbers were in them hold some."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "LPIPS":
        return self
