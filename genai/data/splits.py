"""Which files of a folder are of which class and split."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from genai.core.errors import UserError
from genai.data.base import split_indices

SPLITS = "train", "val", "test"
WORDS = {
    "train": "train|training|trn",
    "val": "val|valid|validation|validate|dev|eval|evaluation",
    "test": "test|testing|tst",
}
BEFORE, AFTER = "images?|imgs?|data", "images?|imgs?|pictures|photos|data|set|dataset|split|folder"
NAMES = {key: re.compile(f"({BEFORE})?({words})({AFTER})?((19|20)[0-9][0-9])?") for key, words in WORDS.items()}


class Arrangement(NamedTuple):
    """Labels int64 (N,) and class names, both None where there are less than two classes; the items of each split; and what of
    that a user should know."""

    labels: np.ndarray | None
    class_names: list[str] | None
    parts: dict[str, np.ndarray]
    notes: list[str]


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for: train, Training, test_images or val2017."""
    plain = re.sub(r"[\W_]+", "", folder.lower())
    return next((key for key, name in NAMES.items() if name.fullmatch(plain)), None)


def arrange(root: str, names: Sequence[str], version: int) -> Arrangement:
    """Read classes and splits off the paths of images below `root`.

    A folder that is alone is descended. Then the folders of splits, below the classes too where all have them; then those of
    the classes. A split without a folder is 1/12 of the training images, test cut first, then validation from what remains,
    in proportion to the classes. Version 1 knows the splits by their own names alone, and cuts without regard to classes.

    Raises UserError if the folders make no sense.
    """
    spell = _exactly if version == 1 else split_of
    paths = [name.split("/") for name in names]
    while len({p[0] for p in paths}) == 1 and len(paths[0]) > 1 and not _begins(paths, spell):
        paths = [p[1:] for p in paths]
    folders = _swapped(paths) if version > 1 and not _begins(paths, spell) else None
    if version > 1 and folders is None and not _begins(paths, spell):
        _check_domains(root, paths)
    paths = folders or paths
    notes: list[str] = []
    parts = {"train": np.arange(len(paths))}
    if _begins(paths, spell):
        kinds = {p[0]: spell(p[0]) if len(p) > 1 else None for p in paths}
        _check_splits(root, names, paths, kinds)
        parts = {key: np.array([i for i, p in enumerate(paths) if kinds[p[0]] == key], int) for key in SPLITS}
        if any(kind != folder for folder, kind in kinds.items()) or folders:
            as_what = ", ".join(f"{folder} as {kind}" for folder, kind in sorted(kinds.items()))
            notes.append(f"its folders are taken for splits: {as_what}")
        paths = [p[1:] for p in paths]
    labels, class_names = _classes(root, names, paths, parts)
    parts = cut_splits(root, parts, labels if version > 1 else None)
    if class_names is not None and labels is not None:
        missing = [name for i, name in enumerate(class_names) if i not in labels[parts["train"]]]
        if missing and version > 1:
            notes.append(
                f"warning: {len(missing)} of {len(class_names)} classes have no training image "
                f"({', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}): add images to them"
            )
    return Arrangement(labels, class_names, parts, notes)


def _exactly(folder: str) -> str | None:
    return folder if folder in SPLITS else None


def _begins(paths: Sequence[Sequence[str]], spell: Any) -> bool:
    """Whether paths begin with folders of splits: one of training, or one named as plainly."""
    found = {p[0] for p in paths if len(p) > 1}
    return any(spell(folder) == "train" or (folder.lower() in SPLITS and spell(folder)) for folder in found)


def _swapped(paths: Sequence[Sequence[str]]) -> list[list[str]] | None:
    """Paths of class, split, ... with the split first; None if they are not all like that, training among them."""
    kinds = {split_of(p[1]) if len(p) > 2 else None for p in paths}
    return None if None in kinds or "train" not in kinds else [[p[1], p[0], *p[2:]] for p in paths]


