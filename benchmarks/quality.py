"""Fréchet distance of every sampler against the number of steps.

    pip install -e ".[notebooks]"
    python -m benchmarks.quality <run> [--n 1437] [--steps 5 10 20 50]

The samplers are those of conf/sampler. Each distance is that of 1,437 samples of one DDPM, the default run, to the 1,437
training and validation images, in the features of the classifier that metric cards use. Compare only figures with the same n,
for the distance has a bias. Seeds and guidance are those of sample.py. A solver's distance is shown once for each number of
steps; Heun's method and midpoint call the network twice a step. It also draws docs/quality.png.
"""

import argparse
import itertools
import pathlib
import sys
from typing import Any

import torch
from omegaconf import OmegaConf

import genai
from benchmarks.common import ROOT, parse, report, setup
from genai.checkpoint.build import build_typed
from genai.core.errors import UserError
from genai.data.images import Digits
from genai.evaluation.baselines.base import training_data
from genai.evaluation.features import FeatureSet, classifier
from genai.metrics.frechet import frechet
from genai.models.diffusion.process.paths import Path
from genai.models.diffusion.sampling.tables import Table, discretize


def plot(rows: dict[str, dict[int, float]], calls: dict[str, int], path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, row), marker in zip(rows.items(), itertools.cycle("osD^v<>pP*X"), strict=False):
        axes.plot([calls[name] * n for n in row], list(row.values()), f"{marker}-", label=name, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="Fréchet distance")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


SAMPLER = "genai.models.diffusion.sampling.samplers.sample"


def table_of(path: Path, node: dict[str, Any], steps: int) -> Table:
    """The table of coefficients that a sampler's config stands for."""
    keys = ("rho", "shift", "sigma_min", "sigma_max")
    visited = discretize(path, steps, node["spacing"] or path.spacing, **{key: node[key] for key in keys})
    return build_typed(node["solver"])(path, visited)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=1437)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    return parse(parser, n=32, steps=[5])


def main() -> None:
    args = arguments()
    setup()
    loaded, data = genai.load(args.run), Digits("image", [1, 8, 8], 10, 17, 64, 0)
    extractor = classifier(data, None, "cpu")
    real = FeatureSet(extractor, ()).add(training_data(data, ["train", "val"]).x).moments
    diffusion: Any = loaded.model
    rows: dict[str, dict[int, float]] = {}
    calls: dict[str, int] = {}
    distances: dict[str, float] = {}  # by table: two names may be one solver at the same times
    for path in sorted((ROOT / "conf" / "sampler").glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        if node["_target_"] != SAMPLER:
            continue
        calls[path.stem] = 2 if any(word in path.stem for word in ("heun", "midpoint")) else 1
        try:
            for steps in args.steps:
                table = repr(table_of(diffusion.path, node, steps))
                if table not in distances:
                    images = genai.sample(loaded, n=args.n, sampler={**node, "steps": steps})["image"]
                    fake = FeatureSet(extractor, ()).add(data.modality.quantize(images, data.levels)).moments
                    distances[table] = round(frechet(fake, real), 3)
                rows.setdefault(path.stem, {})[steps] = distances[table]
        except UserError as error:
            print(f"{path.stem}: {error}", file=sys.stderr)
    table = [
        {"sampler": name, "network calls a step": calls[name], **{f"{n} steps": value for n, value in row.items()}}
        for name, row in rows.items()
    ]
    facts = {"n": args.n, "metric": "frechet", "model": loaded.config["model"]["_target_"], "step": loaded.step}
    report("quality", args, torch.device("cpu"), table, **facts)
    if not args.toy:
        plot(rows, calls, ROOT / "docs" / "quality.png")


if __name__ == "__main__":
    main()
