"""The interface of modalities, one for each kind of data: image, vector, text, audio, label, caption.

Sampling, evaluation and trackers know nothing of a kind of data but what its modality defines.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genai.core import files
from genai.core.errors import UserError, show
from genai.core.protocols import Batch, OnStep, Stop
from genai.core.rng import RNG_VERSION
from genai.core.runs import Facts
from genai.metrics import likelihood
from genai.modalities import sound

T = TypeVar("T")
Picture = Tensor
"""A picture for display, uint8 (C, H, W) with C 1 or 3."""

Texts = list[str]
"""Samples as text for display, one string each."""


class Clips(NamedTuple):
    """Samples for display that are heard as well as seen."""

    picture: Picture
    """One picture of all samples, such as their spectrograms."""
    waves: Tensor
    """The sound of the first samples, float32 (N, C, T) in [-1, 1]."""
    sr_hz: int
    """Sampling rate."""


Shown = Picture | Texts | Clips
"""Samples as trackers, pages and files show them."""


Request = Mapping[str, Any]
"""A request for samples, by key: `label`, `prompt`, `negative_prompt`, `stop`; None or absent where nothing is asked."""

MAX_SHOWN = 400  # samples in one picture
MAX_HEARD = 16  # samples in one sound
PAUSE_SECONDS = 0.25  # between the samples of a sound


class Modality:
    """A kind of data, as the output of a model or as one of its conditions; subclasses override what differs.

    A subclass may be in a package of your own; its `state` and constructor arguments must then be plain values.
    """

    field: str
    """Name of its tensor in a batch."""
    keys: tuple[str, ...] = ()
    """Keys of a request that `condition` uses."""
    meaning = "modality"
    """The facts that two data sets must share for a model of one to work on the other, as text for an error."""
    likelihoods: tuple[str, ...] = ("bits_per_dim",)
    """Names of the metrics that report a likelihood."""
    comparison: str | None = "samples"
    """Kind of metrics for sets of samples: "samples" (by features), "texts" (by words), "melodies" (by notes) or None."""
    start = "image"
    """Key of a call that gives samples to start from."""
    has_time = False
    """True if the width of `maps` is time, so that a class does not depend on where in it something is."""
    windowed = False
    """True if items are windows of one long sequence, so that a likelihood is per token."""

    def __init__(self, field: str | None = None):
        if field is not None and not isinstance(field, str):
            raise UserError(f"field={field!r} of a modality must be a string, the name of a tensor")
        self.field = self.field if field is None else field

    def state(self) -> dict[str, Any]:
        """Return plain values from which `from_state` restores the modality."""
        return {"field": self.field}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Modality":
        """Restore a modality from its `state`. Raises UserError for an invalid one, as it may come from anybody's file."""
        return cls(**state)

    def condition(self, request: Request, n: int) -> Batch:
        """Return the conditions of n samples, tensors with n in front; for an empty request a default for previews.

        Raises UserError for a request that cannot be met.
        """
        return {}

    def stop(self, request: Request) -> Stop | None:
        """Return what tells where a sample ends by its content, as the request asks; None for samples of any content.

        Raises UserError for a request that cannot be met.
        """
        return None

    def completed(self, request: Request, n: int) -> Request:
        """Return a request for n samples with what `condition` takes where nothing is asked for, if people are to see that."""
        return request

    def in_turn(self, start: int, stop: int) -> Texts | None:
        """Return what to ask for, by the first of `keys`, of samples start, ..., stop - 1 of many of all kinds in turn.

        None for a condition without kinds, which is not asked for then.
        """
        return None

    def kind_in(self, batch: Batch) -> "Modality | None":
        """Return the modality of samples: this one, or of several media the one that they are of; None if they are of no such."""
        return self if self.field in batch else None

    def decode(self, batch: Batch) -> Batch:
        """Return further tensors of samples that people can look at, such as the images of tokens."""
        return {}

    def preview(self, batch: Batch, columns: int | None = None) -> Shown:
        """Return samples for display: one picture with `columns` samples in a row, also with sound, or one string for each."""
        return [" ".join(f"{v:.4g}" for v in row) for row in batch[self.field].flatten(1).tolist()]

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write samples with their `seeds` and `label`s to a folder; returns the names of the files with all of them.

        Args:
            batch: the samples, `seeds` (N,), and optionally `label` (N,) and `frames` (N, K, ...).
            names: of the files of single samples, without suffix.
            request: that the samples were made for.
            columns: samples in a row of a picture, None for about a square.
        """
        folder.mkdir(parents=True, exist_ok=True)
        first = {name: value[:MAX_SHOWN] for name, value in batch.items()}
        shown = save(self.preview(first, columns), folder / "grid")
        found = {"samples": self.to_file(batch[self.field]), "seeds": batch["seeds"], "labels": batch.get("label")}
        arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in found.items() if value is not None}
        np.savez(folder / "samples.npz", rng_version=RNG_VERSION, **arrays)
        return [
            *shown,
            "samples.npz",
            *(self.write_frames(folder, batch["frames"], columns) if "frames" in batch else ()),
        ]

    def write_frames(self, folder: Path, frames: Tensor, columns: int | None = None) -> list[str]:
        """Write the K states (N, K, ...) of samples from noise to data; returns the names of the files.

        They are the animation path.gif and path.png, a row for each sample; for a modality of texts path.txt, of one sample.
        """
        shown: list[Any] = [self.preview({self.field: states[:MAX_SHOWN]}, columns) for states in frames.unbind(1)]
        if isinstance(shown[0], list):
            return save([texts[0] for texts in shown], folder / "path")
        first, *others = (to_pil(one.picture if isinstance(one, Clips) else one) for one in shown)
        milliseconds = [60] * len(others) + [2000]
        first.save(folder / "path.gif", save_all=True, append_images=others, duration=milliseconds, loop=0)
        few = torch.linspace(0, frames.shape[1] - 1, min(frames.shape[1], 12)).round().long()
        return ["path.gif", *save(self.strip(frames[:, few]), folder / "path")]

    def strip(self, frames: Tensor) -> Picture:
        """Return the states (N, K, ...) of the first samples as one picture, a row for each."""
        shown: Any = self.preview({self.field: frames[:10].flatten(0, 1)}, frames.shape[1])
        return shown.picture if isinstance(shown, Clips) else shown

    def read(self, path: Path, shape: Sequence[int], key: str) -> Tensor:
        """Read samples (N, *shape) from a file, or from the files of a folder sorted by name.

        Raises UserError that names the config key `key` if none can be read, or the modality has no such files.
        """
        raise UserError(f"{key}= is for a model of images, and samples of this one are {list(shape)}: leave {key}= out")

    def read_mask(self, mask: Any, shape: Sequence[int]) -> Tensor:
        """Return which part of a sample of this shape to fill in, 1 there and 0 elsewhere, (1, 1, ...), as `mask=` says.

        Raises UserError for a mask that modality or shape do not allow.
        """
        raise UserError(
            f"mask= is for a model of images or sound, and samples of this one are {list(shape)}: leave it out"
        )

    def check(self, x: Tensor, key: str) -> None:
        """Raise UserError, which names the argument `key`, unless x are samples (n, ...) from which a sampler can start."""
        check_values(x, key)

    def note(self, folder: Path, names: list[str], request: Request) -> None:
        """Write the conditions of samples of another modality, whose files have these names."""

    def watch(self, request: Request) -> contextlib.AbstractContextManager[OnStep] | None:
        """Return a context whose callback displays the first sample while it is generated; None for a progress bar instead."""
        return None

    def to_file(self, x: Tensor) -> Tensor:
        """Return samples as they are stored in files."""
        return x

    def quantize(self, x: Tensor, levels: int | None) -> Tensor:
        """Round samples to the grey levels of the data, as real data are before features are compared."""
        return x

    def features(self, x: Tensor) -> Tensor | None:
        """Return features (N, D) of samples (N, ...); None leaves them to an evaluation's extractor."""
        return x.flatten(1)

    def compared(self, x: Tensor) -> list[Any]:
        """Return each of samples (N, ...) as metrics of the kind `comparison` are given it."""
        return list(x)

    def maps(self, x: Tensor) -> Tensor:
        """Return samples (N, ...) as maps (N, C, H, W) that a convolutional classifier reads: images themselves."""
        return x

    def units(self, nats: Tensor, targets: int | None, part: Any, shape: Sequence[int], values: int | None) -> Facts:
        """Convert -ln p in nats (N,) of whole samples to the units of `likelihoods`, with what they depend on.

        Args:
            targets: number of predicted elements of all samples, where masks tell; None for every element.
            part: the split of the samples.
            shape: of one sample.
            values: number of values that an element can take.
        """
        return likelihood.per_dimension(nats, math.prod(shape), values)


