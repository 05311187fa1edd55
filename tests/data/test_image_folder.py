"""Image folders as people have them: what is in them is found once, read as what it is, split soundly, and said."""

import errno
import shutil
import zipfile

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from genai.checkpoint.build import DATA, MODELS, build_stored, build_typed
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.data import fingerprint
from genai.data.fingerprint import checksum
from genai.data.stream import train_loader
from genai.modalities import decode
from genai.modalities.caption import Caption
from genai.modalities.image import to_uint8
from tests.conftest import ROOT

NEW = {"value_range", "background", "version"}


def node_of(root, name="image_folder", **arguments):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml"))
    return {**node, "root": str(root), "flip": False, "batch_size": 4, "num_workers": 0, **arguments}


def data_of(root, **arguments):
    return build_typed(node_of(root, **arguments))


def colours(seed, size=(8, 8), channels=3):
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, seed=None, pixels=None, **arguments):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours(seed) if pixels is None else pixels).save(path, **arguments)


def photos(folder, classes=("cat", "dog"), n=24, first=0):
    for i in range(n):
        save(folder / classes[i % len(classes)] / f"{i:03d}.png", first + i)
    return folder


def pixels_of(data, split="train"):
    """uint8 (N, C, H, W) of a split."""
    part = data.splits[split]
    return to_uint8(part.batch(torch.arange(len(part)), None)["image"])


def by_name(data):
    """name -> uint8 (H, W) or (H, W, C) of every image."""
    found = {}
    for part in data.splits.values():
        images = to_uint8(part.batch(torch.arange(len(part)), None)["image"]).permute(0, 2, 3, 1)
        found |= {str(name): image.squeeze(-1).numpy() for name, image in zip(part.names, images, strict=True)}
    return found


def lengths(data):
    return {name: len(part) for name, part in data.splits.items()}


def all_names(data):
    return sorted(str(name) for part in data.splits.values() for name in part.names)


# Splits


