"""What the cards of 10,000 samples of MNIST's size cost, the samples themselves apart.

    python -m benchmarks.evaluate --root ../shared/data

The samples are test images with a little noise; baselines and the judge are of before, as they are in a second evaluation.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks.common import RESULTS, hardware
from genai.checkpoint import Loaded
from genai.checkpoint.build import build_typed
from genai.cli import composed
from genai.evaluation import features as extractors
from genai.evaluation import samples
from genai.evaluation.metrics import Plan, standard_metrics
from genai.evaluation.run import evaluate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default="data", help="where MNIST is")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--baselines", action="store_true", help="fit what is not kept of them yet, too")
    args = parser.parse_args()
    node = OmegaConf.to_container(composed("train", ["data=mnist", f"data.root={args.root}"]).data, resolve=True)
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

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(samples.sampling, "sample", noisy):
        loaded = Loaded(nn.Linear(1, 1), config, data.modality, data.conditions, 0, Path(folder) / "last.ckpt")
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        plan = Plan(names, "test", args.n, 1, baselines=args.baselines)
        evaluate(loaded, data, plan)
        seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "hardware": hardware(torch.device("cpu")), "metrics": names, "n": args.n, "seconds": round(seconds, 1),
        "peak_mb": peak // 1024, "of_them_before_mb": before // 1024,
    }  # fmt: skip
    print(json.dumps(result))
    (RESULTS / "evaluate_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
