"""Effect of classifier-free guidance.

    pip install -e ".[notebooks]"
    python -m benchmarks.guidance <run of experiment=latent_mnist_text> [--root data] [--n 1000] [--guidance 1 1.5 2 3 4 6 8]
    python -m benchmarks.guidance <run> --split val       # to choose a weight

Accuracy of the requested digit, and recall, are measured at each guidance weight. Prompts name the ten digits in turn. Accuracy
is that of a small convolutional classifier trained on MNIST; recall is the share of n real images of the split that lie among
the samples, within the distance of a sample to its third neighbour, in the classifier's last hidden layer (Kynkäänniemi et al.,
2019, eq. 2). Only the test split is recorded; it also draws docs/guidance.png.
"""

import argparse

import torch

import genai
from benchmarks.common import ROOT, parse, report, setup
from genai import checkpoint
from genai.checkpoint.build import build_typed
from genai.data.stream import batches
from genai.evaluation.classifier import Classifier, load_or_train
from genai.metrics.manifold import precision_recall


def plot(rows: list[dict], floor: float) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    w = [row["guidance"] for row in rows]
    axes.plot(w, [row["accuracy"] for row in rows], "o-", label="accuracy of the requested digit")
    axes.plot(w, [row["recall"] for row in rows], "s-", label="recall")
    axes.axhline(floor, color="grey", linestyle=":", label="recall of other real images")
    axes.set(xlabel="guidance", ylim=(None, 1.01))
    axes.legend()
    figure.savefig(ROOT / "docs" / "guidance.png", dpi=110)


@torch.inference_mode()
def measure(
    loaded: checkpoint.Loaded, classifier: Classifier, real: torch.Tensor, n: int, guidance: list[float]
) -> list[dict]:
    names, rows = loaded.config["data"]["names"], []
    wanted = torch.arange(n) % len(names)
    prompts = [f"a handwritten {name}" for name in names]
    for w in guidance:
        x = genai.sample(loaded, n=n, prompt=prompts, guidance=w)["image"]
        accuracy = (classifier(x).argmax(1) == wanted).double().mean().item()
        covered = precision_recall(classifier.features(real), classifier.features(x)).recall
        rows.append({"guidance": w, "accuracy": round(accuracy, 4), "recall": round(covered, 4)})
        print(rows[-1], flush=True)
    return rows


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
    device = setup()
    loaded = genai.load(args.run)
    node = loaded.config["data"]["images"]
    data = build_typed({**node, "root": args.root or node["root"]})
    classifier, images = load_or_train(data), next(batches(data.splits[args.split], 2 * args.n, 2 * args.n))["image"]
    real, right = images[: args.n], classifier.accuracy(data, args.split)
    floor = precision_recall(classifier.features(real), classifier.features(images[args.n :])).recall
    print(
        f"classifier: {right:.4f} on {args.split} images; recall of {args.n} real images by {args.n} others {floor:.4f}"
    )
    rows = measure(loaded, classifier, real, args.n, args.guidance)
    if args.split == "test":
        facts = {"n": args.n, "sampler": loaded.config["sampler"], "step": loaded.step}
        facts |= {"classifier_accuracy": round(right, 4), "recall_of_real_images": round(floor, 4)}
        report("guidance", args, device, rows, **facts)
        if not args.toy:
            plot(rows, floor)


if __name__ == "__main__":
    main()
