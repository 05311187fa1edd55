"""Data: the splits are those stated, the stream is a pure function of (seed, position), bad files are named."""

import gzip
import zipfile
from typing import get_type_hints

import numpy as np
import PIL.Image
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from genai import sampling
from genai.core import rng
from genai.core.errors import UserError
from genai.data import images, toy2d
from genai.data.base import Arrays, Data, split_indices
from genai.data.celeba import CelebA
from genai.data.image_folder import ImageFolder
from genai.data.stream import AUGMENT, DRAW_CHUNK, Stream, Table, batches, train_loader
from genai.modalities.decode import crop_box
from genai.modalities.image import Image, from_uint8, grid, near_square, period, to_uint8
from genai.modalities.vector import Vector, density
from tests.conftest import ROOT


def folder(root, **arguments):
    defaults = {"size": None, "channels": None, "crop": "center", "flip": False, "field": "image"}
    facts = {"shape": None, "classes": None, "levels": None, "batch_size": 4}
    return ImageFolder(str(root), **{**defaults, **facts, **arguments})


def indexed(n=50, batch_size=4, num_workers=0, flip=False):
    """A data set whose values say which item they are."""
    values = np.arange(n, dtype=np.float32)[:, None, None, None] + np.zeros((1, 1, 2, 3), np.float32)
    values[..., 0] += 0.5
    split = Arrays("image", values, np.arange(n) % 10, flip)
    return Data(
        field="image",
        shape=None,
        classes=None,
        levels=None,
        batch_size=batch_size,
        num_workers=num_workers,
        splits={"train": split},
        found_shape=[1, 2, 3],
        class_names=images.DIGITS,
        found_levels=None,
    )


def take(data, n, accumulate=1, seed=0, start=0, rank=0, world=1):
    loader = iter(train_loader(data, accumulate, seed, start, rank, world))
    return [next(loader) for _ in range(n)]


def same(a, b):
    return all(torch.equal(x[k], y[k]) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True) for k in x)


# Digits


def test_digits_are_split_as_stated():
    data = images.Digits("image", [1, 8, 8], 10, 17, 64)
    raw, order = load_digits(), np.random.default_rng(0).permutation(1797)
    for name, part in {"train": order[:1293], "val": order[1293:1437], "test": order[1437:]}.items():
        split = data.splits[name]
        batch = split.batch(torch.arange(len(split)), None)
        assert torch.equal((batch["image"][:, 0] + 1) * 8, torch.from_numpy(raw.images[part]).float())
        assert batch["label"].tolist() == raw.target[part].tolist()
    assert data.conditions["label"].names == [str(d) for d in range(10)]


# The stream


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_stream(workers):
    assert same(take(indexed(flip=True), 9, 2), take(indexed(flip=True, num_workers=workers), 9, 2))


def test_starting_later_skips_and_seeds_differ():
    whole = take(indexed(flip=True), 12, 2)
    assert same(whole[5:], take(indexed(flip=True), 7, 2, start=5))
    assert not same(whole, take(indexed(flip=True), 12, 2, seed=1))


def test_ranks_partition_the_positions_of_a_doubled_batch():
    one = take(indexed(batch_size=8, flip=True), 6, 3)
    ranks = [take(indexed(batch_size=4, flip=True), 6, 3, rank=r, world=2) for r in range(2)]
    for whole, a, b in zip(one, *ranks, strict=True):
        for w, x, y in zip(whole, a, b, strict=True):
            assert torch.equal(w["image"], torch.cat([x["image"], y["image"]]))


def test_accumulation_groups_the_same_positions():
    flat = [batch for step in take(indexed(), 12) for batch in step]
    grouped = [batch for step in take(indexed(), 4, accumulate=3) for batch in step]
    assert same([flat], [grouped])


