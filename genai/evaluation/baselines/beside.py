"""What trivial models reach by the protocol of a card: computed when a data set is first evaluated so, and kept."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from genai.build import build_typed
from genai.cli import conf_dir
from genai.core import files
from genai.core.cache import CACHE_HINT, cache_folder
from genai.core.errors import UserError
from genai.data.base import Data, part
from genai.data.fingerprint import checksum, of_data
from genai.data.stream import batches
from genai.evaluation.baselines.base import check, known
from genai.evaluation.baselines.run import held, nats_of, row_node
from genai.evaluation.baselines.vectors import Copier
from genai.evaluation.cards import METRICS, Seen, Sets
from genai.metrics.images import psnr, ssim

COPIER = Copier.what
MOST = 10_000  # training images that they learn from, and
TOKENS = 10_000_000  # tokens
FORMAT = 2  # of what is kept
LIKELIHOODS = "bits_per_dim", "nats_per_token", "bits_per_character"


def beside(
    data: Data,
    names: Sequence[str],
    split: str,
    n: int,
    real: Seen | None = None,
    numbers: int = 0,
) -> dict[str, dict[str, float]]:
    """Metric -> baseline -> figure: with `real`, a split's images as an extractor sees them, of n samples; else of the first
    n items of that split.

    Args:
        data: images or a text.
        numbers: that a model keeps of an image, for principal components.
    """
    figures: dict[str, dict[str, float]] = {name: {} for name in names}
    of, facts = ("split", []) if real is None else ("samples", [real.extractor.facts])
    rows: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "baselines.yaml").beside)
    content = of_data(data, list(dict.fromkeys(["train", split])))
    for row in rows[of]:
        if row["baseline"] == "pca":
            row["components"] = min(numbers, math.prod(data.shape), MOST, len(data.splits["train"]))
        baseline = build_typed(row_node(row)[1])
        wanted = [name for name in names if answers(baseline, name)]
        try:
            check(baseline, data)
        except UserError:
            continue
        path = cache_folder("baselines") / f"{checksum(content, FORMAT, row, split, n, *facts)}.json"
        kept = _kept(path)
        if any(name not in kept for name in wanted):
            print(f"baselines of this data, once: {baseline.what}", flush=True)
            baseline.fit(known(data, ["train"], TOKENS if data.modality.windowed else MOST), 0)
            kept |= (
                items(baseline, data, wanted, split, n) if real is None else samples(baseline, data, wanted, n, real)
            )
            files.write_text(path, json.dumps(kept), hint=CACHE_HINT)
        for name in wanted:
            figures[name][baseline.what] = kept[name]
    return figures


def _kept(path: Path) -> dict[str, float]:
    """Figures by metric; none where there are none yet, or the file is damaged."""
    try:
        found = json.loads(path.read_text())
        return {name: float(value) for name, value in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        print(f"warning: {path} is damaged ({type(error).__name__}): made again")
        return {}


def answers(baseline: Any, name: str) -> bool:
    """Whether a baseline has this figure."""
    if METRICS[name].of == "samples":
        return hasattr(baseline, "sample")
    return hasattr(baseline, "log_prob" if name in LIKELIHOODS else "reconstruct")


def samples(baseline: Any, data: Data, names: Sequence[str], n: int, real: Seen) -> dict[str, float]:
    """Of n samples, the classes in turn."""
    fake = Seen(real.extractor, True)
    for first in range(0, n, 500):
        label = None if data.classes is None else torch.arange(first, min(first + 500, n)) % data.classes
        fake.add(data.modality.on_levels(baseline.sample(min(500, n - first), first, label), data.levels), label)
    sets = Sets(real, fake)
    return {name: measure(sets) for name in names if (measure := METRICS[name].measure) is not None}


def items(baseline: Any, data: Data, names: Sequence[str], split: str, n: int) -> dict[str, float]:
    """Figures of a baseline on the n items of a split that a pass measures; on the whole split of a text."""
    scored = held(data, split) if data.modality.windowed else next(batches(part(data, split, n), n))
    found: dict[str, float] = {}
    if any(name in LIKELIHOODS for name in names):
        found = nats_of(-baseline.log_prob(scored, 0).double(), scored, data, split)
    else:
        again = baseline.reconstruct(scored)
        for name, measure in (("reconstruction_psnr_db", psnr), ("reconstruction_ssim", ssim)):
            if name in names:
                found[name] = measure(again, scored[data.field]).double().mean().item()
    return {name: found[name] for name in names}
