"""Derive classes and splits from the folders of files, such as images."""

import re
from collections.abc import Callable, Mapping, Sequence
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
MEDIA = "images?|imgs?|data|audio|sounds?|recordings?|wavs?"
BEFORE, AFTER = MEDIA, f"{MEDIA}|pictures|photos|clips|set|dataset|split|folder"
NAMES = {key: re.compile(f"({BEFORE})?({words})({AFTER})?((19|20)[0-9][0-9])?") for key, words in WORDS.items()}


class Arrangement(NamedTuple):
    """The classes and splits of a list of files.

    Attributes:
        labels: int64 (N,), None where there are fewer than two classes.
        class_names: name of each label, or None.
        parts: the items of each split, as indices.
        notes: sentences for the user on how folders were understood.
    """

    labels: np.ndarray | None
    class_names: list[str] | None
    parts: dict[str, np.ndarray]
    notes: list[str]


def split_of(folder: str) -> str | None:
    """Return the split that a folder's name means, such as train, Training, test_images or val2017; None for other names."""
    plain = re.sub(r"[\W_]+", "", folder.lower())
    return next((key for key, name in NAMES.items() if name.fullmatch(plain)), None)


def arrange(root: str, names: Sequence[str], version: int) -> Arrangement:
    """Derive classes and splits from the paths of files below `root`.

    A folder that contains only one folder is skipped. Then come the folders of splits, which may also be inside the folders of
    classes if all of them have some, and the folders of classes. A split without a folder is 1/12 of the training files,
    stratified by class: test is taken first, then validation from the rest. Version 1 knows the splits by exact name only, and
    does not stratify.

    Raises UserError if the folders are contradictory.
    """
    split_name = _exact_name if version == 1 else split_of
    paths = [name.split("/") for name in names]
    while len({p[0] for p in paths}) == 1 and len(paths[0]) > 1 and not _has_splits(paths, split_name):
        paths = [p[1:] for p in paths]
    folders = _splits_first(paths) if version > 1 and not _has_splits(paths, split_name) else None
    if version > 1 and folders is None and not _has_splits(paths, split_name):
        _check_domains(root, paths)
    paths = folders or paths
    notes: list[str] = []
    parts = {"train": np.arange(len(paths))}
    if _has_splits(paths, split_name):
        kinds = {p[0]: split_name(p[0]) if len(p) > 1 else None for p in paths}
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
                f"warning: {len(missing)} of {len(class_names)} classes have no training file "
                f"({', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}): add files to them"
            )
    return Arrangement(labels, class_names, parts, notes)


def _exact_name(folder: str) -> str | None:
    return folder if folder in SPLITS else None


def _has_splits(paths: Sequence[Sequence[str]], split_name: Callable[[str], str | None]) -> bool:
    """Tell whether the first folders are splits: one of them is training, or has the plain name of a split."""
    found = {p[0] for p in paths if len(p) > 1}
    return any(split_name(folder) == "train" or (folder.lower() in SPLITS and split_name(folder)) for folder in found)


def _splits_first(paths: Sequence[Sequence[str]]) -> list[list[str]] | None:
    """Turn paths <class>/<split>/... into <split>/<class>/...; None unless all are like that, with training among them."""
    kinds = {split_of(p[1]) if len(p) > 2 else None for p in paths}
    return None if None in kinds or "train" not in kinds else [[p[1], p[0], *p[2:]] for p in paths]


def _check_domains(root: str, paths: Sequence[Sequence[str]]) -> None:
    """Raise UserError for folders like trainA and testA, which are classes by their position but splits by their names."""
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
    """Raise UserError unless the first folders are splits, each once, with training among them, and nothing else."""
    splits = sorted(folder for folder, kind in kinds.items() if kind)
    others = [name for name, p in zip(names, paths, strict=True) if kinds[p[0]] is None]
    if others or "train" not in kinds.values():
        found = f"also {others[0]}" if others else "no train"
        raise UserError(
            f"data.root={root!r} has folders named {', '.join(splits)}, but {found}: there must be train, and every file "
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
    """Return labels and class names by the first folders; None, None for fewer than two classes.

    Raises UserError for a file whose class has no training files.
    """
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
    """Complete the splits: a missing one is taken from train, a given val or test is put into a fixed random order.

    Raises UserError if there are too few files.
    """
    parts = {key: items for key, items in parts.items() if len(items)}
    for key in ("test", "val"):
        if key in parts:
            parts[key] = np.random.default_rng(0).permutation(parts[key])
            continue
        items = parts["train"]
        kept, out = split_indices(len(items), 1 / 12) if labels is None else stratified_indices(labels[items], 1 / 12)
        if not len(kept):
            raise UserError(
                f"data.root={root!r} holds too few files to set some aside for validation and test: add some"
            )
        parts[key], parts["train"] = items[out], items[kept]
    return parts


def stratified_indices(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split the indices of labels (N,) into the rest and `fraction` of them, with equal shares of each class.

    The indices are sorted by class, in a fixed random order within each, and every k-th is taken; the first of each class is
    taken only if there are no others. The second part is returned in a fixed random order.
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
