"""Encoders of contrastive models: x (B, ...) of the data's `field` -> features (B, `features`)."""

import itertools

from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.precision import downcast, no_autocast
from genai.nn.mel import LogMel
from genai.nn.norm import BatchNorm
from genai.nn.text_encoder import TextEncoder


class ConvEncoder(nn.Module):
    """A small convolutional network of maps (B, C, H, W) whose features are means over the map's width, then maxima.

    Args:
        in_channels: C.
        width: channels of the first layer; each halving of the map has more.
        features: number of features.
        dropout: of the last map.
        field: of a batch.
    """

    def __init__(
        self, in_channels: int, width: int = 16, features: int = 96, dropout: float = 0.1, field: str = "image"
    ):
        super().__init__()
        self.field, self.in_channels, self.features = field, in_channels, features
        widths = [in_channels, width, 2 * width, 4 * width, features]
        layers: list[nn.Module] = []
        for k, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(c_in, c_out, 3, 2 if k < 3 else 1, 1, bias=False), BatchNorm(c_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Dropout(dropout))
        self.last = nn.Conv1d(features, features, 3, padding=1)

    def check(self, x: Tensor, key: str) -> None:
        """Raise UserError, which names the key of the encoder, for x (B, C, ...) of other channels."""
        if x.shape[1] != self.in_channels:
            raise UserError(
                f"{key}.in_channels={self.in_channels}, but this data has {x.shape[1]} channels: give both the same"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to features (B, features)."""
        return self.last(self.net(downcast(x, self)).mean(2)).relu().amax(2)


class SoundEncoder(nn.Module):
    """A `ConvEncoder` of the log-mel spectrograms of sound (B, 1, T), which are changed at random in training.

    Args:
        sr_hz, mels: see `LogMel`.
        width, features, dropout, field: see `ConvEncoder`.
        perturb: changes waveforms in training, such as `genai.nn.perturb.Perturb`; None for nothing.
        warp: changes spectrograms in training, such as `genai.nn.perturb.Warp`; None for nothing.
    """

    def __init__(
        self,
        sr_hz: int,
        mels: int = 40,
        width: int = 24,
        features: int = 96,
        dropout: float = 0.3,
        perturb: nn.Module | None = None,
        warp: nn.Module | None = None,
        field: str = "audio",
    ):
        super().__init__()
        self.field, self.features = field, features
        self.perturb, self.warp = perturb or nn.Identity(), warp or nn.Identity()
        self.log_mel = LogMel(sr_hz, mels)
        self.net = ConvEncoder(1, width, features, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map waveforms x (B, 1, T) to features (B, features)."""
        with no_autocast(x.device):
            maps = self.warp(self.log_mel(self.perturb(x)))
        return self.net(maps)


class CaptionEncoder(nn.Module):
    """The summary of a `TextEncoder`.

    Args:
        length, width, layers, heads: see `TextEncoder`.
    """

    field = "caption"

    def __init__(self, length: int, width: int = 64, layers: int = 1, heads: int = 4):
        super().__init__()
        self.length, self.features, self.text = length, width, TextEncoder(length, width, layers, heads)

    def check(self, caption: Tensor, key: str) -> None:
        """Raise UserError, which names the key of the encoder, for captions (B, T) of another length."""
        if caption.shape[1] != self.length:
            raise UserError(
                f"{key}.length={self.length}, but captions of this data have data.length={caption.shape[1]} bytes: give both the "
                "same"
            )

    def null(self) -> Tensor:
        """Return the empty caption, int64 (length,)."""
        return self.text.null()

    def forward(self, caption: Tensor) -> Tensor:
        """Map captions int64 (B, length) to features (B, width)."""
        return self.text(caption).states[:, 0]