def test_each_epoch_is_another_permutation():
    table = Table(50, Stream(range(50), 8, 1, 3, 0, 0, 1).order)
    seen = [table.rows(torch.arange(first, first + 8)) for first in range(0, 400, 8)]
    epochs = torch.cat(seen).view(-1, 50)
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_augmentation_is_a_function_of_seed_and_position():
    small = torch.cat([b["image"] for step in take(indexed(batch_size=2, flip=True), 40) for b in step])
    large = torch.cat([b["image"] for step in take(indexed(batch_size=20, flip=True), 4) for b in step])
    assert torch.equal(small, large)
    stream, far = Stream(range(50), 8, 1, 3, 0, 0, 1), torch.arange(DRAW_CHUNK - 3, DRAW_CHUNK + 5)
    key = torch.tensor([rng.mix(3, AUGMENT)])
    expected = rng.words(key, far, 0, rng.MODEL)[0] / 2**32
    assert torch.equal(Table(DRAW_CHUNK, stream.draw).rows(far), expected)
    flipped = (small[:, 0, 0, 0] % 1 == 0).double().mean().item()
    assert 0.3 < flipped < 0.7


def test_evaluation_reads_in_order_without_draws():
    split = indexed(n=10, flip=True).splits["train"]
    got = list(batches(split, 4, limit=7))
    assert [len(b["image"]) for b in got] == [4, 3]
    assert torch.cat([b["image"][:, 0, 0, 1] for b in got]).tolist() == list(range(7))


def test_held_out_is_a_fixed_partition():
    kept, out = split_indices(100, 0.1)
    assert sorted([*kept, *out]) == list(range(100))
    assert len(out) == 10
    assert np.array_equal(split_indices(100, 0.1)[1], out)


# Files in and out


def test_bytes_survive_the_round_trip():
    x = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(from_uint8(x)), x)
    assert (from_uint8(x).min(), from_uint8(x).max()) == (-1, 1)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    "n, classes, columns",
    [(16, 1, 4), (100, 10, 10), (200, 10, 10), (400, 10, 20), (7, 10, 3), (30, 4, 4), (64, 30, 8), (100, 3, 9)],
)
def test_grids_are_near_a_square_with_a_class_a_column(n, classes, columns):
    labels = torch.arange(n) % classes
    assert near_square(n, 8, 8, period(labels)) == columns
    if 1 < period(labels) < n:
        assert (labels[:columns] == labels[columns : 2 * columns])[: n - columns].all()
    assert period(torch.tensor([3, 3, 3, 3])) == period(torch.tensor([0, 1, 1, 0])) == period(None) == 1


def test_grids_say_which_rows_are_originals():
    original = torch.tensor([True, True, True, False, False, False])
    batch = {"image": torch.full((6, 1, 8, 8), -1.0), "original": original}
    picture, plain = Image().preview(batch), grid(batch["image"], 3)
    (margin,) = picture[:, :, : picture.shape[2] - plain.shape[2]]
    assert torch.equal(picture[:, :, margin.shape[1] :], plain)
    above, below = margin[: len(margin) // 2], margin[len(margin) // 2 :]
    assert min(above.max(), below.max()) > 200
    assert (above > 0).any(0).sum() > (below > 0).any(0).sum()  # "original" is longer than "model"
    names = sampling.file_names(torch.arange(2), None, torch.tensor([True, False]))
    assert names == ["seed_000000_original", "seed_000001"]


def test_grids():
    picture = grid(torch.full((6, 3, 4, 5), 1.0), columns=3, min_side=1)
    assert picture.shape == (3, 9, 17)
    assert picture[:, 4].max() == 0  # a dark line between rows
    assert grid(torch.zeros(5, 1, 8, 8)).shape[0] == 1
    assert grid(torch.zeros(8, 1, 8, 32), min_side=1).shape == (1, 35, 65)  # wide images in few columns
    cloud = density(torch.tensor([[3.0, -3.0]]).expand(10, 2))
    assert cloud.shape == (1, 320, 320)
    y, x = (cloud[0] > 0).nonzero().float().mean(0).tolist()
    assert x > 250  # x to the right
    assert y > 250  # y up, so a negative one is low in the picture


def test_samples_are_written_whole(tmp_path):
    x, labels, seeds = torch.rand(3, 3, 4, 5) * 2 - 1, torch.tensor([1, 2, 1]), torch.arange(7, 10)
    names = sampling.file_names(seeds, labels)
    written = Image().write(tmp_path / "out", {"image": x, "label": labels, "seeds": seeds}, names, {}, None)
    assert written == ["seed_000007_label_1.png", "grid.png", "samples.npz"]
    stored = np.load(tmp_path / "out" / "samples.npz")
    assert np.array_equal(stored["samples"], to_uint8(x).numpy())
    assert stored["labels"].tolist() == [1, 2, 1]
    assert stored["seeds"].tolist() == [7, 8, 9]
    assert int(stored["rng_version"]) == 1
    one = np.asarray(PIL.Image.open(tmp_path / "out" / "seed_000008_label_2.png"))
    assert np.array_equal(one.transpose(2, 0, 1), stored["samples"][1])
    assert (tmp_path / "out" / "grid.png").exists()
    Vector().write(tmp_path / "vectors", {"vector": torch.randn(4, 2), "seeds": torch.arange(4)}, [], {}, None)
    assert np.load(tmp_path / "vectors" / "samples.npz")["samples"].dtype == np.float32


# MNIST and its kin


def test_validation_images_are_held_out_of_the_training_images():
    values, labels = np.arange(60, dtype=np.uint8)[:, None, None, None], np.arange(60) % 10
    splits = images.array_splits("image", (values, labels), (values[:7] + 100, labels[:7]), flip=False)
    seen = {
        name: ((split.batch(torch.arange(len(split)), None)["image"] + 1) * 127.5).round().flatten().tolist()
        for name, split in splits.items()
    }
    assert sorted(seen["train"] + seen["val"]) == list(range(60)) and len(seen["val"]) == 5
    assert seen["test"] == list(range(100, 107))


def test_mnist_reads_gzipped_files(shared):
    data = images.MNIST(str(shared("MNIST").parent), "image", [1, 28, 28], 10, 256, 8)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 55_000, "val": 5_000, "test": 10_000}
    batch = data.splits["test"].batch(torch.arange(4), None)
    assert batch["label"].tolist() == [7, 2, 1, 0]
    assert batch["image"].shape == (4, 1, 28, 28)
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)


