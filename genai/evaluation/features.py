"""Feature extractors for metrics of samples: a network's features of images, and its class probabilities where it has any."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from genai import progress
from genai.core.errors import UserError
from genai.core.precision import full_precision
from genai.data.base import Data, Split
from genai.data.stream import batches
from genai.evaluation import classifier as classifiers
from genai.metrics.frechet import Moments
from genai.modalities.image import to_uint8

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # the file that torch-fidelity downloads


class Extractor:
    """Extract features: images (N, C, H, W) in [-1, 1] -> features (N, D), and logits (N, K) or None, on the CPU.

    Args:
        net: the network; it is put into evaluation mode, without gradients.
        extract: computes (features, logits or None) of a batch of images by that network.
        labels: True if the logits are of the data's own classes.
        device: to compute on.
        resize: how the images are resized first, in words, for the protocol of cards.
        batch: images per call.
    """

    def __init__(
        self,
        net: nn.Module,
        extract: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        labels: bool,
        device: str,
        resize: str | None = None,
        batch: int = 256,
    ):
        self.net, self.extract, self.labels = net.eval().requires_grad_(False).to(device), extract, labels
        self.device, self.batch = device, batch
        self.facts = {"extractor": {"kind": type(net).__name__, "sha256": sha256(net)}, "resize": resize}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with full_precision(torch.device(self.device)):
            found = [self.extract(part.to(self.device)) for part in images.split(self.batch)]
        features = torch.cat([part.flatten(1).cpu() for part, _ in found])
        logits = [part.cpu() for _, part in found if part is not None]
        return features, torch.cat(logits) if logits else None


class FeatureSet:
    """The features of a set of images, collected batch by batch.

    Mean and covariance of the features (`moments`) and the number of images with the label asked for (`right`) take constant
    memory. What `reads` names of "features" (N, D), "probabilities" (N, K) and "images" (N, C, H, W) is kept for every image,
    and is an attribute of that name.
    """

    def __init__(self, extractor: Extractor, reads: Iterable[str]):
        self.extractor, self.moments, self.right = extractor, Moments(), 0
        self.parts: dict[str, list[Tensor]] = {name: [] for name in reads}

    def add(self, images: Tensor, label: Tensor | None = None) -> "FeatureSet":
        """Add images (B, C, H, W) in [-1, 1] with the labels asked for, int64 (B,); returns itself."""
        features, logits = self.extractor(images)
        self.moments.add(features)
        if logits is not None and label is not None and self.extractor.labels:
            self.right += int((logits.argmax(1) == label).sum())
        found: dict[str, Any] = {"features": features, "images": images.cpu()}
        found["probabilities"] = None if logits is None else logits.softmax(1)
        for name, parts in self.parts.items():
            parts.append(found[name])
        return self

    def __getattr__(self, name: str) -> Tensor:
        if name not in self.__dict__.get("parts", ()):
            raise AttributeError(f"{name} of single samples are not kept: add {name!r} to `reads` of the metric")
        return torch.cat(self.parts[name])


def extract_features(split: Split, field: str, extractor: Extractor, reads: Iterable[str]) -> FeatureSet:
    """Extract the features of all items of a split."""
    found = FeatureSet(extractor, reads)
    parts = batches(split, 1000)
    for batch in progress.track(parts, "features of", len(split), "images", lambda batch: len(batch[field])):
        found.add(batch[field])
    return found


def sha256(net: nn.Module) -> str:
    """Return the first 16 digits of the SHA-256 of a network's weights and buffers."""
    found = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def classifier(data: Data, node: object, device: str) -> Extractor:
    """Build the default extractor: the modality's own features, or for images a classifier trained on the data's labels.

    The classifier is trained once per data set. Raises UserError for images without labels.
    """
    if (extractor := modality_extractor(data)) is not None:
        return extractor
    net = classifiers.load_or_train(data)

    def extract(x: Tensor) -> tuple[Tensor, Tensor]:
        features = net.features(data.modality.maps(x))
        return features, net.head(features)

    return Extractor(net, extract, True, device)


def modality_extractor(data: Data) -> Extractor | None:
    """Build the extractor of features that the data's modality defines itself; None where it leaves them to an extractor."""
    modality = data.modality
    if modality.comparison != "samples" or modality.features(torch.zeros(1, *data.shape)) is None:
        return None
    extractor = Extractor(nn.Identity(), lambda x: (modality.features(x), None), False, "cpu")  # type: ignore[arg-type]
    extractor.facts = {"extractor": {"kind": type(modality).__name__}, "resize": None}
    return extractor


def inception(data: Data, node: object, device: str, weights: str | None = None) -> Extractor:
    """Build the Inception network of published Fréchet distances (Heusel et al. 2017), by torch-fidelity.

    It gives 2048 features of uint8 images, resized to 299 x 299 as TensorFlow 1 did; grey images get three equal channels.

    Args:
        weights: torch-fidelity's weight file; None takes the one in torch's download folder, and downloads it if absent.

    Raises UserError if the package is not installed or the weights cannot be loaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise UserError("extractor=inception needs the package torch-fidelity: pip install torch-fidelity") from error
    if weights is not None:
        # Only checks the file: torch-fidelity would unpickle it, which may run code.
        _read_state_dict(weights, f"torch-fidelity's {INCEPTION}")
    try:
        with progress.task("loading the Inception network"):
            net = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
    except OSError as error:  # no connection, or no room on the disk
        raise UserError(
            f"extractor=inception has no weights and could not download them ({error}): put {INCEPTION} into "
            f"{torch.hub.get_dir()}/checkpoints, or name it with extractor.weights="
        ) from error

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = net(to_uint8(images).expand(-1, 3, -1, -1))
        return features, logits

    return Extractor(net, extract, False, device, "299 bilinear, as TensorFlow 1", batch=32)


def module(
    data: Data, node: object, device: str, net: nn.Module | None = None, weights: str | None = None
) -> Extractor:
    """Build an extractor of your own network: images (B, C, H, W) in [-1, 1] -> features (B, ...).

    Args:
        net: the network, extractor.net={_target_: my_lab.Net, ...}.
        weights: file of its state dict, tensors only.

    Raises UserError if `net` is not a module, or the weights do not fit.
    """
    if not isinstance(net, nn.Module):
        raise UserError(f"extractor.net={net} must build an nn.Module: extractor.net={{_target_: my_lab.Net}}")
    if weights is not None:
        try:
            net.load_state_dict(_read_state_dict(weights, f"a state dict of {type(net).__name__}"))
        except RuntimeError as error:
            raise UserError(f"extractor.weights={weights} do not fit: {' '.join(str(error).split())[:200]}") from error
    return Extractor(net, lambda images: (net(images), None), False, device)


def _read_state_dict(weights: str, wanted: str) -> dict[str, Tensor]:
    """Read the state dict in a file, tensors only. Raises UserError if the file holds anything else."""
    try:
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"extractor.weights={weights} is not {wanted} ({reason}): name another file") from error
