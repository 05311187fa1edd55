"""Words, images and sound from each other: accuracy of every direction, with nearest neighbours of the training split.

    python -m benchmarks.media <run of digits_trio or contrastive_trio> [...] [--guidance 1 1.5 2]
    python -m benchmarks.media <run> --split val       # to choose a weight

Each run is measured on its own split, which data.audio.held_out makes the recordings of one speaker. A word is right if it is the
class's name, letter by letter; an image or sound if a classifier of all data says its class. The classifier of images is trained
on the training images, that of sounds on the training takes of all speakers. Words are drawn with temperature 0. A
model=contrastive chooses among the ten words, or among the images or recordings of the split, and is right where what it chooses
is of the class. A nearest neighbour is the training image of least squared distance, and the training recording of least squared
distance of log-mel spectrograms, each less its own mean, over shifts in time; its class is the guess.
"""

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor

import genai
from benchmarks.common import parse, report, setup
from genai.checkpoint import Loaded
from genai.checkpoint.build import build_typed
from genai.core import rng
from genai.data.base import Data, first_items
from genai.data.stream import batches
from genai.evaluation.classifier import Classifier, load_or_train
from genai.modalities.caption import encode
from genai.models.autoregressive.media import sample
from genai.models.contrastive.pairs import Contrastive

SHIFTS = range(-12, 13, 3)  # frames between two spectrograms


def whole(data: Data, split: str, n: int) -> dict[str, Tensor]:
    """The first n items of a split, or all if there are fewer."""
    return next(batches(first_items(data, split, n), n, n))


def nearest(x: Tensor, train: Tensor) -> Tensor:
    """The index of the training map nearest to each of x (n, C, H, W)."""
    x, train = x.flatten(1), train.flatten(1)
    return (train.square().sum(1) - 2 * x @ train.T).argmin(1)


def nearest_sound(x: Tensor, train: Tensor) -> Tensor:
    """The index of the training spectrogram nearest to each of x (n, 1, mels, frames), at the best shift in time."""
    x, train = (m - m.mean((1, 2, 3), keepdim=True) for m in (x, train))
    shifted = torch.cat([train.roll(k, 3) for k in SHIFTS])
    return nearest(x, shifted) % len(train)


class Recogniser:
    """Recognises the class of words, images and sounds.

    Args:
        words: int64 (classes, length), the words as captions.
        images, sounds: classifiers, and `maps` of sounds.
    """

    def __init__(self, words: Tensor, images: Classifier, sounds: Classifier, audio: Data):
        self.words, self.images, self.sounds, self.audio = words, images, sounds, audio

    def right(self, made: dict[str, Tensor], label: Tensor) -> float:
        """The share of samples that are of their class."""
        found = {
            "caption": lambda x: (x == self.words[label]).all(1),
            "image": lambda x: self.images(x).argmax(1) == label,
            "audio": lambda x: self.sounds(self.audio.modality.maps(x)).argmax(1) == label,
        }
        field = next(name for name in found if name in made)
        return round(found[field](made[field]).double().mean().item(), 4)


FIELDS = {"text": "caption", "image": "image", "audio": "audio"}
Items = dict[str, dict[str, Tensor]]


def sample_accuracy(model: Any, given: Items, recogniser: Recogniser, guidance: float) -> dict[str, Any]:
    """Accuracy of samples of every medium given each other."""
    found: dict[str, Any] = {"guidance": guidance}
    for source, target in itertools.permutations(model.media, 2):
        x, label = given[source][FIELDS[source]], given[source]["label"]
        temperature = 0.0 if target == "text" else 1.0
        seeds, cond = rng.seed_range(0, len(x)), {FIELDS[source]: x}
        made = sample(model, seeds, cond, to=target, guidance=guidance, temperature=temperature)
        found[f"{source}_to_{target}"] = recogniser.right(made, label)
    return found


def retrieval_accuracy(model: Any, given: Items) -> dict[str, float]:
    """Accuracy of the most similar item of every medium for each item of the others."""
    found, space = {}, {}
    for name, items in given.items():
        space[name] = model.embed_media({FIELDS[name]: items[FIELDS[name]]})[name]
    for source, target in itertools.permutations(space, 2):
        nearest_label = given[target]["label"][(space[source] @ space[target].T).argmax(1)]
        right = nearest_label == given[source]["label"]
        found[f"{source}_to_{target}"] = round(right.double().mean().item(), 4)
    return found


@torch.inference_mode()
def measure(run: Loaded, split: str, n: int, guidance: list[float]) -> list[dict[str, Any]]:
    """Accuracy of every direction, a row for each weight of guidance, and of nearest neighbours, real and coded items."""
    node = run.config["data"]
    data: Any = build_typed(node)
    everyone = build_typed({**node["audio"], "held_out": None})
    images, sounds = data.parts["image"], data.parts["audio"]
    words = encode(node["names"], node["length"], "data.length")
    recogniser = Recogniser(words, load_or_train(images), load_or_train(everyone), everyone)
    spoken = {"caption": words, "label": torch.arange(len(words))}
    given = {"text": spoken, "image": whole(images, split, n), "audio": whole(sounds, split, n)}
    about = {"run": run.config["name"], "held_out": node["audio"].get("held_out")}
    train, maps = (whole(images, "train", 10**9), whole(sounds, "train", 10**9)), sounds.modality.maps
    guesses = {
        "image": train[0]["label"][nearest(given["image"]["image"], train[0]["image"])],
        "audio": train[1]["label"][nearest_sound(maps(given["audio"]["audio"]), maps(train[1]["audio"]))],
    }
    others = {
        f"{name}_to_text": round((guess == given[name]["label"]).double().mean().item(), 4)
        for name, guess in guesses.items()
    }
    model: Any = run.model
    rows = [{**about, "run": "nearest neighbour", **others}]
    if isinstance(model, Contrastive):
        return [{**about, **retrieval_accuracy(model, given)}, *rows]
    coded = {}
    for name in ("image", "audio"):
        again = {name: model.media[name].codec.reconstruct(given[name])}
        coded[f"text_to_{name}"] = recogniser.right(again, given[name]["label"])
        others[f"text_to_{name}"] = recogniser.right(given[name], given[name]["label"])
    rows += [{**about, "run": "real items", **{k: v for k, v in others.items() if k.startswith("text")}}]
    rows += [{**about, "run": "real items, coded", **coded}]
    label = torch.arange(n) % len(words)
    given["text"] = {name: x[label] for name, x in spoken.items()}
    return [*({**about, **sample_accuracy(model, given, recogniser, w)} for w in guidance), *rows]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 1.5, 2, 3])
    return parse(parser, n=20, guidance=[1.0])


def main() -> None:
    args = arguments()
    device, rows = setup(), []
    for path in args.runs:
        run = genai.load(path)
        rows += measure(run, args.split, args.n, args.guidance)
        print(*rows, sep="\n", flush=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name) for name in columns} for row in rows]
    if args.split == "test":
        report("media", args, device, rows, ["run", "held_out", "guidance"], n=args.n)


if __name__ == "__main__":
    main()