@pytest.mark.parametrize("kind", [images.MNIST, images.FashionMNIST, images.CIFAR10])
def test_absent_data_is_one_sentence_and_leaves_no_folders(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match=r"set data\.root to the folder that holds it") as error:
        kind(str(tmp_path / "data"), "image", [1, 28, 28], 10, 256, 8)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bgarbage")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05\1\2")
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        images.MNIST(str(tmp_path), "image", [1, 28, 28], 10, 256, 8)


# Image folders


def write_images(root, sizes, mode="RGB", classes=("a", "b")):
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate(sizes):
        path = root / classes[i % len(classes)] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (h, w, 3) if mode == "RGB" else (h, w)
        PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)


def everything(data):
    return {k: s.batch(torch.arange(len(s)), None) for k, s in data.splits.items()}


def test_a_folder_and_a_zip_of_it_are_the_same(tmp_path):
    write_images(tmp_path / "x", [(6, 10)] * 24, "L")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted((tmp_path / "x").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path))
    one, two = folder(tmp_path / "x"), folder(tmp_path / "x.zip")
    assert one.shape == two.shape == [1, 6, 10]
    assert one.class_names == two.class_names == ["a", "b"]
    a, b = everything(one), everything(two)
    assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])
    assert sum(len(s) for s in one.splits.values()) == 24
    two.num_workers = 2
    assert same(take(one, 4), take(two, 4))


def test_pixels_are_the_files(tmp_path):
    write_images(tmp_path, [(5, 7)] * 12)
    data = folder(tmp_path)
    batch = data.splits["train"].batch(torch.tensor([3]), None)
    expected = np.asarray(PIL.Image.open(tmp_path / data.splits["train"].names[3]))
    assert np.array_equal(to_uint8(batch["image"])[0].permute(1, 2, 0).numpy(), expected)


def test_sizes_are_brought_together_or_the_odd_one_is_named(tmp_path):
    write_images(tmp_path, [(8, 8)] * 12 + [(8, 9)])
    with pytest.raises(UserError, match=r"a/012\.png is 8x9 .*set data\.size=\[height,width\]"):
        folder(tmp_path)
    assert folder(tmp_path, size=[4, 6]).shape == [3, 4, 6]
    assert folder(tmp_path, size=[4, 6], channels=1, crop="none").shape == [1, 4, 6]