@pytest.mark.parametrize(
    "names",
    [
        "Training Testing",
        "training validation",
        "TRAIN TEST",
        "Train Val Test",
        "train valid test_images",
        "train-images dev",
        "train2017 val2017",
        "trainset eval",
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["splits", "classes first"])
def test_the_usual_names_of_splits_are_splits(tmp_path, capsys, names, nested):
    for i, name in enumerate(names.split()):
        photos(tmp_path / "in" / name, n=12 if i else 48, first=100 * i)
    if nested:
        for name in names.split():
            for label in ("cat", "dog"):
                (tmp_path / "nested" / label).mkdir(parents=True, exist_ok=True)
                (tmp_path / "in" / name / label).rename(tmp_path / "nested" / label / name)
        shutil.rmtree(tmp_path / "in")
    data = data_of(tmp_path)
    assert data.class_names == ["cat", "dog"]
    held = [name for name in all_names(data) if "trai" not in name.lower()]
    assert len(held) == 12 * (len(names.split()) - 1)
    assert not set(held) & set(data.splits["train"].names.tolist())
    assert min(lengths(data).values()) > 0
    printed = capsys.readouterr().err
    assert all(f"{name} as " in printed for name in names.split())


def test_folders_that_may_be_splits_or_not_are_refused_with_what_to_do(tmp_path):
    photos(tmp_path / "twice" / "train"), photos(tmp_path / "twice" / "Training")
    with pytest.raises(UserError, match=r"2 folders for the split train \(Training, train\): join them, or move"):
        data_of(tmp_path / "twice")
    photos(tmp_path / "mixed" / "Training"), photos(tmp_path / "mixed" / "more")
    with pytest.raises(UserError, match=r"folders named Training, but also more/cat/000\.png: .*rename the folder if"):
        data_of(tmp_path / "mixed")
    photos(tmp_path / "none" / "TEST"), photos(tmp_path / "none" / "more")
    with pytest.raises(UserError, match=r"folders named TEST, but also more"):
        data_of(tmp_path / "none")
    photos(tmp_path / "domains", classes=("trainA", "trainB", "testA", "testB"))
    with pytest.raises(
        UserError, match=r"folders named testA, trainA, which .* move them to test/A, train/A if they are spl"
    ):
        data_of(tmp_path / "domains")
    photos(
        tmp_path / "parts", classes=("invalid", "testers", "trainers", "valid")
    )  # where nothing is called training these are classes
    assert data_of(tmp_path / "parts").class_names == ["invalid", "testers", "trainers", "valid"]


def test_classes_are_split_in_proportion_and_those_without_training_images_named(tmp_path, capsys):
    for i in range(40):
        photos(tmp_path / "few", classes=(f"c{i:02d}",), n=1 + i % 2, first=10 * i)
    data = data_of(tmp_path / "few")
    assert set(data.splits["train"].labels.tolist()) == set(range(40))
    assert lengths(data) == {"train": 50, "val": 5, "test": 5}
    assert "no training file" not in capsys.readouterr().err
    for i in range(3):
        photos(tmp_path / "even", classes=(f"c{i}",), n=24 * (i + 1), first=1000 * i)
    even = data_of(tmp_path / "even")
    for part in (even.splits["val"], even.splits["test"]):
        counts = np.bincount(part.labels, minlength=3)
        assert (abs(counts - np.array([2, 4, 6])) <= 1).all() and counts.sum() == len(part)
        assert part.labels.tolist() != sorted(part.labels.tolist())  # the first of them stand for all
    for i in range(12):
        photos(tmp_path / "single", classes=(f"c{i:02d}",), n=1, first=10 * i)
    single = data_of(tmp_path / "single")
    gone = sorted({*range(12)} - {*single.splits["train"].labels.tolist()})
    assert f"2 of 12 classes have no training file (c{gone[0]:02d}, c{gone[1]:02d})" in capsys.readouterr().err
    assert not set(single.cond(30)["label"].tolist()) & set(gone)


# Files


def test_damaged_files_are_found_by_the_scan_and_skipped_by_their_names(tmp_path, capsys):
    photos(tmp_path, n=300)
    save(tmp_path / "cat" / "half.jpg", pixels=colours(1, (64, 64)))
    for name in ("half.jpg", "000.png"):
        path = tmp_path / "cat" / name
        path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "dog" / "empty.png").touch()
    data = data_of(tmp_path, size=[8, 8])
    assert all_names(data) == sorted(
        {f"{'cat' if i % 2 == 0 else 'dog'}/{i:03d}.png" for i in range(300)} - {"cat/000.png"}
    )
    printed = capsys.readouterr().err
    assert "skipped 3 of 302 files: cat/000.png is cut short (and 1 more), dog/empty.png is empty" in printed
    (tmp_path / "dog" / "a.doc").write_bytes(b"words")
    with pytest.raises(
        UserError,
        match=r"4 of the 303 files .* more than 1 %: .*dog/a\.doc is not an image that Pillow reads.*repair or remove",
    ):
        data_of(tmp_path, size=[8, 8])


def test_one_bad_file_stops_nothing_and_a_camera_may_add_to_a_file(tmp_path, capsys):
    for i in range(20):
        save(tmp_path / f"{i:02d}.jpg", pixels=colours(i, (32, 32)))
    with (tmp_path / "03.jpg").open("ab") as file:
        file.write(b"a film after the picture")
    (tmp_path / "04.jpg").write_bytes((tmp_path / "04.jpg").read_bytes()[:300])
    assert all_names(data_of(tmp_path)) == [f"{i:02d}.jpg" for i in range(20) if i != 4]
    assert "skipped 1 of 20 files: 04.jpg is cut short" in capsys.readouterr().err


