"""Time and memory of the metrics of samples.

    python -m benchmarks.evaluate --root ../shared/data [--baselines]

All metrics of samples are taken of 10,000 of MNIST's size; the time of making the samples does not count. The samples are test
images with a little noise. The classifier whose features compare images is in the cache, and so are the baselines, as in a
second evaluation; a run with --baselines fits those that the cache lacks, too.
"""

import argparse
import resource
import tempfile
from pathlib import Path
from unittest import mock

import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks.common import clock, left_out, parse, report, setup
from genai.checkpoint import Loaded
from genai.checkpoint.build import build_typed
from genai.cli import compose_config
from genai.evaluation import features as extractors
from genai.evaluation import samples
from genai.evaluation.metrics import Plan, standard_metrics
from genai.evaluation.run import evaluate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder that holds MNIST")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--baselines", action="store_true", help="fit the baselines that the cache lacks, too")
    return parse(parser, n=100)


def main() -> None:
    args, device = arguments(), torch.device("cpu")
    setup()
    node = OmegaConf.to_container(compose_config("train", ["data=mnist", f"data.root={args.root}"]).data, resolve=True)
    data = build_typed(node)
    extractors.classifier(data, node, "cpu")
    names = [name for name, metric in standard_metrics().items() if metric.kind == "samples"]
    config = {"data": node, "model": {"classes": 10}, "sampler": {}}

    def noisy(loaded, n, seed, label, batch_size):
        batch = data.splits["test"].batch(torch.arange(seed, seed + n) % len(data.splits["test"]), None)
        return {
            "image": (batch["image"] + 0.02 * torch.randn_like(batch["image"])).clamp(-1, 1),
            "label": batch["label"],
        }

    sampler = {"sample": noisy, "bind": lambda *_: None}
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(samples.sampling, **sampler):
        loaded = Loaded(nn.Linear(1, 1), config, data.modality, data.conditions, 0, Path(folder) / "last.ckpt")
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, clock(device)
        plan = Plan(names, "test", args.n, 1, baselines=args.baselines)
        evaluate(loaded, data, plan)
        seconds = clock(device) - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    what = f"{len(names)} metrics of {args.n} samples{', baselines included' if args.baselines else ''}"
    row = {"measure": what, "CPU seconds": round(seconds, 1), "GB added": round((peak - before) / 2**20, 2)}
    left_out.append("a run without --baselines" if args.baselines else "--baselines")
    report("evaluate", args, device, [row])


if __name__ == "__main__":
    main()