def save(shown: Shown, path: Path, within: Path | None = None) -> list[str]:
    """Write a picture as .png, texts as .txt, and clips as .png and .wav; returns the names of the files.

    `within` is as for `core.files.write`.
    """
    if isinstance(shown, list):
        path = path.with_suffix(".txt")
        whole = "\n\n".join(f"--- {i}\n{text}" for i, text in enumerate(shown)) + "\n"
        files.write_text(path, whole, within=within)
        return [path.name]
    path, image = path.with_suffix(".png"), to_pil(shown.picture if isinstance(shown, Clips) else shown)
    files.write(path, lambda file: image.save(file, "png"), within=within)
    if not isinstance(shown, Clips):
        return [path.name]
    pause = shown.waves.new_zeros(shown.waves.shape[1], round(PAUSE_SECONDS * shown.sr_hz))
    whole = torch.cat([part for wave in shown.waves[:MAX_HEARD] for part in (wave, pause)], 1)
    sound.write_wave(path.with_suffix(".wav"), whole, shown.sr_hz, within)
    return [path.name, path.with_suffix(".wav").name]


def check_values(x: Tensor, key: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise UserError, which names the argument `key`, unless x has values, all finite and, up to rounding, in [low, high]."""
    if not x.numel():
        raise UserError(f"{key} is a tensor of shape {list(x.shape)}, without values: leave {key}= out")
    if not x.isfinite().all():
        raise UserError(f"{key} is not finite: give one without nan and inf")
    least, most = x.min().item(), x.max().item()
    if least < low - 1e-3 or most > high + 1e-3:
        raise UserError(
            f"{key} must be in [{low}, {high}], got values from {least:g} to {most:g}: scale it, or x.clamp({low}, {high})"
        )


def as_path(value: Any, key: str) -> Path:
    """Return a path given as such. Raises UserError for anything else."""
    if not isinstance(value, str | os.PathLike) or value == "":
        raise UserError(f"{key} must be a file, a folder or a tensor, got {show(value)}")
    return Path(value)


def to_pil(picture: Picture) -> Any:
    """Convert a picture to a PIL image."""
    from PIL import Image

    array = picture.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def repeat_strings(given: object, n: int, key: str) -> list[str]:
    """Return n strings: one string n times, or a list cyclically. Raises UserError for an empty list."""
    texts = [str(t) for t in (given if isinstance(given, list | tuple) else [given])]
    if not texts:
        raise UserError(f"{key}=[] is empty: leave it out, or give a string")
    return (texts * -(-n // len(texts)))[:n]


def read_each(given: object, n: int, key: str, read: Callable[[Path], T]) -> list[T]:
    """Read the files that a request's `key` names for n samples: one file n times, or a list cyclically; each is read once.

    Raises UserError for an empty list or name, and what `read` raises.
    """
    names = repeat_strings(given, n, key)
    if not all(names):
        raise UserError(f"{key}={given} is empty: leave it out, or name a file")
    found = {name: read(Path(name)) for name in dict.fromkeys(names)}
    return [found[name] for name in names]


def pad_prompts(rows: Sequence[Tensor], value: int = 0) -> Batch:
    """Return `tokens` int64 (n, T), rows (T_i,) padded on the left to one length, and `pad` int64 (n,), the amount of padding."""
    tokens = pad_sequence([*rows], batch_first=True, padding_value=value, padding_side="left")
    return {"tokens": tokens, "pad": tokens.shape[1] - torch.tensor([len(row) for row in rows])}
