"""Data files that unpack to far more than their size are refused before they take memory or time."""

import gzip
import re
import zipfile
import zlib

import pytest

from tests.conftest import python


def flat_png(side):
    """A PNG of side x side pixels of one colour, and its bytes: 3 side^2 of pixels in a thousandth of that."""
    import struct

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row, packer = b"\0" * (1 + 3 * side), zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def refused_cheaply(tmp_path, expression):
    """The sentence with which `expression` is refused in a process of its own, within 500 MB above its imports and 5 s."""
    script = f"""
import resource, time
from genai.core.errors import UserError
from genai.data.image_folder import ImageFolder
from genai.data.images import MNIST
facts = dict(field="image", shape=None, classes=None, levels=256, batch_size=2)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    data = {expression}
    data.splits["train"].batch(__import__("torch").arange(len(data.splits["train"])), None)
except UserError as error:
    print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - start)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    sentence, figures = done.stdout.splitlines()
    kilobytes, seconds = map(float, figures.split())
    assert kilobytes < 500_000 and seconds < 5, figures
    return sentence


@pytest.mark.parametrize("zipped", [True, False])
def test_an_image_of_too_many_pixels_is_refused(tmp_path, zipped):
    bomb = flat_png(13_000)  # 507 MB of pixels in half a megabyte, below Pillow's own limit
    folder = tmp_path / "images"
    folder.mkdir()
    if zipped:
        with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(30):
                archive.writestr(f"{i}.png", bomb)
    else:
        (folder / "x.png").write_bytes(bomb)
    root = folder / "x.zip" if zipped else folder
    sentence = refused_cheaply(
        tmp_path, f"ImageFolder(root={str(root)!r}, size=[8, 8], channels=3, crop='center', flip=False, **facts)"
    )
    assert re.search(r"png has 13000 x 13000 pixels in a file of [\d,]+ bytes, which no photograph has", sentence)


def test_a_zip_member_that_unpacks_to_gigabytes_is_refused(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.bmp", "w") as file,
    ):
        for _ in range(600):
            file.write(bytes(2**20))
    sentence = refused_cheaply(
        tmp_path,
        f"ImageFolder(root={str(tmp_path / 'x.zip')!r}, size=[8, 8], channels=3, crop='center', flip=False, **facts)",
    )
    assert "a.bmp unpacks from" in sentence and "bytes, which no image does" in sentence


def test_a_packed_data_set_that_unpacks_to_gigabytes_is_refused(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        with gzip.open(raw / f"{name}-ubyte.gz", "wb", 1) as file:
            for _ in range(600 if name.startswith("train-images") else 1):
                file.write(bytes(2**20))
    sentence = refused_cheaply(tmp_path, f"MNIST(root={str(tmp_path)!r}, **facts)")
    assert "is damaged (it unpacks to over 100,000,000 bytes)" in sentence


def test_large_pictures_are_read(tmp_path):
    """A file of many pixels that is not a bomb: what a camera makes, as noisy as it is."""
    import numpy as np
    from PIL import Image

    from genai.data.image_folder import ImageFolder

    noise = np.random.default_rng(0).integers(0, 255, (500, 600, 3), np.uint8)
    picture = Image.fromarray(noise).resize((4200, 3500))
    for i in range(3):
        picture.save(tmp_path / f"{i}.jpg", quality=90)
    data = ImageFolder(str(tmp_path), [8, 8], 3, "center", False, "image", None, None, 256, 1)
    assert data.items("train", __import__("torch").tensor([0])).shape == (1, 3, 8, 8)
