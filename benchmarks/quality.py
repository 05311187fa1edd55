"""Fréchet distance of every sampler against the number of steps.

    pip install -e ".[notebooks]"
    python -m benchmarks.quality <run> [--n 1437] [--steps 5 10 20 50]
    python -m benchmarks.quality          # only draw docs/quality.png again, from the record

The samplers are those of conf/sampler. Each distance is that of 1,437 samples of one DDPM, the default run, to the 1,437
training and validation images, in the features of the classifier that metric cards use. Compare only figures with the same n,
for the distance has a bias. Seeds and guidance are those of sample.py. A solver's distance is shown once for each number of
steps; Heun's method and midpoint call the network twice a step. It also draws docs/quality.png.
"""

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf

import genai
from benchmarks.common import RESULTS, ROOT, parse, report, setup
from genai.checkpoint.build import build_typed
from genai.core.errors import UserError
from genai.data.images import Digits
from genai.evaluation.baselines.base import training_data
from genai.evaluation.features import FeatureSet, classifier
from genai.metrics.frechet import frechet
from genai.models.diffusion.process.paths import Path
from genai.models.diffusion.sampling.tables import Table, discretize

PICTURE = ROOT / "docs" / "quality.png"
STOCHASTIC = "ddpm", "dpmpp_2m_sde", "euler_ancestral"
SAMPLER = "genai.models.diffusion.sampling.samplers.sample"


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw the rows of a record: distance against network calls, a line for each sampler."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row, marker in zip(rows, itertools.cycle("osD^v<>pP*X"), strict=False):
        points = {int(key.split()[0]): value for key, value in row.items() if key.endswith(" steps")}
        calls = [row["network calls a step"] * steps for steps in points]
        line = "--" if row["sampler"] in STOCHASTIC else "-"
        axes.plot(calls, [*points.values()], f"{marker}{line}", label=row["sampler"], alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="Fréchet distance")
    for axis, ticks, (low, high) in (
        (axes.xaxis, (5, 10, 20, 50, 100), axes.get_xlim()),
        (axes.yaxis, (1, 1.5, 2, 3, 5, 10, 20), axes.get_ylim()),
    ):
        shown = [tick for tick in ticks if low <= tick <= high]
        axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, title="dashed: with noise in each step", title_fontsize=8)
    figure.savefig(path, dpi=110)


def table_of(path: Path, node: dict[str, Any], steps: int) -> Table:
    """The table of coefficients that a sampler's config stands for."""
    keys = ("rho", "shift", "sigma_min", "sigma_max")
    visited = discretize(path, steps, node["spacing"] or path.spacing, **{key: node[key] for key in keys})
    return build_typed(node["solver"])(path, visited)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="without it only the picture is drawn again, from the record")
    parser.add_argument("--n", type=int, default=1437)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    return parse(parser, n=32, steps=[5])


def main() -> None:
    args = arguments()
    if args.run is None:
        plot(json.loads((RESULTS / "quality_cpu.json").read_text())["rows"], PICTURE)
        return
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
        plot(table, PICTURE)


if __name__ == "__main__":
    main()