def rot(path):
    """Damage the middle of a PNG, which no header shows."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_what_turns_out_damaged_when_drawn_is_replaced_by_the_next_for_everybody(tmp_path, capfd):
    photos(tmp_path, n=24)
    good = by_name(data_of(tmp_path))
    data = data_of(tmp_path)
    train = data.splits["train"]
    bad = [str(name) for name in train.names][5]
    rot(tmp_path / bad)
    capfd.readouterr()
    batch = train.batch(torch.tensor([4, 5, 6]), None)
    assert torch.equal(batch["image"][1], batch["image"][2]) and not torch.equal(batch["image"][0], batch["image"][1])
    assert batch["label"].tolist() == train.labels[[4, 6, 6]].tolist()
    assert np.array_equal(to_uint8(batch["image"])[1].permute(1, 2, 0), good[str(train.names[6])])
    printed = capfd.readouterr().err
    assert printed.count("skipped") == 1 and bad in printed and "is damaged" in printed
    streams = []
    for workers, size in ((0, 4), (2, 4), (0, 8)):
        fresh = data_of(tmp_path, num_workers=workers, batch_size=size)
        loader = iter(train_loader(fresh, 1, 0, 0))
        streams.append([batch for _ in range(12 * 4 // size) for batch in next(loader)])
    for name in ("image", "label"):
        one, two, three = (torch.cat([batch[name] for batch in stream]) for stream in streams)
        assert torch.equal(one, two) and torch.equal(one, three)
    rot(tmp_path / str(train.names[9]))
    with pytest.raises(UserError, match=r"2 of the 24 files .* cannot be used, which is more than 1 %.*is damaged"):
        train.batch(torch.arange(20), None)
    (tmp_path / str(data.splits["val"].names[0])).unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\): bring it back"):
        data.splits["val"].batch(torch.tensor([0]), None)


def test_captions_follow_the_image_that_is_shown(tmp_path):
    photos(tmp_path, classes=("x",), n=24)
    Caption(9).note(tmp_path, [f"x/{i:03d}" for i in range(24)], {"prompt": [str(i) for i in range(24)]})
    node = node_of(tmp_path, "captioned_folder")
    node = OmegaConf.to_container(
        OmegaConf.create({"data": {k: v for k, v in node.items() if k != "flip"}}), resolve=True
    )["data"]
    data = build_typed(node)
    train = data.splits["train"]
    names = [str(name) for name in train.split.names]
    rot(tmp_path / names[3])
    shown = train.batch(torch.tensor([3]), torch.zeros(1, 4))["caption"][0]
    assert bytes(i for i in shown.tolist() if i < 256).decode() == str(int(names[4][2:5]))


def test_litter_and_hidden_files_are_left_alone_and_counted(tmp_path, capsys):
    photos(tmp_path / "x", n=60)
    for name in ("Thumbs.db", "cat/desktop.ini", ".DS_Store", "cat/._000.png", "README.txt", "cat/000.txt", "notes.md"):
        (tmp_path / "x" / name).write_bytes(b"litter")
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        save(tmp_path / "x" / "dog" / name / "001.png", 1)
    data = data_of(tmp_path / "x")
    assert sum(lengths(data).values()) == 60 and data.class_names == ["cat", "dog"]
    printed = capsys.readouterr().err
    assert "skipped" not in printed and "ignored: 4 hidden, 3 of the system, 3 texts" in printed
    assert len(printed.splitlines()) == 2
    shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path, "x")
    assert sum(lengths(data_of(tmp_path / "x.zip")).values()) == 60


def test_a_large_image_is_read_and_one_that_is_too_large_is_called_so(tmp_path, monkeypatch, capsys):
    photos(tmp_path, n=20)
    save(tmp_path / "cat" / "poster.png", pixels=colours(0, (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # of which Pillow refuses the double
    assert "cat/poster.png" in all_names(data_of(tmp_path, size=[8, 8]))
    assert Image.MAX_IMAGE_PIXELS == 500
    assert "cat/poster.png" not in all_names(data_of(tmp_path, size=[8, 8], version=1))  # as runs from before did
    monkeypatch.setattr(decode, "MAX_PIXELS", 4000)
    assert "cat/poster.png" not in all_names(data_of(tmp_path, size=[8, 8]))
    assert "cat/poster.png has 64 x 64 pixels, and at most 4,000 are decoded" in capsys.readouterr().err


@pytest.mark.slow
def test_a_poster_of_14000_pixels_a_side_is_read(tmp_path):
    noise = Image.fromarray(colours(0, (1400, 1400))).resize((14000, 14000))
    noise.save(tmp_path / "poster.jpg", quality=90)
    for i in range(11):
        save(tmp_path / f"{i}.png", i)
    data = data_of(tmp_path, size=[8, 8])
    small = np.asarray(noise.resize((8, 8), Image.Resampling.LANCZOS)).astype(int)
    assert abs(by_name(data)["poster.jpg"] - small).max() < 4


def test_each_real_file_is_taken_once_whatever_links_say(tmp_path, capsys):
    root = tmp_path / "root"
    photos(root / "data", n=40)
    (root / "data" / "cat" / "up").symlink_to(root, target_is_directory=True)
    (root / "data" / "dog" / "above").symlink_to(tmp_path, target_is_directory=True)
    (root / "data" / "dog" / "again.png").symlink_to(root / "data" / "cat" / "000.png")
    (root / "data" / "dog" / "itself").symlink_to("itself")
    data = data_of(root)
    assert [name[-7:] for name in all_names(data)] == sorted(f"{i:03d}.png" for i in range(0, 40, 2)) + [
        f"{i:03d}.png" for i in range(1, 40, 2)
    ]
    printed = capsys.readouterr().err
    assert "ignored: 3 links to what is here already" in printed
    assert "data/dog/itself cannot be read (Too many levels of symbolic links)" in printed
    photos(tmp_path / "elsewhere", n=12, first=500)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(tmp_path / "elsewhere" / name, target_is_directory=True)
    assert sum(lengths(data_of(linked)).values()) == 12 and data_of(linked).class_names == ["cat", "dog"]


def test_exact_copies_across_splits_are_counted(tmp_path, capsys):
    photos(tmp_path / "train", n=24), photos(tmp_path / "test", n=8, first=100)
    assert not data_of(tmp_path).splits["val"].damaged and "exact copies" not in capsys.readouterr().err
    shutil.copy(tmp_path / "train" / "cat" / "000.png", tmp_path / "test" / "dog" / "same.png")
    data = data_of(tmp_path)
    printed = capsys.readouterr().err
    assert "1 are exact copies of images in another split" in printed and "test/dog/same.png" in printed
    shutil.make_archive(str(tmp_path / "z"), "zip", tmp_path, "train")
    with zipfile.ZipFile(tmp_path / "z.zip", "a") as archive:
        for path in (tmp_path / "test").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    assert lengths(data_of(tmp_path / "z.zip")) == lengths(data)
    assert "1 are exact copies" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spell", [lambda name: name.replace("/", "\\"), lambda name: f"./{name}"], ids=["windows", "tar"]
)
def test_a_zip_means_the_same_however_its_names_are_written(tmp_path, spell):
    photos(tmp_path / "x", n=24)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted((tmp_path / "x").rglob("*.png")):
            info = zipfile.ZipInfo("placeholder")
            info.filename = spell(path.relative_to(tmp_path).as_posix())
            archive.writestr(info, path.read_bytes())
        archive.writestr(spell("x/cat/"), b"")
    one, two = data_of(tmp_path / "x"), data_of(tmp_path / "x.zip")
    assert one.class_names == two.class_names == ["cat", "dog"] and lengths(one) == lengths(two)
    assert all(torch.equal(pixels_of(one, name), pixels_of(two, name)) for name in one.splits)


# Pixels


def deep(folder, top, kind=np.uint16, suffix=".png"):
    ramp = (np.arange(64).reshape(8, 8) * top / 63).astype(kind)
    for i in range(12):
        save(folder / f"{i:02d}{suffix}", pixels=ramp)
    return ramp


@pytest.mark.parametrize(
    "top, kind, white",
    [
        (4095, np.uint16, 4095),
        (255, np.uint16, 255),
        (65535, np.uint16, 65535),
        (3000, np.uint16, 4095),
        (1, np.float32, 1),
        (-500, np.int32, None),
        (7.5, np.float32, None),
        (0.5, np.float32, 1),
    ],
)
def test_more_than_eight_bits_fill_the_range_of_their_values(tmp_path, capsys, top, kind, white):
    ramp = deep(tmp_path, top, kind, ".png" if kind == np.uint16 else ".tiff").astype(float)
    low, high = (0, white) if white else (ramp.min(), ramp.max())
    data = data_of(tmp_path)
    expected = np.rint((ramp - low) / (high - low) * 255)
    assert data.shape == [1, 8, 8]
    assert np.array_equal(by_name(data)["00" + (".png" if kind == np.uint16 else ".tiff")], expected)
    assert f"12 of more than 8 bits: {low:g} is black and {high:g} white" in capsys.readouterr().err


def test_the_range_of_values_can_be_said(tmp_path):
    ramp = deep(tmp_path, 1000).astype(float)
    expected = np.clip(np.rint((ramp - 100) / 400 * 255), 0, 255)
    assert np.array_equal(by_name(data_of(tmp_path, value_range=[100, 500]))["00.png"], expected)
    with pytest.raises(UserError, match=r"data\.value_range=\[5, 5\] must be a smaller and a larger number"):
        data_of(tmp_path, value_range=[5, 5])
    photos(tmp_path / "eight")
    with pytest.raises(UserError, match=r"is for images of more than 8 bits, and there are none"):
        data_of(tmp_path / "eight", value_range=[0, 100])
    with pytest.raises(UserError, match=r"data\.background=glass is not a colour"):
        data_of(tmp_path, background="glass")


def test_the_range_of_values_of_a_run_is_part_of_its_items(tmp_path):
    deep(tmp_path, 1000)
    prints = {data_of(tmp_path, value_range=given).splits["train"].fingerprint(True) for given in (None, [0, 900])}
    assert len(prints) == 2


def test_transparent_pixels_are_the_background(tmp_path, capsys):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 0], clear[:, 4:, 3] = 200, 255  # red all over, the left half transparent
    half = clear.copy()
    half[:, :4, 3] = 128
    palette = Image.fromarray(clear[..., :3]).quantize(2)
    (tmp_path / "c").mkdir()
    for i in range(12):
        palette.save(tmp_path / "c" / f"p{i:02d}.png", transparency=0)
    save(tmp_path / "c" / "clear.png", pixels=clear)
    save(tmp_path / "c" / "half.webp", pixels=half, lossless=True, exact=True)
    save(tmp_path / "c" / "grey.png", pixels=clear[..., [0, 3]])
    found = by_name(data_of(tmp_path))
    assert "15 with transparency: laid on white (data.background)" in capsys.readouterr().err
    assert (found["c/clear.png"][:, :4] == 255).all() and (found["c/clear.png"][:, 4:] == [200, 0, 0]).all()
    assert abs(found["c/half.webp"][0, 0].astype(int) - [227, 127, 127]).max() <= 1
    assert (found["c/p00.png"] == 255).all()
    assert (found["c/grey.png"][0, 0] == 255).all() and (found["c/grey.png"][0, 7] == 200).all()
    black = by_name(data_of(tmp_path, background="#000000"))
    assert (black["c/clear.png"][:, :4] == 0).all()
    assert (by_name(data_of(tmp_path, background=None))["c/clear.png"] == [200, 0, 0]).all()


def test_pages_that_are_not_used_are_counted(tmp_path, capsys):
    photos(tmp_path, n=24)
    pages = [Image.fromarray(colours(i)) for i in range(5)]
    pages[0].save(tmp_path / "cat" / "pages.tiff", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "dog" / "film.gif", save_all=True, append_images=pages[1:3])
    data = data_of(tmp_path)
    assert "2 with more pages or frames (cat/pages.tiff): the first is used, 6 are not" in capsys.readouterr().err
    assert np.array_equal(by_name(data)["cat/pages.tiff"], colours(0))


def test_every_mode_and_every_way_to_hold_a_camera(tmp_path):
    plain = colours(3, (8, 12))
    upright = {f"{i}.{suffix}": plain for i in range(6) for suffix in ("png", "tiff")}
    (tmp_path / "x").mkdir()
    turned = {
        1: plain,
        3: plain[::-1, ::-1],
        6: np.rot90(plain, 1),
        8: np.rot90(plain, -1),
        5: plain.transpose(1, 0, 2),
    }
    for i, (orientation, stored) in enumerate(turned.items()):
        for suffix in ("png", "tiff"):
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x" / f"{i}.{suffix}", exif=exif)
    grey = colours(4, (8, 12), 1)
    bilevel = Image.fromarray(grey).convert("1")
    bilevel.save(tmp_path / "x" / "5.png")
    bilevel.save(tmp_path / "x" / "5.tiff")
    upright |= {f"5.{suffix}": np.asarray(bilevel.convert("RGB")) for suffix in ("png", "tiff")}
    cmyk = Image.fromarray(plain).convert("CMYK")
    cmyk.save(tmp_path / "x" / "cmyk.tiff")
    few = Image.fromarray(plain).quantize(16)
    few.save(tmp_path / "x" / "palette.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "x" / "deep.png")
    upright |= {"cmyk.tiff": plain, "palette.png": np.asarray(few.convert("RGB")), "deep.png": np.stack([grey] * 3, -1)}
    found = by_name(data_of(tmp_path / "x"))
    assert found.keys() == upright.keys()
    for name, expected in upright.items():
        assert np.array_equal(found[name], expected), name


def test_sixteen_bits_a_channel_are_scaled_with_their_range(tmp_path):
    """Written by hand, for Pillow writes no such PNG."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    x = (np.arange(192).reshape(8, 8, 3) * 4080 // 191).astype(">u2")
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in x))
    for i in range(12):
        (tmp_path / f"{i:02d}.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        )
    found = by_name(data_of(tmp_path))["00.png"].astype(int)
    assert abs(found - x.astype(int) * 255 / 4095).max() < 20 and found.max() > 230  # the upper 8 of 16 bits: 16 levels


# Speed


def photo(path, size=(600, 800), quality=90, **arguments):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = Image.fromarray(colours(sum(path.name.encode()), (size[0] // 40, size[1] // 40)))
    noise.resize(size[::-1], Image.Resampling.BICUBIC).save(path, quality=quality, **arguments)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, monkeypatch, channels):
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(12):
        photo(tmp_path / f"{i:02d}.jpg", exif=turned)
    decoded, real = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda *given: decoded.append(real(*given)) or decoded[-1])
    small, whole = (by_name(data_of(tmp_path, size=[32, 32], channels=channels, version=v))["00.jpg"] for v in (2, 1))
    assert {image.size for image, _ in decoded[:12]} == {(75, 100)}
    assert {image.size for image, _ in decoded[12:]} == {(600, 800)}
    assert abs(small.astype(int) - whole).mean() < 1.5
    decoded.clear()
    data_of(tmp_path, size=[256, 256], channels=channels).splits["test"].batch(torch.tensor([0]), None)
    assert [image.size for image, _ in decoded] == [(600, 800)]


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A cache of its own, and files that count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "RACY_NS", -1)


def test_headers_are_read_once_and_again_where_a_file_has_changed(tmp_path, settled, monkeypatch, capsys):
    root, opened, reads = photos(tmp_path / "x", n=24), [], decode.open_image
    deep(root / "cat", 4095)
    save(root / "dog" / "film.gif", 1)
    rot(root / "dog" / "001.png")
    monkeypatch.setattr(
        decode,
        "open_image",
        lambda file, where, *more, **how: opened.append(str(where)) or reads(file, where, *more, **how),
    )

    def scanned():
        opened.clear()
        data = data_of(root, channels=3)
        return all_names(data), capsys.readouterr().err, len(opened)

    first = scanned()
    assert first[2] == 24 + 12 + 1 + 12 and scanned() == (*first[:2], 0)  # those of more than 8 bits to measure them
    save(root / "dog" / "003.png", 999)
    assert scanned() == (*first[:2], 1)
    (kept,) = cache_folder("scans").iterdir()
    for content in (b"{", b'{"cat/00.png": 3}', kept.read_bytes()[:-9], kept.read_bytes().replace(b'"RGB"', b"7")):
        kept.write_bytes(content)
        names, printed, count = scanned()
        assert (names, count) == (first[0], first[2]) and printed == first[1]
    shutil.rmtree(cache_folder("scans"))
    cache_folder("scans").write_text("no folder")
    assert scanned() == first == scanned()


def test_a_file_that_could_not_be_read_once_is_read_again(tmp_path, settled, monkeypatch, capsys):
    """A disk that fails for a moment changes no stamp, and must not cost an image for ever."""
    root, opened = photos(tmp_path / "x"), decode.open_image
    unread = min(path for path in root.rglob("*") if path.is_file())

    def fail(file, where, *more, **how):
        if str(where) == str(unread):
            raise OSError(errno.EIO, "Input/output error")
        return opened(file, where, *more, **how)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "open_image", fail)
        fewer = all_names(data_of(root))
    assert "cannot be read (Input/output error)" in capsys.readouterr().err
    assert len(all_names(data_of(root))) == len(fewer) + 1 == 24


