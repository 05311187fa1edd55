"""Images from captions, and completed from their upper halves.

    python -m benchmarks.completion <run> <run> --guidance 1.5 2 [--root data] [--n 1000] [--split val]

For each run of a recipe with data=mnist_text, at its own guidance weight: accuracy, recall and Fréchet distance of n samples, as
in the benchmark of guidance, and the seconds that they take, in rounds of all runs in turn. Then n images of the split are
completed from their upper halves, with and without their captions, and the classifier says in how many it recognises their
digit. The baseline pastes the lower half of the training image whose upper half is nearest, of any digit, or of the one in
the caption. The last rows are n other images of the split, as the first stage of the first run reconstructs them and as they
are. Only the test split is recorded.
"""

import argparse

import torch
from torch import Tensor

import genai
from benchmarks.common import interleave, parse, report, setup, spread
from benchmarks.guidance import figures, images_of, prompts
from genai import checkpoint
from genai.data.stream import batches
from genai.evaluation.classifier import load_or_train
from genai.metrics.memorisation import nearest_neighbours


def fill(images: Tensor, train: Tensor) -> Tensor:
    """Images (n, C, H, W) with the lower half of the training image (N, C, H, W) whose upper half is nearest."""
    half = images.shape[2] // 2
    _, nearest = nearest_neighbours(images[:, :, :half], train[:, :, :half])
    return torch.cat([images[:, :, :half], train[nearest, :, half:]], 2)


def fill_each(images: Tensor, label: Tensor, train: Tensor, labels: Tensor) -> Tensor:
    """As `fill`, from training images of the same class alone."""
    filled = torch.empty_like(images)
    for k in label.unique():
        filled[label == k] = fill(images[label == k], train[labels == k])
    return filled


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="of each run, or of all")
    parser.add_argument("--root", help="folder of the data, if not where the runs had it")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    args = parse(parser, n=20, rounds=1)
    if len(args.guidance) not in (1, len(args.run)):
        parser.error(f"--guidance has {len(args.guidance)} weights for {len(args.run)} runs: give one, or one for each")
    return args


def main() -> None:
    args = arguments()
    device, runs = setup(), [genai.load(run) for run in args.run]
    weights = args.guidance * (len(runs) // len(args.guidance))
    data = images_of(runs[0], args.root)
    classifier, captions = load_or_train(data), prompts(runs[0])
    batch = next(batches(data.splits[args.split], 2 * args.n, 2 * args.n))
    (real, others), (label, theirs) = (batch[name].split(args.n) for name in ("image", "label"))
    lower = torch.zeros(real.shape[1:])
    lower[:, lower.shape[1] // 2 :] = 1

    def accuracy(x: Tensor) -> float:
        return round((classifier(x).argmax(1) == label).double().mean().item(), 4)

    made: dict[str, Tensor] = {}

    def draw(name: str, run: checkpoint.Loaded, w: float) -> None:
        made[name] = genai.sample(run, n=args.n, prompt=captions, guidance=w)["image"]

    named = {run.config["name"]: (run, w) for run, w in zip(runs, weights, strict=True)}
    seconds = interleave(
        {name: lambda name=name, of=of: draw(name, *of) for name, of in named.items()}, args.rounds, 1, device, 0
    )
    rows = []
    for name, (run, w) in named.items():
        row = {"images": name, "guidance": w}
        row |= figures(classifier, real, made[name], torch.arange(args.n) % len(captions))
        row[f"seconds for {args.n:,}"] = spread(seconds[name], 1, 1)
        for column, given in ("completed", [captions[k] for k in label]), ("completed, no caption", None):
            x = genai.sample(run, n=args.n, prompt=given, guidance=w if given else 1, image=real, mask=lower)["image"]
            row[column] = accuracy(x)
        rows.append(row)
        print(row, flush=True)
    train = [(batch["image"], batch["label"]) for batch in batches(data.splits["train"], 5000)]
    images, labels = (torch.cat(part) for part in zip(*train, strict=True))
    empty = dict.fromkeys(rows[0], None)
    filled = accuracy(fill_each(real, label, images, labels)), accuracy(fill(real, images))
    rows.append({**empty, "images": "nearest training image", **dict(zip(list(empty)[-2:], filled, strict=True))})
    for name, x in ("others, reconstructed", runs[0].model.codec.reconstruct({"image": others})), ("others", others):
        rows.append({**empty, "images": name, **figures(classifier, real, x, theirs)})
    if args.split == "test":
        report(
            "completion",
            args,
            device,
            rows,
            n=args.n,
            training_steps=", ".join(f"{run.step:,} of {name}" for name, (run, _) in named.items()),
        )
    else:
        print(*rows[-3:], sep="\n")


if __name__ == "__main__":
    main()
