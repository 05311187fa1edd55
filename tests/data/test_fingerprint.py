"""Checksums of data: what changes them, what does not, and what is made anew because of them."""

import os
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from genai import checkpoint
from genai.checkpoint.build import build_typed
from genai.cli import compose_config, prepare_training
from genai.core import cache
from genai.core.errors import UserError
from genai.data import fingerprint
from genai.data.base import Arrays, Data
from genai.data.fingerprint import dataset_checksum, split_checksum
from genai.evaluation.baselines.reference import reference_scores
from genai.evaluation.metrics import standard_metrics
from genai.train.codec import precompute
from genai.train.run import run

BITS = {"bits_per_dim": standard_metrics()["bits_per_dim"]}


def data_of(*given):
    return build_typed(compose_config("baselines", list(given)).data)


def arrays(images, labels, batch_size=4):
    """600 images of 4x4 on 4 grey levels, split in three."""
    parts = {"train": slice(0, 400), "val": slice(400, 500), "test": slice(500, 600)}
    splits = {name: Arrays("image", images[part], labels[part]) for name, part in parts.items()}
    return Data(
        field="image",
        shape=None,
        classes=None,
        levels=None,
        batch_size=batch_size,
        num_workers=0,
        splits=splits,
        found_shape=[1, 4, 4],
        class_names=["a", "b"],
        found_levels=4,
    )


@pytest.fixture
def source():
    draw = np.random.default_rng(0)
    return draw.integers(0, 4, (600, 1, 4, 4)).astype(np.float32) * 2 / 3 - 1, draw.integers(0, 2, 600)


CHANGES = {
    "one value of the last training image": lambda images, labels: images.__setitem__((399, 0, 3, 3), 1 / 3),
    "a label": lambda images, labels: labels.__setitem__(300, 1 - labels[300]),
    "the test split": lambda images, labels: images.__setitem__(slice(560, None), -1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_baselines_are_those_of_the_data_as_they_are(source, change, tmp_path, monkeypatch, waits):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, labels = source
    before = reference_scores(arrays(images, labels), BITS, "test", 100)
    again = reference_scores(arrays(images, labels, batch_size=7), BITS, "test", 100)
    assert again == before and sum("baselines of this data, once" in wait for wait in waits) == 2
    change(images, labels)
    after = reference_scores(arrays(images, labels), BITS, "test", 100)
    assert sum("baselines of this data, once" in wait for wait in waits) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert after == reference_scores(arrays(images, labels), BITS, "test", 100)


def photos(folder, shift=0, count=20):
    """Two classes of `count` images each, all files of one size."""
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.full((4, 4), (7 * i + shift) % 256, np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02d}.bmp")
    return folder


def folder_data(root, *more):
    return data_of("data=image_folder", f"data.root={root}", *more)


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A cache of its own, and files that count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "RACY_NS", -1)


def all_of(data):
    return dataset_checksum(data, list(data.splits))


def test_a_folder_moved_copied_or_zipped_is_the_same_data(tmp_path, settled):
    root = photos(tmp_path / "photos")
    first = all_of(folder_data(root))
    assert first == all_of(folder_data(root, "data.batch_size=3", "data.num_workers=2"))
    shutil.copytree(root, tmp_path / "other" / "photos", copy_function=shutil.copyfile)
    shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "other")
    for place in (tmp_path / "other", tmp_path / "photos.zip"):
        assert all_of(folder_data(place)) == first
        quick = (split_checksum(folder_data(where).splits["train"], quick=True) for where in (root, place))
        assert len({*quick}) == 1
    assert all_of(folder_data(root, "data.size=[2,2]")) != first


def test_a_replaced_image_is_other_data_whatever_its_name_size_and_time(tmp_path, settled):
    root = photos(tmp_path / "photos")
    first, victim = all_of(folder_data(root)), root / "b" / "19.bmp"
    before = victim.stat()
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert victim.stat().st_size == before.st_size and victim.stat().st_mtime_ns == before.st_mtime_ns
    assert all_of(folder_data(root)) != first
    victim.rename(root / "a" / "zz.bmp")  # another label
    labels = all_of(folder_data(root))
    (root / "a" / "00.bmp").unlink()
    assert len({first, labels, all_of(folder_data(root))}) == 3


def test_files_are_read_once(tmp_path, settled, monkeypatch):
    root, reads = photos(tmp_path / "photos"), []
    crc32 = fingerprint._crc32
    monkeypatch.setattr(fingerprint, "_crc32", lambda path: reads.append(path) or crc32(path))
    first = all_of(folder_data(root))
    assert len(reads) == 40 and all_of(folder_data(root)) == first and len(reads) == 40
    split_checksum(folder_data(root).splits["train"], quick=True)
    assert len(reads) == 40
    shutil.rmtree(cache.cache_folder("fingerprints"))
    cache.cache_folder("fingerprints").write_text("no folder")  # where nothing can be kept it is computed again
    assert all_of(folder_data(root)) == first and len(reads) == 80