def test_what_has_just_changed_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "RACY_NS", 10**15)
    data_of(photos(tmp_path / "x"))
    assert not cache_folder("scans").exists()


# Runs from before


def test_a_run_from_before_keeps_its_items_its_splits_and_its_checksum(tmp_path):
    """The order of items, labels and checksums are those of the version that wrote such configs."""
    root = tmp_path / "old"
    for i in range(36):
        save(root / ("cat", "dog", "Training")[i % 3] / f"{i:02d}.bmp", pixels=np.full((4, 4, 3), 7 * i, np.uint8))
    (root / "zebra").symlink_to(root / "cat", target_is_directory=True)
    (root / "dog" / ".hidden.bmp").write_bytes(b"x")
    old = {name: value for name, value in node_of(root).items() if name not in NEW}
    data = build_stored(old, (), (MODELS, DATA))
    assert data.class_names == ["Training", "cat", "dog", "zebra"]
    assert lengths(data) == {"train": 40, "val": 4, "test": 4}
    order = [[str(name) for name in part.names] for part in data.splits.values()]
    prints = [part.fingerprint(quick) for part in data.splits.values() for quick in (True, False)]
    assert checksum(order) == "bf3c830d62eb4389" and checksum(prints) == "d7ec944db3493785"


def test_a_run_from_before_draws_its_old_pixels(tmp_path):
    root = tmp_path / "old"
    ramp = deep(root / "x", 4095)
    photo(root / "y" / "large.jpg")
    save(root / "y" / "clear.png", pixels=np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8))
    old = {name: value for name, value in node_of(root, size=[8, 8], channels=3).items() if name not in NEW}
    found = by_name(build_stored(old, (), (MODELS, DATA)))
    assert np.array_equal(found["x/00.png"], np.stack([ramp >> 8] * 3, -1))
    with Image.open(root / "y" / "large.jpg") as image:
        whole = image.resize((8, 8), Image.Resampling.LANCZOS, (100, 0, 700, 600))
    assert np.array_equal(found["y/large.jpg"], np.asarray(whole))
    with Image.open(root / "y" / "clear.png") as image:
        assert np.array_equal(found["y/clear.png"], np.asarray(image)[..., :3])
