"""What sets of images are compared in: the features of a network, and the classes that it sees where it sees any."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.precision import full_precision
from genai.data.base import Data, Split
from genai.data.stream import batches
from genai.evaluation import classifier as classifiers
from genai.metrics.frechet import Moments
from genai.modalities.image import to_uint8

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names the file that it downloads


class Extractor:
    """Images (N, C, H, W) in [-1, 1] -> features (N, D), and logits (N, K) or None, on the CPU.

    Args:
        net: is put into evaluation mode.
        see: both of a batch, by that network.
        labels: whether the logits are of the data's own classes.
        device: where.
        resize: what is done to the images first.
        batch: images at a time.
    """

    def __init__(
        self,
        net: nn.Module,
        see: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        labels: bool,
        device: str,
        resize: str | None = None,
        batch: int = 256,
    ):
        self.net, self.see, self.labels = net.eval().requires_grad_(False).to(device), see, labels
        self.device, self.batch = device, batch
        self.facts = {"extractor": {"kind": type(net).__name__, "sha256": sha256(net)}, "resize": resize}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with full_precision(torch.device(self.device)):
            seen = [self.see(part.to(self.device)) for part in images.split(self.batch)]
        features = torch.cat([part.flatten(1).cpu() for part, _ in seen])
        logits = [part.cpu() for _, part in seen if part is not None]
        return features, torch.cat(logits) if logits else None


class FeatureSet:
    """A set of images as an extractor sees it, batch by batch: the moments of their features and how many show the label
    asked for, in memory that does not grow; of each image only what `reads` names: features, probabilities, images."""

    def __init__(self, extractor: Extractor, reads: Iterable[str]):
        self.extractor, self.moments, self.right = extractor, Moments(), 0
        self.parts: dict[str, list[Tensor]] = {name: [] for name in reads}

    def add(self, images: Tensor, label: Tensor | None = None) -> "FeatureSet":
        """Images (B, C, H, W) in [-1, 1], labels (B,); returns itself."""
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
            raise AttributeError(f"no {name} of single samples are kept: a metric must say that it reads them")
        return torch.cat(self.parts[name])


def extract_features(split: Split, field: str, extractor: Extractor, reads: Iterable[str]) -> FeatureSet:
    """All of a split."""
    found = FeatureSet(extractor, reads)
    for batch in batches(split, 1000):
        found.add(batch[field])
    return found


def sha256(net: nn.Module) -> str:
    """Of a network's weights and buffers."""
    found = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def classifier(data: Data, node: Any, device: str) -> Extractor:
    """The features that the data's modality has itself; of images a small classifier trained on the data's own labels, once.

    Raises UserError for images without labels.
    """
    if (extractor := modality_extractor(data)) is not None:
        return extractor
    net = classifiers.load_or_train(data)

    def see(images: Tensor) -> tuple[Tensor, Tensor]:
        features = net.features(images)
        return features, net.head(features)

    return Extractor(net, see, True, device)


def modality_extractor(data: Data) -> Extractor | None:
    """What the data's modality sees itself; None where it leaves that to an extractor."""
    modality = data.modality
    if modality.comparison != "samples" or modality.features(torch.zeros(1, *data.shape)) is None:
        return None
    extractor = Extractor(nn.Identity(), lambda x: (modality.features(x), None), False, "cpu")  # type: ignore[arg-type]
    extractor.facts = {"extractor": {"kind": type(modality).__name__}, "resize": None}
    return extractor


def inception(data: Data, node: Any, device: str, weights: str | None = None) -> Extractor:
    """The network of published Fréchet distances, by torch-fidelity: 2048 features of images on 256 levels, resized to 299 x 299
    as TensorFlow 1 did, grey ones with three equal channels.

    Args:
        weights: torch-fidelity's file of them; None: where torch keeps downloads, and downloaded there if it can be.

    Raises UserError if the package or the weights are not to be had.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise UserError("extractor=inception needs the package torch-fidelity: pip install torch-fidelity") from error
    if weights is not None:
        _state(weights, f"torch-fidelity's {INCEPTION}")  # which it would unpickle
    try:
        net = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
    except OSError as error:  # of the network, or of the disk
        raise UserError(
            f"extractor=inception has no weights and could not download them ({error}): put {INCEPTION} into "
            f"{torch.hub.get_dir()}/checkpoints, or name it with extractor.weights="
        ) from error

    def see(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = net(to_uint8(images).expand(-1, 3, -1, -1))
        return features, logits

    return Extractor(net, see, False, device, "299 bilinear, as TensorFlow 1", batch=32)


def module(data: Data, node: Any, device: str, net: nn.Module | None = None, weights: str | None = None) -> Extractor:
    """Any network: images (B, C, H, W) in [-1, 1] -> features (B, ...), put into evaluation mode here.

    Args:
        net: extractor.net={_target_: my_lab.Net, ...}.
        weights: file of its state dict, tensors only.

    Raises UserError if there is no network, or the weights do not fit.
    """
    if not isinstance(net, nn.Module):
        raise UserError(f"extractor.net={net} must build an nn.Module: extractor.net={{_target_: my_lab.Net}}")
    if weights is not None:
        try:
            net.load_state_dict(_state(weights, f"a state dict of {type(net).__name__}"))
        except RuntimeError as error:
            raise UserError(f"extractor.weights={weights} do not fit: {' '.join(str(error).split())[:200]}") from error
    return Extractor(net, lambda images: (net(images), None), False, device)


def _state(weights: str, wanted: str) -> dict[str, Tensor]:
    """The state dict in a file. Raises UserError if that holds anything else."""
    try:
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"extractor.weights={weights} is not {wanted} ({reason}): name another file") from error