def test_what_has_only_just_changed_is_not_trusted_to_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "RACY_NS", 10**15)
    all_of(folder_data(photos(tmp_path / "photos")))
    assert not (tmp_path / "cache" / "genai" / "fingerprints").exists()


def test_captions_do_not_change_the_images(tmp_path):
    one, other = (data_of("data=digits_text", f"data.templates=['{t} {{}}']") for t in ("the digit", "a handwritten"))
    assert split_checksum(one.splits["train"]) != split_checksum(other.splits["train"])
    assert all_of(one) == all_of(other)


def test_pixels_as_tokens_and_a_text(tmp_path):
    assert split_checksum(data_of("data=digits_pixels").splits["test"]) != split_checksum(
        data_of("data=digits").splits["test"]
    )
    (tmp_path / "text.txt").write_text("abcdefghij" * 100)
    given = ["data=text_file", f"data.path={tmp_path / 'text.txt'}", f"data.cache={tmp_path / 'cache'}"]
    short, long = (data_of(*given, f"data.shape=[{n}]").splits for n in (8, 16))
    assert split_checksum(short["test"]) == split_checksum(long["test"]) != split_checksum(short["val"])
    (tmp_path / "text.txt").write_text("abcdefghij" * 99 + "abcdefghik")
    changed = data_of(*given, "data.shape=[8]").splits
    assert split_checksum(changed["val"]) == split_checksum(short["val"]) and split_checksum(
        changed["test"]
    ) != split_checksum(short["test"])
    assert split_checksum(changed["train"], quick=True) != split_checksum(short["train"], quick=True)


class Mean(nn.Module):
    """A first stage: the mean of each image."""

    latent_shape = (1,)

    def encode(self, x):
        return x.mean((1, 2, 3))[:, None]


def test_latents_are_those_of_the_images_as_they_are(tmp_path, settled):
    def latents(root, *more):
        data, model = folder_data(root, "data.crop=center", "data.flip=false", *more), nn.Module()
        model.codec = Mean()
        precompute(
            model, data, OmegaConf.create({"codec": {"sha256": "x", "model": {}, "cache": str(tmp_path / "kept")}})
        )
        return data.splits["train"].batch(torch.arange(30), None)

    def whole(root, *more):
        found = latents(root, *more)
        assert torch.equal(found["latent"], Mean().encode(found["image"]))
        return len(list((tmp_path / "kept").iterdir()))

    root = photos(tmp_path / "photos")
    assert whole(root) == 3
    root = root.rename(tmp_path / "moved")
    assert whole(root, "data.batch_size=3") == 3
    for i in (5, 6, 7, 8):  # the same names and sizes
        Image.fromarray(np.full((4, 4), 200 + i, np.uint8)).save(root / "a" / f"{i:02d}.bmp")
    assert whole(root) > 3


LONG = ["optim.schedule=constant", "discriminator_optim.schedule=constant"]


def test_a_run_goes_on_with_its_own_items_alone(tmp_path):
    root = photos(tmp_path / "photos")
    given = ["model=gan", "data=image_folder", f"data.root={root}", "data.size=[8,8]", "data.channels=1", "logger=none"]
    small = ["max_steps=1", "data.batch_size=2", "callbacks.evaluate.n=2", "callbacks.samples.n=1"]
    folder = run(compose_config("train", [*given, *small, f"run_dir={tmp_path / 'run'}"], prepare_training))

    def go_on(steps, *more):
        return run(compose_config("train", [f"resume={folder}", f"max_steps={steps}", *LONG, *more], prepare_training))

    moved = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    go_on(2, f"data.root={moved}")
    photos(moved, shift=3)  # as many files of the same names and sizes pass: their contents are not read at the start
    for i in range(17):
        (moved / "a" / f"{i:02d}.bmp").unlink()
    with pytest.raises(UserError, match=r"was trained on 34 items \(\w+\), and data= now has 19: restore the old"):
        go_on(3)
    shutil.copytree(root, moved, dirs_exist_ok=True)
    (moved / "a" / "19.bmp").rename(moved / "b" / "20.bmp")
    with pytest.raises(
        UserError, match=r"was trained on 34 items \(\w+\), and data= now has as many, but different ones"
    ):
        go_on(3)
    for path in (folder / "checkpoints").glob("*.ckpt"):  # one from before the items were noted goes on as it did
        content = checkpoint.read(path)
        del content["trainer"]["train_split"]
        checkpoint.save({k: v for k, v in content.items() if k not in ("format", "rng_version")}, path)
    go_on(3)


class Plain:
    """Somebody else's split, which says nothing of itself."""

    augments = False

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def batch(self, index, draws):
        return {"image": self.values[index], "label": index % 2}


@pytest.mark.parametrize("quick", [False, True])
def test_any_split_has_a_checksum(quick):
    x = torch.zeros(300, 1, 2, 2)
    first = split_checksum(Plain(x), quick)
    assert first == split_checksum(Plain(x.clone()), quick) != split_checksum(Plain(x[:299]), quick)
    x[299, 0, 1, 1] = 1
    assert split_checksum(Plain(x), quick) != first