def _check_domains(root: str, paths: Sequence[Sequence[str]]) -> None:
    """Raise UserError for folders like trainA and testA, which are classes by their place and splits by their names."""
    alike: dict[str, dict[str, str]] = {}
    for folder in sorted({p[0] for p in paths if len(p) > 1}):
        for key, words in WORDS.items():
            if found := re.match(rf"(?i:{words})([\W_]+(?=.)|(?=[A-Z0-9]))", folder):
                alike.setdefault(folder[found.end() :], {})[key] = folder
    for domain, found in alike.items():
        if "train" in found and len(found) > 1:
            raise UserError(
                f"data.root={root!r} has folders named {', '.join(sorted(found.values()))}, which may be splits or classes: "
                f"move them to {', '.join(f'{key}/{domain}' for key in found)} if they are splits, or give classes other names"
            )


def _check_splits(
    root: str, names: Sequence[str], paths: Sequence[Sequence[str]], kinds: Mapping[str, str | None]
) -> None:
    """Raise UserError unless the first folders are one each of the splits, training among them, and nothing else."""
    splits = sorted(folder for folder, kind in kinds.items() if kind)
    beside = [name for name, p in zip(names, paths, strict=True) if kinds[p[0]] is None]
    if beside or "train" not in kinds.values():
        found = f"also {beside[0]}" if beside else "no train"
        raise UserError(
            f"data.root={root!r} has folders named {', '.join(splits)}, but {found}: there must be train, and every image "
            "must be in one of train, val and test; rename the folder if it is a class"
        )
    for key in SPLITS:
        same = [folder for folder in splits if kinds[folder] == key]
        if len(same) > 1:
            raise UserError(
                f"data.root={root!r} has {len(same)} folders for the split {key} ({', '.join(same)}): join them, or move all "
                "but one out of it"
            )


def _classes(
    root: str, names: Sequence[str], paths: Sequence[Sequence[str]], parts: Mapping[str, np.ndarray]
) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels and class names by the first folders; those of training are all there are."""
    folders: Any = np.array([p[0] if len(p) > 1 else "" for p in paths])
    class_names = np.unique(folders[parts["train"]]).tolist()
    for items in parts.values():
        wrong = [
            names[int(i)] for i in items if folders[i] not in class_names or (folders[i] == "" and len(class_names) > 1)
        ]
        if wrong:
            raise UserError(
                f"data.root={root!r}: {wrong[0]} is in none of the class folders of training "
                f"({', '.join(filter(None, class_names)) or 'there are none'}): move it, or change data.root"
            )
    if len(class_names) < 2:
        return None, None
    return np.searchsorted(class_names, folders).astype(np.int64), class_names


def cut_splits(root: str, parts: dict[str, np.ndarray], labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """Items of train, val and test; what is missing is cut from train, what is there is put in a fixed random order."""
    parts = {key: items for key, items in parts.items() if len(items)}
    for key in ("test", "val"):
        if key in parts:
            parts[key] = np.random.default_rng(0).permutation(parts[key])
            continue
        items = parts["train"]
        kept, out = split_indices(len(items), 1 / 12) if labels is None else stratified_indices(labels[items], 1 / 12)
        if not len(kept):
            raise UserError(
                f"data.root={root!r} holds too few images to set some aside for validation and test: add images"
            )
        parts[key], parts["train"] = items[out], items[kept]
    return parts


def stratified_indices(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of labels (N,), cut into the kept and `fraction` of them, each class in proportion: every k-th one of a list
    sorted by class and in a fixed random order within each; its first item stays, as long as there are others to take.

    The second part is in a fixed random order.
    """
    n = len(labels)
    order = np.random.default_rng(0).permutation(n)
    order = order[np.argsort(labels[order], kind="stable")]
    first = np.diff(labels[order], prepend=-1) != 0
    spare, count = order[~first], max(round(n * fraction), 1)
    if count > len(spare):
        out = np.concatenate([spare, order[first]])[:count]
    else:
        out = spare[((np.arange(count) + 0.5) * len(spare) / count).astype(int)]
    return np.setdiff1d(order, out), np.random.default_rng(0).permutation(out)
