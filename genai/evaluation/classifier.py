"""A small classifier of maps trained on a data set's own labels; its last hidden layer gives the features of cards."""

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

STEPS, BATCH, FEATURES = 3000, 128, 64
FORMAT = 1  # version of the network and its training, part of the cached file's name


class Classifier(nn.Module):
    """A convolutional classifier: maps (N, C, H, W), such as images in [-1, 1] -> logits (N, classes); `features` gives (N, 64).

    Height and width must be at least 4.
    """

    def __init__(self, shape: list[int], classes: int):
        super().__init__()
        height, width = (-(-side // 4) for side in shape[1:])
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(32 * height * width, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def learn(self, data: Data) -> "Classifier":
        """Train on the training split, with fixed seeds and settings; returns itself."""
        rng.seed_torch(rng.mix(FORMAT), torch.device("cpu"))
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        stream = iter(Stream(data.splits["train"], BATCH, 1, 0, 0, 0, 1))
        for _ in progress.track(range(STEPS), "training the classifier of this data, once:", STEPS, "steps"):
            (batch,) = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(self(data.modality.maps(batch[data.field])), batch["label"]).backward()
            optimizer.step()
            schedule.step()
        return self.eval().requires_grad_(False)

    @torch.no_grad()
    def accuracy(self, data: Data, split: str) -> float:
        """Return the share of a split's images that get their own label."""
        maps = data.modality.maps
        right = [self(maps(b[data.field])).argmax(1) == b["label"] for b in batches(data.splits[split], 500)]
        return torch.cat(right).double().mean().item()


def load_or_train(data: Data) -> Classifier:
    """Return the classifier of a data set; it is trained once and then kept in $XDG_CACHE_HOME/genai or ~/.cache/genai.

    Raises UserError for data without labels, or whose modality makes no maps of at least 4x4.
    """
    shape = list(data.modality.maps(torch.zeros(1, *data.shape)).shape[1:])
    if len(shape) != 3 or data.classes is None or min(shape[1:]) < 4:
        raise UserError(
            f"a classifier needs labelled images of at least 4x4, and this data is {data.field} of shape {data.shape}"
        )
    path = cache_folder("classifier") / f"{dataset_checksum(data, ['train'], FORMAT, data.splits['train'].augments)}.pt"
    if path.exists():
        try:
            net = Classifier(shape, data.classes)
            net.load_state_dict(torch.load(path, weights_only=True))
            return net.eval().requires_grad_(False)
        except Exception as error:  # torch.load raises many kinds of errors for damaged bytes
            print(f"warning: {path} is damaged ({type(error).__name__}): made again")
    rng.seed_torch(rng.mix(FORMAT), torch.device("cpu"))
    net = Classifier(shape, data.classes).learn(data)
    files.write(path, lambda file: torch.save(net.state_dict(), file), hint=CACHE_HINT)
    return net
