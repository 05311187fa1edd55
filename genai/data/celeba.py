"""CelebA, faces of celebrities (Liu et al. 2015), through torchvision."""

from collections.abc import Sequence

import numpy as np

from genai.data.base import Data, Split
from genai.data.files import Files
from genai.data.image_folder import Images, check_size
from genai.data.images import download


class CelebA(Data):
    """CelebA: 202,599 aligned faces below `root`/celeba in the official splits, center-cropped and resized; no labels.

    They are downloaded if absent, for which torchvision needs the package gdown.

    Args:
        size: [H, W].
        flip: mirror training images left to right with probability 1/2.
    """

    def __init__(
        self,
        root: str,
        size: Sequence[int],
        flip: bool,
        field: str,
        shape: Sequence[int],
        classes: None,
        levels: int,
        batch_size: int,
        num_workers: int = 0,
    ):
        check_size(size)
        expected = f"{root}/celeba/list_eval_partition.txt and {root}/celeba/img_align_celeba"
        splits: dict[str, Split] = {}
        for name, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
            part = download(
                "CelebA", root, expected, lambda module, may, s=theirs: module.CelebA(root, s, download=may)
            )
            files = Files(f"{root}/celeba/img_align_celeba")
            splits[name] = Images(
                field, files, np.array(part.filename), None, [3, *size], "center", flip and name == "train"
            )
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits=splits,
            found_shape=[3, *size],
            class_names=None,
            found_levels=256,
        )