def test_random_crops_depend_on_draws_only(tmp_path):
    write_images(tmp_path, [(8, 16)] * 24)
    split = folder(tmp_path, size=[4, 4], crop="random", flip=True).splits["train"]
    index, draws = torch.tensor([0, 0, 0]), torch.tensor([[0.9, 0.0, 0, 0], [0.9, 1.0, 0, 0], [0.1, 0.0, 0, 0]])
    x = split.batch(index, draws)["image"]
    assert torch.equal(x, split.batch(index, draws)["image"])
    assert not torch.equal(x[0], x[1])
    assert torch.equal(x[2], x[0].flip(-1))
    still = split.batch(index, None)["image"]
    assert torch.equal(still[0], still[2])
    assert crop_box(16, 8, 1.0, 0.5, 0.5) == (4, 0, 12, 8)


def test_junk_is_skipped_with_a_count_up_to_one_percent(tmp_path, capsys):
    write_images(tmp_path, [(4, 4)] * 120)
    (tmp_path / "a" / "notes.doc").write_text("hello")
    (tmp_path / ".DS_Store").write_text("hidden")
    assert sum(len(s) for s in folder(tmp_path).splits.values()) == 120
    assert "skipped 1 of 121 files" in (printed := capsys.readouterr().err)
    assert "notes.doc" in printed
    (tmp_path / "b" / "more.doc").write_text("hello")
    with pytest.raises(UserError, match=r"2 of the 122 files .* more than 1 %"):
        folder(tmp_path)


def test_truncated_images_are_named_when_they_are_read(tmp_path):
    write_images(tmp_path, [(32, 32)] * 12)
    data = folder(tmp_path)
    for name in data.splits["train"].names[:2]:
        path = tmp_path / str(name)
        path.write_bytes(path.read_bytes()[:400])
    for workers in (0, 2):
        data.num_workers = workers
        with pytest.raises(UserError, match=r"\d\.png is cut short \(and 1 more\): repair or") as error:
            take(data, 30)
        assert "\n" not in str(error.value)


def test_folders_that_make_no_sense(tmp_path):
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "split" / "train", [(4, 4)] * 4)
    write_images(tmp_path / "split" / "test", [(4, 4)] * 2, classes=("zebra",))
    for root, message in {"empty": "holds no images", "missing": "neither a folder", "split": "zebra"}.items():
        with pytest.raises(UserError, match=message):
            folder(tmp_path / root)


def test_split_folders_are_the_splits(tmp_path):
    for name, n in (("train", 24), ("test", 6)):
        write_images(tmp_path / "inner" / name, [(4, 4)] * n)
    data = folder(tmp_path)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 22, "val": 2, "test": 6}


def test_cifar10_subset_trains_from_its_zip(shared):
    data = folder(shared("cifar10-subset.zip"), flip=True)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 9167, "val": 833, "test": 2000}
    assert data.shape == [3, 32, 32]
    assert data.classes == 10
    labels = data.splits["val"].batch(torch.arange(50), None)["label"]
    assert len(labels.unique()) > 5  # evaluation's first items are not of one class


