"""The table of a data set: every baseline that it can have, fitted, scored, printed and written as JSON."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genai.build import build_typed
from genai.cli import choices_of, conf_dir, config_folders, nearest
from genai.core import files
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.data.base import Data
from genai.data.pixels import images_behind
from genai.data.stream import batches
from genai.evaluation import judge as networks
from genai.evaluation.baselines.base import Baseline, Known, check, known, stream
from genai.evaluation.baselines.judge import HIDDEN, Judge
from genai.evaluation.features import sha256
from genai.metrics import likelihood
from genai.metrics.frechet import Moments, frechet
from genai.metrics.images import psnr
from genai.metrics.intervals import over_seeds
from genai.metrics.manifold import precision_recall

MLP = "_mlp"  # ends the name of a figure in the features of judge=mlp, which no card has
SAMPLED = {"frechet": "lower", "precision": "higher", "recall": "higher"}  # in the features of a judge
BETTER = {  # of every figure here, by the names that cards give them
    "bits_per_dim": "lower", "nats_per_token": "lower", "bits_per_character": "lower", **SAMPLED,
    **{name + MLP: better for name, better in SAMPLED.items()}, "reconstruction_psnr_db": "higher",
}  # fmt: skip
DIGITS = {"bits_per_dim": 3, "precision": 3, "recall": 3, "frechet": 2, "reconstruction_psnr_db": 2}  # others 4


@dataclass
class Ruler:
    """Features that sets of samples are compared in, those of real images, and what both are."""

    features: Any
    real: Tensor
    protocol: dict[str, Any]
    ending: str = ""  # of the names of its figures


def run(cfg: Any) -> dict[str, Any]:
    """`python -m genai.evaluation.baselines`: fit, score, print and write; returns what is written."""
    node: Any = OmegaConf.to_container(cfg.data, resolve=True)
    data, node = images_behind(build_typed(node), node)
    out = Path(cfg.out or f"runs/baselines/{title(node)}.json")
    files.check_folder(out.parent, "out")
    if out.is_dir():
        raise UserError(f"out={out} is a folder: name a file, such as {out / 'baselines.json'}")
    repeats = at_least(cfg.repeats, 1, "repeats")
    at_least(cfg.seed, 0, "seed")
    split = cfg.split or ("test" if "test" in data.splits else "val")
    if split not in data.splits:
        raise UserError(f"split={split} is none of {', '.join(data.splits)}")
    before = [name for name in ("train", "val", "test") if name in data.splits]
    if not (cfg.fit is None or isinstance(cfg.fit, str) or OmegaConf.is_list(cfg.fit)):
        raise UserError(f"fit={cfg.fit} must be a list of splits, such as [train,val]")
    given = [cfg.fit] if isinstance(cfg.fit, str) else cfg.fit
    fit = list(given) if given is not None else before[: before.index(split)] or ["train"]
    chosen = baselines(cfg, data)
    learned = known(data, fit)
    part = held(data, split)
    sampled = any(hasattr(baseline, "sample") for _, _, baseline in chosen)
    judged = sampled and data.classes is not None and cfg.judge is not None
    judge = ruler(cfg.judge, data, learned, fit, split) if judged else None
    found = []
    for name, arguments, baseline in chosen:
        if sys.stdout.isatty():
            print(f"\r{baseline.what:60}", end="", flush=True)
        metrics = scored(baseline, learned, part, data, split, judge, repeats, cfg.seed)
        found.append({"baseline": name, "arguments": arguments, "what": baseline.what, "metrics": metrics})
    found = measured(found, cfg.get("baseline"))
    result = {
        "data": {k: v for k, v in node.items() if k not in ("batch_size", "num_workers")}, "split": split, "fit": fit,
        "levels": data.levels, "seed": cfg.seed, "rows": found,
    }  # fmt: skip
    files.write_text(out, json.dumps(result, indent=2) + "\n", hint="name another file with out=")
    show(result, out)
    return result


def title(node: dict[str, Any]) -> str:
    """Of a data set, for a file's name: its text's own name, or its images' class."""
    return Path(node["path"]).stem if node.get("path") else node["_target_"].rpartition(".")[2].lower()


def baselines(cfg: Any, data: Data) -> list[tuple[str, dict[str, Any], Baseline]]:
    """Name, arguments and the thing itself: the one that baseline= chose, or the rows that this data can have."""
    if cfg.get("baseline") is not None:
        chosen: Any = OmegaConf.to_container(cfg.baseline)
        nodes = [(chosen["_target_"].rpartition(".")[2].lower(), chosen)]
    else:
        nodes = [row_node(row) for row in OmegaConf.to_container(cfg.rows).get(data.field, [])]  # type: ignore
    if not nodes:
        raise UserError(f"there are no baselines of {data.field}, only of {', '.join(cfg.rows)}: choose another data=")
    found = []
    for name, node in nodes:
        baseline = build_typed(node)
        try:
            check(baseline, data)
        except UserError:
            if cfg.get("baseline") is not None:
                raise
            continue
        found.append((name, {k: v for k, v in node.items() if k != "_target_"}, baseline))
    return found


