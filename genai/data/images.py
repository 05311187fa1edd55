"""Image data sets that come with scikit-learn (digits) or are downloaded by torchvision (MNIST, Fashion-MNIST, CIFAR-10)."""

import gzip
import os
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from genai import progress
from genai.core import stored
from genai.core.errors import UserError
from genai.data.base import Arrays, Data, Split, split_indices

DIGITS = [str(d) for d in range(10)]
FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Digits(Data):
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels on 17 grey levels.

    In a fixed permutation, training has the first 1,293, validation the next 144 and test the other 360.
    """

    def __init__(
        self, field: str, shape: Sequence[int], classes: int, levels: int, batch_size: int, num_workers: int = 0
    ):
        from sklearn.datasets import load_digits

        raw: Any = load_digits()
        images = (raw.images[:, None] / 8 - 1).astype(np.float32)  # grey levels 0..16 -> [-1, 1]
        order = np.random.default_rng(0).permutation(len(images))
        parts = {"train": order[:1293], "val": order[1293:1437], "test": order[1437:]}
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits={name: Arrays(field, images[i], raw.target[i]) for name, i in parts.items()},
            found_shape=images.shape[1:],
            class_names=DIGITS,
            found_levels=17,
        )


def array_splits(
    field: str, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], flip: bool
) -> dict[str, Split]:
    """Build splits from (images, labels) pairs: the published test split, and validation from 1/12 of the training images.

    Validation is a fixed random choice. `flip` mirrors training images left to right with probability 1/2.
    """
    images, labels = train
    kept, val = split_indices(len(images), 1 / 12)
    return {
        "train": Arrays(field, images[kept], labels[kept], flip),
        "val": Arrays(field, images[val], labels[val]),
        "test": Arrays(field, *test),
    }


class MNIST(Data):
    """MNIST (LeCun et al. 1998), from idx files below `root`/<name>/raw, gzipped or not; they are downloaded if absent."""

    name, names = "MNIST", DIGITS

    def __init__(
        self,
        root: str,
        field: str,
        shape: Sequence[int],
        classes: int,
        levels: int,
        batch_size: int,
        num_workers: int = 0,
        flip: bool = False,
    ):
        raw = Path(root) / self.name / "raw"
        if not all(_idx_file(raw, f"{part}-{kind}") for part in ("train", "t10k") for kind in _IDX_KINDS):
            expected = f"{raw}/train-images-idx3-ubyte[.gz] and its three companions"
            download(self.name, root, expected, lambda module, may: getattr(module, self.name)(root, download=may))
        train, test = ([_read_idx(raw, f"{part}-{kind}") for kind in _IDX_KINDS] for part in ("train", "t10k"))
        splits = array_splits(field, (train[0][:, None], train[1]), (test[0][:, None], test[1]), flip)
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=splits,
            found_shape=(1, *train[0].shape[1:]),
            class_names=self.names,
            found_levels=256,
        )


class FashionMNIST(MNIST):
    """Zalando's clothes, in MNIST's format."""

    name, names = "FashionMNIST", FASHION


class CIFAR10(Data):
    """CIFAR-10 as torchvision keeps it below `root`, downloaded if absent; training images are mirrored at random."""

    def __init__(
        self,
        root: str,
        field: str,
        shape: Sequence[int],
        classes: int,
        levels: int,
        batch_size: int,
        num_workers: int = 0,
        flip: bool = True,
    ):
        expected = f"{Path(root) / 'cifar-10-batches-py'}/data_batch_1, ..."
        train, test = (
            download("CIFAR10", root, expected, lambda module, may, t=t: module.CIFAR10(root, t, download=may))
            for t in (True, False)
        )
        pairs = [(part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in (train, test)]
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=array_splits(field, pairs[0], pairs[1], flip),
            found_shape=pairs[0][0].shape[1:],
            class_names=CIFAR10_NAMES,
            found_levels=256,
        )


def download(name: str, root: str, expected: str, fetch: Callable[[Any, bool], Any]) -> Any:
    """Load a data set through torchvision, which downloads it if it is absent; returns what `fetch` returns.

    Args:
        name: of the data set, for errors.
        root: folder of the data.
        expected: files that were looked for, for errors.
        fetch: called with torchvision.datasets and whether it may download.

    Raises UserError if the data are neither there nor can be downloaded; folders made for the download are removed then.
    """
    from torchvision import datasets

    existed = set(_folders(root))
    try:
        with progress.task(f"loading {name}"):
            return fetch(datasets, not stored.is_building())
    except Exception as error:  # each downloader has errors of its own
        for path in _folders(root):
            if path not in existed and not any(path.iterdir()):
                path.rmdir()
        if stored.is_building():
            raise UserError(
                f"{name} is not in data.root={root!r} (looked for {expected}), and nothing is downloaded because a checkpoint "
                "says so: set root= (data.root= on resume) to the folder that holds it; python train.py with that data= "
                "downloads it"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"{name} is not in data.root={root!r} (looked for {expected}) and could not be downloaded ({reason}): set "
            "data.root to the folder that holds it"
        ) from error


def _folders(root: str) -> list[Path]:
    """The folders that exist below root, root and those above it, deepest first."""
    below = [Path(folder) for folder, _, _ in os.walk(root, topdown=False)]
    return [*below, *(folder for folder in Path(root).parents if folder.exists())]


MOST_BYTES = 10**8  # of one idx file; the largest here has 47 million
_IDX_KINDS = "images-idx3-ubyte", "labels-idx1-ubyte"


def _idx_file(raw: Path, name: str) -> Path | None:
    return next((p for p in (raw / name, raw / f"{name}.gz") if p.exists()), None)


def _read_idx(raw: Path, name: str) -> np.ndarray:
    """An idx file of unsigned bytes: two zero bytes, 8 for uint8, the number of dimensions, each as a big-endian int32."""
    path = _idx_file(raw, name)
    assert path is not None
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=BytesIO(data)) as file:
                data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it unpacks to over {MOST_BYTES:,} bytes")
        shape = np.frombuffer(data, ">i4", data[3], 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): delete it to download it again, or change data.root") from error