def test_celeba_reads_torchvisions_tree(tmp_path, monkeypatch):
    base = tmp_path / "celeba"
    write_images(base, [(218, 178)] * 6, classes=("img_align_celeba",))
    names = [f"{i:03d}.png" for i in range(6)]
    (base / "list_eval_partition.txt").write_text("".join(f"{n} {i // 2}\n" for i, n in enumerate(names)))
    (base / "identity_CelebA.txt").write_text("".join(f"{n} 1\n" for n in names))
    for kind in ("bbox", "landmarks_align", "attr"):
        file = base / ("list_bbox_celeba.txt" if kind == "bbox" else f"list_{kind}_celeba.txt")
        file.write_text("6\nfirst\n" + "".join(f"{n} 1\n" for n in names))
    monkeypatch.setattr("torchvision.datasets.CelebA._check_integrity", lambda self: True)
    data = CelebA(str(tmp_path), [8, 8], True, "image", [3, 8, 8], None, 256, 2)
    assert {k: len(s) for k, s in data.splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert data.splits["test"].batch(torch.arange(2), None)["image"].shape == (2, 3, 8, 8)


# Points


@pytest.mark.parametrize("name", toy2d.SHAPES)
def test_points_fill_the_plane_and_repeat(name):
    make = lambda: toy2d.Toy2D(name, 5000, "vector", [2], None, None, 8).splits["train"].values  # noqa: E731
    x = make()
    assert torch.equal(x, make())
    assert x.shape == (5000, 2)
    assert x.abs().max() < 4
    assert x.std(0).min() > 0.4


def test_checkerboard_is_dark_squares_only():
    x = toy2d.checkerboard(5000, np.random.default_rng(1))
    assert ((np.floor(x[:, 0]) + np.floor(x[:, 1])) % 2 == 0).all() or ((np.floor(x).sum(1)) % 2 == 1).all()


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_name_exactly_the_arguments(path):
    """Built where the data is at hand; otherwise bound, so that a misspelt key fails all the same."""
    import inspect

    from hydra.utils import get_object

    node = OmegaConf.load(path)
    arguments = {k: v for k, v in node.items() if k != "_target_"}
    target = get_object(node._target_)
    bound = inspect.signature(target).bind(**arguments).arguments
    facts = bound.pop("facts", {})  # what a kind of text passes on
    if facts:
        inspect.signature(get_type_hints(target)["return"]).bind_partial(**facts)
    assert {*bound, *facts} == set(arguments)
    if path.stem in ("digits", "toy2d"):
        data = instantiate(node)
        assert data.shape == list(node.shape)
        assert data.splits["train"].batch(torch.arange(2), None)[node.field].shape == (2, *node.shape)


@pytest.mark.parametrize("kind", ["zip", "folder", "greyscale and not square"])
def test_image_folders_train_sample_and_name_their_classes(kind, tmp_path, shared):
    import genai
    from genai.cli import compose_config
    from genai.train.run import run

    root = tmp_path / "images"
    if kind == "greyscale and not square":
        write_images(root, [(12, 20)] * 30, "L")
        shape, name = (1, 12, 20), "b"
    else:
        root, shape, name = shared("cifar10-subset.zip"), (3, 32, 32), "frog"
        if kind == "folder":
            with zipfile.ZipFile(root) as archive:
                archive.extractall(tmp_path / "unzipped")
            root = tmp_path / "unzipped"
    small = ["debug=true", "model.net.channels=8", "sampler.steps=2", "data.num_workers=0"]
    folder_ = run(
        compose_config("train", [*small, "data=image_folder", f"data.root={root}", f"run_dir={tmp_path / 'run'}"])
    )
    batch = genai.sample(genai.load(folder_), n=2, label=name)
    assert batch["image"].shape == (2, *shape)


def test_bit_rot_inside_a_gzipped_file_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 99, 9 * 784, dtype=np.uint8).tobytes()
    good = gzip.compress(b"\0\0\x08\x03\0\0\0\x09\0\0\0\x1c\0\0\0\x1c" + pixels)
    rotten = good[:40] + bytes(255 - b for b in good[40:80]) + good[80:]  # zlib is who complains
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(rotten)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        images.MNIST(str(tmp_path), "image", [1, 28, 28], 10, 256, 8)


def test_a_download_that_fails_without_a_word_leaves_no_folders_above_root(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(TimeoutError()))
    with pytest.raises(UserError, match=r"\(TimeoutError\).*set data\.root"):
        images.CIFAR10(str(tmp_path / "a" / "b"), "image", [3, 32, 32], 10, 256, 8)
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48) * 21
    for i in range(12):
        PIL.Image.fromarray(deep).save(tmp_path / f"{i:02d}.png")
    data = folder(tmp_path)
    batch = data.splits["train"].batch(torch.tensor([0]), None)
    assert (data.shape, data.classes, list(batch)) == ([1, 64, 48], None, ["image"])  # files in the root: no labels
    assert np.array_equal(to_uint8(batch["image"])[0, 0].numpy(), deep >> 8)


def test_sideways_photographs_are_put_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for i in range(12):
        PIL.Image.new("RGB", (40, 20), "red").save(tmp_path / f"{i:02d}.jpg", exif=exif)
    data = folder(tmp_path)
    assert data.shape == [3, 40, 20]
    assert everything(data)["test"]["image"].shape == (1, 3, 40, 20)
