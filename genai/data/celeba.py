"""CelebA: 202,599 aligned faces of celebrities, 178x218."""

from collections.abc import Sequence
from pathlib import Path

from genai.core.errors import UserError
from genai.data.base import Data, Split
from genai.data.image_folder import Files, Images, check_size
from genai.data.images import download

PARTS = {"0": "train", "1": "val", "2": "test"}  # of list_eval_partition.txt


class CelebA(Data):
    """The faces as torchvision keeps them below `root`/celeba, downloaded if absent, in their own three parts; no labels.

    The centre of a face (178x178 for a square `size` [H, W]) is resized to `size`; `flip` mirrors training images at
    random.
    """

    def __init__(
        self, root: str, size: Sequence[int], flip: bool, field: str, shape: Sequence[int] | None, classes: None,
        levels: int | None, batch_size: int, num_workers: int = 0,
    ):  # fmt: skip
        if size is None:
            raise UserError("data.size=null must be [height,width]")
        check_size(size)
        folder, partition = Path(root) / "celeba/img_align_celeba", Path(root) / "celeba/list_eval_partition.txt"
        if not (folder.is_dir() and partition.is_file()):
            download("CelebA", root, f"{folder} and {partition}", lambda sets: sets.CelebA(root, download=True))
        names = _partition(partition)
        splits: dict[str, Split] = {
            key: Images(field, Files(folder), names[key], None, [3, *size], "center", flip and key == "train")
            for key in PARTS.values()
        }
        super().__init__(
            field=field, shape=shape, classes=classes, levels=levels, batch_size=batch_size, num_workers=num_workers,
            splits=splits, found_shape=[3, *size], class_names=None, found_levels=256,
        )  # fmt: skip


def _partition(path: Path) -> dict[str, list[str]]:
    """File names of train, val and test, from lines like "000001.jpg 0". Raises UserError for any other line."""
    names: dict[str, list[str]] = {key: [] for key in PARTS.values()}
    for line in filter(None, path.read_text().splitlines()):
        name, _, part = line.strip().rpartition(" ")
        if part not in PARTS or not name:
            raise UserError(
                f"{path} is damaged (it says {line!r}): delete it to download it again, or change data.root"
            )
        names[PARTS[part]].append(name.strip())
    if not all(names.values()):
        raise UserError(f"{path} is damaged (a part is empty): delete it to download it again, or change data.root")
    return names
