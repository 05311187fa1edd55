"""Splits of recordings as clips of one length, from memory or from a file of the cache that is read as needed."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core import files
from genai.core.cache import CACHE_HINT, cache_folder
from genai.core.errors import UserError, at_least, number
from genai.core.protocols import Batch
from genai.data.base import Split, random_order
from genai.data.fingerprint import checksum
from genai.data.mapped import MappedFile
from genai.modalities.audio import MAX_SR_HZ
from genai.modalities.sound import from_int16

MAX_SECONDS = 3600.0  # of one item


class Recordings:
    """A split of recordings as clips of one length T: longer ones are cut, shorter ones are followed by zeros.

    In a batch `mask`, bool (B, T), tells which samples are recorded. A clip is cut at a random place if there are draws, else at
    its beginning.

    Args:
        field: name of the waveforms.
        waves: of all splits, int16 (T_i, C) each.
        items: those of this split, indices (N,).
        length: T of a clip.
        crop: samples of a clip that are recorded at most; None for T.
        conditions: further tensors of a batch by name, such as `label`, of all recordings.
    """

    def __init__(
        self,
        field: str,
        waves: Sequence[np.ndarray],
        items: np.ndarray,
        length: int,
        crop: int | None = None,
        conditions: Mapping[str, np.ndarray] | None = None,
    ):
        self.field, self.waves, self.items = field, waves, torch.from_numpy(items.astype(np.int64))
        self.length, self.crop = length, min(crop or length, length)
        self.sizes = torch.tensor([len(waves[i]) for i in self.items.tolist()])
        self.conditions = {
            name: torch.from_numpy(v.astype(np.int64))[self.items] for name, v in (conditions or {}).items()
        }
        self.augments = bool((self.sizes > self.crop).any())

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the items `index` (B,); the first of the draws (B, 4) places the cut."""
        size = self.sizes[index].clamp_max(self.length if draws is None else self.crop)
        slack = self.sizes[index] - size
        place = torch.zeros_like(slack) if draws is None else (draws[:, 0] * (slack + 1)).long().minimum(slack)
        cuts = zip(self.items[index].tolist(), place.tolist(), size.tolist(), strict=True)
        waves = [self.waves[i][start : start + n].T for i, start, n in cuts]
        found = np.zeros((len(waves), len(self.waves[0].T), self.length), np.int16)  # (B, C, T)
        for clip, wave in zip(found, waves, strict=True):
            clip[:, : wave.shape[1]] = wave
        mask = torch.arange(self.length) < size[:, None]
        conditions = {name: values[index] for name, values in self.conditions.items()}
        return {self.field: from_int16(torch.from_numpy(found)), "mask": mask, **conditions}

    def fingerprint(self, quick: bool) -> str:
        waves = self.waves
        content = [waves.key] if isinstance(waves, Store) else [waves[i] for i in self.items.tolist()]
        own = [self.items, self.sizes, self.length, self.crop, *self.conditions.values()]
        return checksum(*content, *own, quick=quick)


class Store(Sequence[np.ndarray]):
    """Recordings in one file, int16 (T_i, C) each, of which only what is asked for is read.

    Args:
        path: of the file; its name is a checksum of the content.
        facts: of each recording, with the number of its samples, `size`.
        channels: C.
    """

    def __init__(self, path: Path, facts: Sequence[Mapping[str, Any]], channels: int):
        self.key, self.facts, self.channels = path.stem, facts, channels
        self.mapped = MappedFile(path, np.dtype(np.int16))
        self.ends = np.cumsum([fact["size"] * channels for fact in facts], dtype=np.int64)

    def without_empty(self) -> "Store":
        """Return the recordings that have samples."""
        return Store(self.mapped.path, [fact for fact in self.facts if fact["size"]], self.channels)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, i: Any) -> Any:
        return self.mapped.numbers()[self.ends[i] - self.facts[i]["size"] * self.channels : self.ends[i]].reshape(
            -1, self.channels
        )


def store(key: str, channels: int, make: Callable[[], Iterable[tuple[np.ndarray, Mapping[str, Any]]]]) -> Store:
    """Return the recordings that the cache has under a key; what `make` yields is written there if it has none.

    Args:
        key: a checksum of everything that determines the recordings.
        channels: of each.
        make: yields recordings, int16 (T_i, C), with plain facts of each.

    Raises UserError if the cache cannot be written.
    """
    path = cache_folder("recordings") / f"{key}.int16"
    facts = _facts(path, channels)
    if facts is None:
        facts = []

        def save(file: Any) -> None:
            for wave, own in make():
                file.write(np.ascontiguousarray(wave, np.int16).tobytes())
                facts.append({**own, "size": len(wave)})

        files.write(path, save, hint=CACHE_HINT)
        files.write_text(path.with_suffix(".json"), json.dumps(facts), hint=CACHE_HINT)
    return Store(path, facts, channels)


def _facts(path: Path, channels: int) -> list[dict[str, Any]] | None:
    """Return the facts that belong to a file of recordings; None if there are none, or the file has another length."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        whole = path.stat().st_size == 2 * channels * sum(fact["size"] for fact in facts)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        print(f"{path} is damaged: it is made again", file=sys.stderr)
    return facts if whole else None


def clip_length(max_seconds: float, sr_hz: int, key: str = "data.max_seconds") -> int:
    """Return the samples of a clip. Raises UserError, which names the key, for one of none, or of more than an hour."""
    number(max_seconds, key, 0, MAX_SECONDS, open_low=True)
    length = round(max_seconds * at_least(sr_hz, 1, "data.sr_hz", most=MAX_SR_HZ))
    if length < 1:
        raise UserError(f"{key}={max_seconds} is less than one sample at {sr_hz} Hz: give more")
    return length


def recording_splits(
    field: str,
    waves: Sequence[np.ndarray],
    parts: Mapping[str, np.ndarray],
    conditions: Mapping[str, np.ndarray],
    length: int,
    crop_seconds: float | None,
    sr_hz: int,
) -> dict[str, Split]:
    """Build splits of clips; training clips are cut to `crop_seconds`, and the others are in random order.

    Args:
        field: name of the waveforms.
        waves: all recordings, int16 (T_i, C) each.
        parts: indices of those of each split.
        conditions: of all recordings by name, (N,) each.
        length: samples of a clip.
        crop_seconds: None for the whole clip.
        sr_hz: sampling rate.
    """
    crop = None if crop_seconds is None else clip_length(crop_seconds, sr_hz, "data.crop_seconds")
    found: dict[str, Split] = {}
    for name, items in parts.items():
        training = name == "train"
        split = Recordings(field, waves, items, length, crop if training else None, conditions)
        found[name] = split if training else random_order(split)
    if cut := sum(len(waves[i]) > length for items in parts.values() for i in items):
        n = sum(map(len, parts.values()))
        print(
            f"{cut} of {n} recordings are longer than {length / sr_hz:g} s and are cut (data.max_seconds)",
            file=sys.stderr,
        )
    return found
