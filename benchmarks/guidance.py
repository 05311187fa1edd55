"""Effect of classifier-free guidance.

    pip install -e ".[notebooks]"
    python -m benchmarks.guidance <run of a recipe with data=mnist_text> [--root data] [--n 1000] [--guidance 1 1.5 2 3 4 6 8]
    python -m benchmarks.guidance <run> --split val       # to choose a weight

Accuracy of the requested digit, recall, and Fréchet distance are measured at each guidance weight. Prompts name the ten digits
in turn. Accuracy is that of a small convolutional classifier trained on MNIST; recall is the share of n real images of the split
that lie among the samples, within the distance of a sample to its third neighbour, in the classifier's last hidden layer
(Kynkäänniemi et al., 2019, eq. 2), in which the Fréchet distance to these images is computed too. Only the test split is
recorded, under the name of the recipe, and drawn in docs.
"""

import argparse

import torch
from torch import Tensor

import genai
from benchmarks.common import ROOT, parse, report, setup
from genai import checkpoint
from genai.checkpoint.build import build_typed
from genai.data.base import Data
from genai.data.stream import batches
from genai.evaluation.classifier import Classifier, load_or_train
from genai.metrics.frechet import Moments, frechet
from genai.metrics.manifold import precision_recall


def images_of(run: checkpoint.Loaded, root: str | None) -> Data:
    """The images that a run's captions describe."""
    node = run.config["data"]["images"]
    return build_typed({**node, "root": root or node["root"]})


def prompts(run: checkpoint.Loaded) -> list[str]:
    """A caption of each class."""
    return [f"a handwritten {name}" for name in run.config["data"]["names"]]


@torch.inference_mode()
def figures(classifier: Classifier, real: Tensor, x: Tensor, label: Tensor) -> dict[str, float]:
    """Accuracy, recall and Fréchet distance of images x (n, C, H, W) of classes (n,), against real ones (n, C, H, W)."""
    own, theirs = classifier.features(x), classifier.features(real)
    found = {
        "accuracy": (classifier.head(own).argmax(1) == label).double().mean().item(),
        "recall": precision_recall(theirs, own).recall,
        "frechet": frechet(Moments().add(theirs), Moments().add(own)),
    }
    return {name: round(value, 4) for name, value in found.items()}


def plot(recipe: str, rows: list[dict], floor: float) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    w = [row["guidance"] for row in rows]
    axes.plot(w, [row["accuracy"] for row in rows], "o-", label="accuracy of the requested digit")
    axes.plot(w, [row["recall"] for row in rows], "s-", label="recall")
    axes.axhline(floor, color="grey", linestyle=":", label="recall of other real images")
    axes.set(xlabel="guidance", ylim=(None, 1.01))
    axes.legend()
    figure.savefig(ROOT / "docs" / f"guidance_{recipe}.png", dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--root", help="folder of the data, if not where the run had it")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 6, 8])
    return parse(parser, n=20, guidance=[1.0])


def main() -> None:
    args = arguments()
    device, run = setup(), genai.load(args.run)
    data = images_of(run, args.root)
    classifier, batch = load_or_train(data), next(batches(data.splits[args.split], 2 * args.n, 2 * args.n))
    (real, rest), right = batch["image"].split(args.n), round(classifier.accuracy(data, args.split), 4)
    others = figures(classifier, real, rest, batch["label"][args.n :])
    print(f"classifier: {right} on {args.split} images; {args.n} of them compared with {args.n} others: {others}")
    rows, captions = [], prompts(run)
    for w in args.guidance:
        x = genai.sample(run, n=args.n, prompt=captions, guidance=w)["image"]
        label = torch.arange(args.n) % len(captions)
        rows.append({"guidance": w, **figures(classifier, real, x, label)})
        print(rows[-1], flush=True)
    if args.split == "test":
        facts = {"n": args.n, "sampler": run.config["sampler"], "step": run.step}
        facts |= {"classifier_accuracy": right}
        facts |= {f"{name}_of_real_images": others[name] for name in ("recall", "frechet")}
        recipe = run.config["name"]
        report(f"guidance_{recipe}", args, device, rows, **facts)
        if not args.toy:
            plot(recipe, rows, others["recall"])


if __name__ == "__main__":
    main()
