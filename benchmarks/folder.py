"""Images a second from a folder of photographs.

    python -m benchmarks.folder [--photos 4] [--rounds 7] [--files 2000]

Photographs of 12 megapixels are synthesised: smooth colours with grain, as JPEGs of quality 90 with chroma at half the size.
Each round draws all of them once, decoded, cropped in the middle and resized to a square, by `data=image_folder`, by the same
with `data.version=1`, which decodes them at full size as earlier versions did, and by torchvision's ImageFolder with its usual
Resize and CenterCrop. A start is `ImageFolder(...)` over small files: the first one reads every header, a second one finds the
scan in the cache, and torchvision's reads no header. Targets: 3 times torchvision's images/s at 64x64, and at most 50 us a file
at a second start.
"""

import argparse
import contextlib
import io
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from benchmarks.common import interleave, parse, ratio, report, setup, spread
from genai.checkpoint.build import build_typed
from genai.core.cache import cache_folder
from genai.data import fingerprint

CONF = Path(__file__).parents[1] / "conf" / "data" / "image_folder.yaml"


def photograph(path: Path, height: int, width: int, seed: int) -> None:
    """Write a JPEG with large and small structures and sensor noise."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((6, 90), (60, 40), (600, 15)):
        coarse = rng.uniform(0, 255, (max(height * cells // width, 1), cells, 3)).astype(np.uint8)
        part = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture += strength / 127.5 * (np.asarray(part, np.float32) - 127.5)
    picture += 4 * rng.standard_normal((height, width, 1), np.float32) + 127.5
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def ours(root: Path, side: int, **arguments: Any) -> Any:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF))
    with contextlib.redirect_stderr(io.StringIO()):
        return build_typed({**node, "root": str(root), "size": [side, side], "flip": False, **arguments})


def theirs(root: Path, side: int) -> Any:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    return ImageFolder(str(root), Compose([Resize(side), CenterCrop(side), PILToTensor()]))


def draw(data: Any) -> None:
    """Draw all photographs once."""
    for part in data.splits.values():
        part.batch(torch.arange(len(part)), None)


def draw_theirs(data: Any) -> None:
    torch.stack([data[i][0] for i in range(len(data))]).float()


def speed(root: Path, side: int, photos: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    cases = {
        "genai": partial(draw, ours(root, side)),
        "genai, decoded at full size": partial(draw, ours(root, side, version=1)),
        "torchvision": partial(draw_theirs, theirs(root, side)),
    }
    seconds = interleave(cases, rounds, 1, device)
    return [
        {
            "measure": f"images/s at {side}x{side}",
            "system": name,
            "value": spread([photos / value for value in values], 1, 2),
            "speedup of genai": ratio(values, seconds["genai"]),
        }
        for name, values in seconds.items()
    ]


def start(root: Path, files: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    def forgotten() -> None:
        for path in cache_folder("scans").glob("*"):
            path.unlink()
        ours(root, 16)  # which leaves its scan in the cache for the next case

    cases = {
        "genai, first start": forgotten,
        "genai, second start": partial(ours, root, 16),
        "torchvision": partial(theirs, root, 16),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, values in interleave(cases, 1, 1, device, warmup=0).items():
            seconds[name] += values
    return [
        {
            "measure": "us a file at a start",
            "system": name,
            "value": spread(values, 1e6 / files, 1),
            "speedup of genai": ratio(values, seconds["genai, second start"]),
        }
        for name, values in seconds.items()
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--height", type=int, default=3000)
    return parse(parser, rounds=1, files=20, height=300)


def main() -> None:
    args = arguments()
    setup()
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        fingerprint.RACY_NS = -1  # the files were written a moment ago
        photos, small = Path(folder) / "photos", Path(folder) / "small"
        for i in range(args.photos):
            photograph(photos / "phone" / f"{i:03d}.jpg", args.height, args.height * 4 // 3, i)
        for i in range(args.files):
            photograph(small / "ab"[i % 2] / f"{i:05d}.jpg", 24, 32, i)
        size = sum(path.stat().st_size for path in photos.rglob("*.jpg")) / args.photos
        rows = [row for side in (64, 256) for row in speed(photos, side, args.photos, args.rounds, device)]
        rows += start(small, args.files, args.rounds, device)
    about = f"{args.height * 4 // 3} x {args.height}, {size / 1e6:.1f} MB each"
    report("folder", args, device, rows, ("measure", "system"), photographs=about, files=args.files, rounds=args.rounds)


if __name__ == "__main__":
    main()
