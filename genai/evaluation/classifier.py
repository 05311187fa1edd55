"""A small classifier of maps trained on a data set's own labels; its last hidden layer gives the features of cards."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai import progress
from genai.core import files, rng
from genai.core.cache import CACHE_HINT, cache_folder
from genai.core.errors import UserError
from genai.data.base import Data
from genai.data.fingerprint import dataset_checksum
from genai.data.stream import Stream, batches

FEATURES = 64
FORMAT = 1  # version of the network and its training, part of the cached file's name


class Classifier(nn.Module):
    """A convolutional classifier: maps (N, C, H, W), such as images in [-1, 1] -> logits (N, classes); `features` gives (N, 64).

    Height and width must be at least 4.
    """

    steps, batch, lr = 3000, 128, 2e-3

    def __init__(self, shape: Sequence[int], classes: int):
        super().__init__()
        self.features = self.layers(*shape)
        self.head = nn.Linear(FEATURES, classes)

    def layers(self, channels: int, height: int, width: int) -> nn.Sequential:
        """Return the layers from maps to features."""
        return nn.Sequential(
            nn.Conv2d(channels, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32 * -(-height // 4) * -(-width // 4), FEATURES),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def augment(self, x: Tensor) -> Tensor:
        """Return training maps (N, C, H, W) as they may be without another class: unchanged."""
        return x

    def learn(self, data: Data) -> "Classifier":
        """Train on the training split, with fixed seeds and settings; returns itself."""
        rng.seed_torch(rng.mix(FORMAT), torch.device("cpu"))
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        stream = iter(Stream(data.splits["train"], self.batch, 1, 0, 0, 0, 1))
        for _ in progress.track(range(self.steps), "training the classifier of this data, once:", self.steps, "steps"):
            (batch,) = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(self(self.augment(data.modality.maps(batch[data.field]))), batch["label"]).backward()
            optimizer.step()
            schedule.step()
        return self.eval().requires_grad_(False)

    @torch.no_grad()
    def accuracy(self, data: Data, split: str) -> float:
        """Return the share of a split's items that get their own label."""
        maps = data.modality.maps
        right = [self(maps(b[data.field])).argmax(1) == b["label"] for b in batches(data.splits[split], 500)]
        return torch.cat(right).double().mean().item()


class SpectrogramClassifier(Classifier):
    """A classifier of spectrograms (N, C, bands, frames), of at least 8 bands and frames: averages over time, and trains shifted.

    Sounds of a class begin at any time, and recordings are few: in training, maps are shifted in time and level, and bands and
    frames are masked (Park et al. 2019, SpecAugment, section 2).
    """

    steps, batch, lr = 900, 64, 4e-3

    def layers(self, channels: int, height: int, width: int) -> nn.Sequential:
        def convolution(c_in: int, c_out: int, size: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

        return nn.Sequential(
            *convolution(channels, 16, 5, 2),
            *convolution(16, 32, 3, 1),
            nn.MaxPool2d(2),
            *convolution(32, 64, 3, 1),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d((5, 1)),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(5 * 64, FEATURES),
            nn.ReLU(),
        )

    def augment(self, x: Tensor) -> Tensor:
        """Shift maps by up to a twelfth of their frames and a tenth of their range, and mask bands and frames by -1."""
        n, _, height, width = x.shape
        at = torch.arange(width) - torch.randint(-(width // 12), width // 12 + 1, (n, 1))  # (N, W)
        inside = (at >= 0) & (at < width)
        index = at.clamp(0, width - 1)[:, None, None].expand(x.shape)
        x = x.gather(3, index)
        x = x + (torch.rand(n, 1, 1, 1) - 0.5) * 0.4 * (x > -1)  # what is silent stays so
        kept = inside[:, None, None] & _uncovered(n, height, height // 5)[:, None, :, None]
        return x.clamp_min(-1).where(kept & _uncovered(n, width, width // 6)[:, None, None], -1)


def _uncovered(n: int, length: int, most: int) -> Tensor:
    """Return bool (n, length), False in one random piece of each row of fewer than `most` elements."""
    begin, size = torch.randint(0, length, (n, 1)), torch.randint(0, max(most, 1), (n, 1))
    at = torch.arange(length)
    return (at < begin) | (at >= begin + size)


def load_or_train(data: Data) -> Classifier:
    """Return the classifier of a data set; it is trained once and then kept in $XDG_CACHE_HOME/genai or ~/.cache/genai.

    Raises UserError for data without labels, or whose modality makes no maps of at least 4x4, or 8x8 of sound.
    """
    kind, least = (SpectrogramClassifier, 8) if data.modality.has_time else (Classifier, 4)
    shape = list(data.modality.maps(torch.zeros(1, *data.shape)).shape[1:])
    if len(shape) != 3 or data.classes is None or min(shape[1:]) < least:
        raise UserError(
            f"a classifier needs labelled images of at least {least}x{least}, and this data is {data.field} of shape {data.shape}"
        )
    name = [] if kind is Classifier else [kind.__name__]
    content = dataset_checksum(data, ["train"], FORMAT, data.splits["train"].augments, *name)
    path = cache_folder("classifier") / f"{content}.pt"
    if path.exists():
        try:
            net = kind(shape, data.classes)
            net.load_state_dict(torch.load(path, weights_only=True))
            return net.eval().requires_grad_(False)
        except Exception as error:  # torch.load raises many kinds of errors for damaged bytes
            print(f"warning: {path} is damaged ({type(error).__name__}): made again")
    rng.seed_torch(rng.mix(FORMAT), torch.device("cpu"))
    net = kind(shape, data.classes).learn(data)
    files.write(path, lambda file: torch.save(net.state_dict(), file), hint=CACHE_HINT)
    return net
