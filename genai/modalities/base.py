"""What every modality is: the only place that knows one kind of data, for sampling, evaluation, trackers and pages alike."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core import files
from genai.core.errors import UserError
from genai.core.protocols import Batch, OnStep
from genai.core.rng import RNG_VERSION

Picture = Tensor
"""uint8 (C, H, W), C 1 or 3."""

Texts = list[str]
"""One string for each sample."""

Request = Mapping[str, Any]
"""What was typed, by key: `label`, `prompt`, `negative_prompt`, `stop`; None, or no such key, where nothing was."""

MAX_SHOWN = 400  # samples of one picture in a file


class Modality:
    """One kind of data, as what a model makes or as a condition that it is told; a subclass says what is different.

    A class of a user's own package may be one: `state` and the arguments of its constructor are then plain values.
    """

    field: str
    """The name of its tensor in a Batch."""
    keys: tuple[str, ...] = ()
    """Of a Request, those that `condition` reads."""
    meaning = "modality"
    """What two data sets must share for weights of one to mean the same on the other, in words."""
    likelihoods: tuple[str, ...] = ("bits_per_dim",)
    """The metrics that a likelihood is given in."""
    comparison: str | None = "samples"
    """How sets of samples are measured: "samples", by features; "texts", by their words; None, not at all."""
    windowed = False
    """Whether an item is a window of one long sequence, cut as long as a run chooses, with a likelihood for each token."""

    def __init__(self, field: str | None = None):
        if field is not None and not isinstance(field, str):
            raise UserError(f"field={field!r} of a modality must be the name of a tensor")
        self.field = self.field if field is None else field

    def state(self) -> dict[str, Any]:
        """Plain values that `from_state` makes it of again."""
        return {"field": self.field}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Modality":
        """The inverse of `state`. Raises UserError for a state that describes none: it may come from anybody's file."""
        return cls(**state)

    def condition(self, request: Request, n: int) -> Batch:
        """What n samples are told by a request; by one that says nothing, what shows best what a model has learned.

        Raises UserError for what cannot be asked for.
        """
        return {}

    def decode(self, batch: Batch) -> Batch:
        """Further tensors of samples, in which a person knows them again."""
        return {}

    def preview(self, batch: Batch, columns: int | None = None) -> Picture | Texts:
        """Samples as trackers and pages show them, `columns` a row where that is one picture."""
        return [" ".join(f"{v:.4g}" for v in row) for row in batch[self.field].flatten(1).tolist()]

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write samples with their `seeds` and, if they have any, `label`s; returns the names of the files that hold all of
        them. `names` are for files of single samples."""
        folder.mkdir(parents=True, exist_ok=True)
        first = {name: value[:MAX_SHOWN] for name, value in batch.items()}
        shown = save(self.preview(first, columns), folder / "grid")
        found = {"samples": self.to_file(batch[self.field]), "seeds": batch["seeds"], "labels": batch.get("label")}
        arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in found.items() if value is not None}
        np.savez(folder / "samples.npz", rng_version=RNG_VERSION, **arrays)
        return [
            shown.name,
            "samples.npz",
            *(self.write_frames(folder, batch["frames"], columns) if "frames" in batch else ()),
        ]

    def write_frames(self, folder: Path, frames: Tensor, columns: int | None = None) -> list[str]:
        """Write the states (N, K, ...) of samples from noise to data, as path.gif, which moves, and as path.png, a row for each
        sample, or of the first sample as path.txt where a modality shows texts; returns the names of the files."""
        shown: list[Any] = [self.preview({self.field: states[:MAX_SHOWN]}, columns) for states in frames.unbind(1)]
        if isinstance(shown[0], list):
            return [save([texts[0] for texts in shown], folder / "path").name]
        first, *others = map(to_pil, shown)
        milliseconds = [60] * len(others) + [2000]
        first.save(folder / "path.gif", save_all=True, append_images=others, duration=milliseconds, loop=0)
        few = torch.linspace(0, frames.shape[1] - 1, min(frames.shape[1], 12)).round().long()
        return ["path.gif", save(self.strip(frames[:, few]), folder / "path").name]

    def strip(self, frames: Tensor) -> Picture:
        """States (N, K, ...) of samples as one picture, a row for each of the first."""
        return self.preview({self.field: frames[:10].flatten(0, 1)}, frames.shape[1])  # type: ignore[return-value]

    def read(self, path: Path, shape: Sequence[int], key: str) -> Tensor:
        """The samples (N, *shape) of a file, or of a folder by name.

        Raises UserError, which names `key`, where none can be read, and of samples that have no such files.
        """
        raise UserError(f"{key}= is for a model of images, and samples of this one are {list(shape)}: leave {key}= out")

    def note(self, folder: Path, names: list[str], request: Request) -> None:
        """Write what samples of another modality, files of these names, were told."""

    def watch(self, request: Request) -> contextlib.AbstractContextManager[OnStep] | None:
        """Shows the first sample while it is made; None where a progress bar says as much."""
        return None

    def to_file(self, x: Tensor) -> Tensor:
        """Samples as files keep them."""
        return x

    def quantize(self, x: Tensor, levels: int | None) -> Tensor:
        """Samples on the levels of their data, as features see both."""
        return x

    def features(self, x: Tensor) -> Tensor | None:
        """Samples (N, ...) to features (N, D) that sets of them are compared in; None: an evaluation's extractor has them."""
        return x.flatten(1)


def save(shown: Picture | Texts, path: Path, within: Path | None = None) -> Path:
    """Write a picture as .png, texts as .txt, and return the path; `within` as for `core.files.write`."""
    if isinstance(shown, list):
        path = path.with_suffix(".txt")
        whole = "\n\n".join(f"--- {i}\n{text}" for i, text in enumerate(shown)) + "\n"
        files.write_text(path, whole, within=within)
    else:
        path, image = path.with_suffix(".png"), to_pil(shown)
        files.write(path, lambda file: image.save(file, "png"), within=within)
    return path


def to_pil(picture: Picture) -> Any:
    """A PIL image."""
    from PIL import Image

    array = picture.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def repeat_strings(given: Any, n: int, key: str) -> list[str]:
    """One string, or a list of them again and again, n in all. Raises UserError for none."""
    texts = [str(t) for t in (given if isinstance(given, list | tuple) else [given])]
    if not texts:
        raise UserError(f"{key}=[] is empty: leave it out, or give a text")
    return (texts * -(-n // len(texts)))[:n]