def row_node(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A row of the config, its baseline's file with the row's own keys on top."""
    name = str(row.get("baseline")) if isinstance(row, dict) else str(row)
    names = choices_of("baseline", config_folders(None))
    if name not in names:
        raise UserError(f"rows: baseline={name} is none of {', '.join(names)}{nearest(name, names)}")
    node: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "baseline" / f"{name}.yaml"))
    return name, {**node, **{key: value for key, value in row.items() if key != "baseline"}}


def held(data: Data, split: str) -> Batch:
    """All of a split in one batch; a text as one row, so that context is short at its beginning alone."""
    part = data.splits[split]
    return {data.field: stream(part)[None]} if data.modality.windowed else next(batches(part, len(part)))


def ruler(kind: Any, data: Data, learned: Known, fit: list[str], split: str) -> Ruler:
    """Raises UserError for a judge that there is not."""
    if kind == "mlp":
        assert learned.label is not None
        judge = Judge(learned.x, learned.label, learned.levels)
        what = {"kind": f"multilayer perceptron {HIDDEN}", "seed": 0}
        return Ruler(judge.features, learned.x, {"extractor": what, "real": "+".join(fit), "n": len(learned.x)}, MLP)
    if kind != "network":
        raise UserError(f"judge={kind} is none of mlp, network")
    network, part = networks.trained(data), data.splits[split]
    real = next(batches(part, len(part)))[data.field]
    what = {"kind": "Judge", "sha256": sha256(network)}
    return Ruler(torch.no_grad()(network.features), real, {"extractor": what, "real": split, "n": len(real)})


def scored(
    baseline: Any, learned: Known, part: Batch, data: Data, split: str, judge: Ruler | None, repeats: int, seed: int
) -> dict[str, dict[str, Any]]:
    """All that a baseline can answer: of each figure its mean over repeats, the least, the greatest and what decides it.

    Only those with randomness of their own are fitted, and only samples drawn, more than once.
    """
    values: dict[str, list[float]] = {}
    for k in range(repeats):
        again = k == 0 or baseline.drawn
        facts = {}
        if again:
            baseline.fit(learned, seed + k)
        if again and hasattr(baseline, "log_prob"):
            facts |= nats_of(-baseline.log_prob(part, seed).double(), part, data, split)
        if again and hasattr(baseline, "reconstruct"):
            facts["reconstruction_psnr_db"] = psnr(baseline.reconstruct(part), part[data.field]).double().mean().item()
        if judge is not None and hasattr(baseline, "sample"):
            n = len(judge.real)
            facts |= apart(judge, data.modality.on_levels(baseline.sample(n, seed + k * n, None), data.levels))
        for name, value in facts.items():
            values.setdefault(name, []).append(value)
    x = part[data.field]
    own = {"split": split, "n": x.shape[1] - 1 if data.modality.windowed else len(x)}
    return {name: figure(name, found, own, judge) for name, found in values.items()}


def figure(name: str, found: list[float], own: dict[str, Any], judge: Ruler | None) -> dict[str, Any]:
    """One figure over its repeats with its protocol."""
    spread = over_seeds(found)
    protocol = judge.protocol if judge is not None and name.removesuffix(MLP) in SAMPLED else own
    values = {"value": spread.mean, "low": spread.min, "high": spread.max}
    return {**{k: round(v, 5) for k, v in values.items()}, "repeats": spread.n, "better": BETTER[name], **protocol}


def nats_of(nats: Tensor, part: Batch, data: Any, split: str) -> dict[str, float]:
    """In the unit of the data's kind."""
    if not data.modality.windowed:
        return {"bits_per_dim": likelihood.per_dimension(nats, math.prod(data.shape), data.levels)["bits_per_dim"]}
    tokens, whole = part[data.field].shape[1] - 1, data.splits[split]
    facts = likelihood.per_token(nats, tokens, tokens * whole.characters / whole.tokens)
    return {name: facts[name] for name in ("nats_per_token", "bits_per_character")}


def apart(judge: Ruler, samples: Tensor) -> dict[str, float]:
    """What sets of samples and of real images differ by, in a judge's features."""
    real, fake = judge.features(judge.real), judge.features(samples)
    balls = precision_recall(real, fake)
    distance = frechet(Moments().add(fake), Moments().add(real))
    found = {"frechet": distance, "precision": balls.precision, "recall": balls.recall}
    return {name + judge.ending: value for name, value in found.items()}


def measured(rows: list[dict[str, Any]], chosen: Any) -> list[dict[str, Any]]:
    """The rows that have a figure. Raises UserError if the one that was chosen has none."""
    found = [row for row in rows if row["metrics"]]
    if not found:
        which = "the baselines of this data are" if chosen is None else f"baseline={rows[0]['baseline']} is"
        raise UserError(
            f"{which} measured by a judge of samples, which needs labels (data.classes) and judge=: change one of these"
        )
    return found


def show(result: dict[str, Any], out: Path) -> None:
    """The table: least to greatest where there are several repeats."""
    metrics = [name for name in BETTER if any(name in row["metrics"] for row in result["rows"])]
    table = Table("baseline", *metrics)
    for row in result["rows"]:
        table.add_row(row["what"], *(cell(name, row["metrics"].get(name)) for name in metrics))
    if sys.stdout.isatty():
        print("\r" + " " * 60 + "\r", end="")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    sizes = sorted({(figure["n"], figure.get("split") or f"{figure['real']} (samples)") for row in result["rows"]
                    for figure in row["metrics"].values()})  # fmt: skip
    scored = ", ".join(f"n={n} of {where}" for n, where in sizes)
    print(f"fitted on {'+'.join(result['fit'])}; {scored}; mean over repeats, least to greatest in brackets\n{out}")


def cell(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    places = DIGITS.get(name.removesuffix(MLP), 4)
    spread = f" ({found['low']:.{places}f}-{found['high']:.{places}f})" if found["low"] < found["high"] else ""
    return f"{found['value']:.{places}f}{spread}"
