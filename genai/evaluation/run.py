"""Evaluate a checkpoint on a held-out split: likelihoods of its items and metric cards of samples."""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from genai import checkpoint, progress, sampling
from genai.checkpoint import Loaded, folder_of
from genai.checkpoint.build import DATA, MODELS, build_stored, build_typed
from genai.cli import stored_config
from genai.core import files, rng
from genai.core.errors import UserError, at_least
from genai.core.runs import Card, Facts
from genai.data.base import Data, underlying
from genai.evaluation import cards, hidden, likelihood, samples
from genai.evaluation.baselines.reference import reference_scores
from genai.evaluation.metrics import KINDS, PASS_KINDS, SAMPLE_PARTS, Metric, can_compute, standard_metrics
from genai.evaluation.plan import CheckedPlan, Plan
from genai.modalities.stored import difference, nodes_of

WANDB = "genai.train.trackers.wandb"


Entries = Sequence[str | Mapping[str, Any]]
"""Metrics: names of conf/metrics.yaml, and {name: config node or metric}."""


def run(cfg: DictConfig) -> Facts:
    """Run `evaluate.py`.

    Prints one JSON line for the pass over the split, which is also written next to the checkpoint, and one for each card; cards
    go to `cards/` of the run. Returns the facts of the pass, and the cards under "cards".
    """
    with progress.task("loading the checkpoint"):
        loaded = checkpoint.load(cfg.ckpt, cfg.weights, cfg.device, cfg.trust, cfg.precision, cfg.compile)
    metrics: Any = OmegaConf.to_container(cfg.metrics) if OmegaConf.is_config(cfg.metrics) else cfg.metrics
    facts, found = measure(loaded, cfg, [metrics] if isinstance(metrics, str) else metrics)
    if facts:
        print(json.dumps(facts))
    short = "metric", "value", "low", "high", "floor", "beats_baseline", "memorised", "memorised_reason", "why"
    for card in found if metrics is not None else ():
        print(json.dumps({key: card[key] for key in short if key in card}))
    return {**facts, "cards": found}


def measure(loaded: Loaded, cfg: DictConfig, metrics: Entries | None) -> tuple[Facts, list[Card]]:
    """Return the facts of the pass over the split and the cards of `metrics`, by the settings of conf/evaluate.yaml.

    The facts are also written next to the checkpoint, and the cards to `cards/` of the run. Raises UserError for a metric that
    cannot be computed.
    """
    method: Any = None if cfg.get("likelihood") is None else OmegaConf.to_container(cfg.likelihood)
    extractor = build_typed(OmegaConf.to_container(cfg.extractor))
    sampler: Any = None if cfg.get("sampler") is None else OmegaConf.to_container(cfg.sampler)
    built = None if metrics is None else [build_metrics(entry) for entry in metrics]
    plan = Plan(
        built, cfg.split, cfg.n, cfg.repeats, cfg.seed, cfg.batch_size, extractor, method, cfg.baselines, sampler
    )
    with checkpoint.explain_errors(loaded):
        with progress.task("loading the data"):
            data = data_of(loaded, cfg.root)
        facts, found = evaluate(loaded, data, plan)
    if facts:
        facts |= {"seed": cfg.seed, "weights": loaded.weights, "step": loaded.step, "checkpoint": str(loaded.path)}
        facts["rng_version"] = rng.RNG_VERSION
        kind = cfg.split if method is None else f"{cfg.split}.{method['_target_'].rpartition('.')[2]}"
        out = loaded.path.with_suffix(f".{kind}.json")
        files.write_text(out, json.dumps(facts, indent=2) + "\n", within=folder_of(loaded.path))
    return facts, found


def build_metrics(entry: str | Mapping[str, Any]) -> str | dict[str, Metric]:
    """Return an entry of metrics= with its config nodes built."""
    if isinstance(entry, str):
        return entry
    return {name: build_typed(node) if isinstance(node, Mapping) else node for name, node in entry.items()}


def tracked_run(found: Sequence[Card]) -> Path | None:
    """Return the run directory of cards if that run was tracked by W&B, else None."""
    for card in found[:1]:
        config = folder_of(Path(card["checkpoint"])) / "config.yaml"
        with contextlib.suppress(UserError):  # without a readable config.yaml the run counts as untracked
            if config.is_file() and (stored_config(config).get("logger") or {}).get("_target_") == WANDB:
                return config.parent
    return None


def check(loaded: Loaded, data: Data, plan: Plan) -> CheckedPlan:
    """Check a plan before anything is computed. Raises UserError for one that cannot be carried out."""
    images, node = underlying(data, loaded.config["data"])
    for key, least in {"repeats": 1, "seed": 0, "batch_size": 1}.items():
        at_least(getattr(plan, key), least, key)
    if plan.split not in data.splits:
        raise UserError(f"split={plan.split} must be one of {', '.join(data.splits)}")
    size = len(data.splits[plan.split])
    n = size if plan.n is None else at_least(plan.n, 1, "n")
    can = {
        name: metric
        for name, metric in standard_metrics().items()
        if can_compute(metric, loaded, images, plan.likelihood)
    }
    if plan.metrics is None:
        wanted = {name: metric for name, metric in can.items() if metric.kind in PASS_KINDS}
    else:
        wanted = {name: metric for entry in plan.metrics for name, metric in resolve(entry).items()}
    for name, metric in wanted.items():
        if metric is None or not can_compute(metric, loaded, images, plan.likelihood):
            what = "is not a metric" if metric is None else "is not available for this model"
            raise UserError(f"metrics={list(wanted)}: {name} {what}; it can have {', '.join(can) or 'none'}")
    passes = {name: metric for name, metric in wanted.items() if metric.kind in PASS_KINDS}
    sampled = {name: metric for name, metric in wanted.items() if metric.kind not in PASS_KINDS}
    featured, answers = (images.modality.comparison == kind for kind in ("samples", "answers"))
    if n > size and (featured or answers or passes):
        raise UserError(f"n={n} is more than the {size} items of split={plan.split}: give at most those")
    if plan.likelihood is not None and not passes:
        raise UserError("likelihood= needs a metric of likelihoods: add bits_per_dim to metrics=, or leave one out")
    if plan.sampler is not None and not sampled:
        raise UserError(
            "sampler= and its arguments need a metric of samples or answers: name one in metrics=, or leave them out"
        )
    if passes or plan.metrics is None:
        likelihood.scorer(loaded, data, plan.likelihood)
    extractor = None
    if sampled:
        sampling.bind(loaded, plan.sampler, {})
    if sampled and featured:
        at_least(n, 2, "n")
        extractor = plan.extractor(images, node, str(loaded.device))
        samples.check_extractor(extractor, images, plan.split, sampled)
    return CheckedPlan(plan, images, node, n, can, wanted, passes, sampled, extractor)


def resolve(entry: str | Mapping[str, Metric]) -> Facts:
    """Return one entry of `metrics=` as {name: metric}; None for a name that conf/metrics.yaml lacks.

    Raises UserError for an object that is not a valid Metric.
    """
    if isinstance(entry, str):
        return {entry: standard_metrics().get(entry)}
    for name, metric in entry.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"metrics: {name!r} names a file of cards/: give letters, digits, and _ . - within")
        if not isinstance(metric, Metric):
            raise UserError(
                f"metrics: {name} is a {type(metric).__name__}: give the node of a genai.evaluation.metrics.Metric"
            )
        if hasattr(metric, "of"):
            raise UserError(f"metrics: {name} has the attribute of, which is called kind now: rename it in its class")
        for key, allowed in {"kind": KINDS, "better": ("lower", "higher"), "reads": SAMPLE_PARTS}.items():
            value = getattr(metric, key)
            if not {*([value] if isinstance(value, str) else value)} <= {*allowed}:
                raise UserError(
                    f"metrics: {key}={value} of {name} must be one of {', '.join(allowed)}: change its class"
                )
    return dict(entry)


def evaluate(loaded: Loaded, data: Data, plan: Plan) -> tuple[Facts, list[Card]]:
    """Carry out a plan; returns (facts of the pass, cards in the order of the plan). The cards are written to the run.

    Raises UserError before anything is computed if the plan cannot be carried out or the run cannot be written.
    """
    checked, folder = check(loaded, data, plan), folder_of(loaded.path)
    if folder.exists() and not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written, and cards are kept there: copy the run to a folder that can")
    facts: Facts = {}
    found: list[Card] = []
    if checked.pass_metrics or plan.metrics is None:
        facts, found = _pass(loaded, data, checked)
    if checked.extractor is not None:
        found += samples.sample_cards(loaded, checked, checked.extractor, folder / "cards")
    elif checked.sample_metrics:
        found += samples.SET_CARDS[str(checked.images.modality.comparison)](loaded, checked)
    found = [card | {"seed": plan.seed, "checkpoint": str(loaded.path), "step": loaded.step} for card in found]
    cards.write(found, folder)
    return facts, sorted(found, key=lambda card: [*checked.requested].index(card["metric"]))


def _pass(loaded: Loaded, data: Data, checked: CheckedPlan) -> tuple[Facts, list[Card]]:
    """Return (facts, cards) of one pass over the first n items of the split."""
    plan, n, metrics = checked.plan, checked.n, checked.pass_metrics
    # Images on grey levels are as likely as their tokens; a waveform of 16 bits is not as likely as its mu-law codes.
    forms = [form for form in (checked.images, data) if form.values == data.values]
    facts, means = likelihood.run(loaded, data, checked)
    model: Any = loaded.model
    levels = facts.get("levels", data.values)
    latents = torch.Size(getattr(model, "latent_shape", (getattr(model, "latents", 0),))).numel()
    # The n-gram baseline scores a whole text only, so a part of one has no baselines.
    whole = not data.modality.windowed or n == len(data.splits[plan.split])
    others: dict[str, dict[str, float]] = {}
    if plan.baselines and whole and levels == data.values:
        for form in dict.fromkeys(forms):
            for name, found in reference_scores(form, metrics, plan.split, n, latent_dim=latents).items():
                others[name] = {**others.get(name, {}), **found}
    protocol = {"n": n, "split": plan.split, **cards.data_facts(checked), "levels": levels}
    protocol["dtype"] = loaded.dtype
    protocol |= {key: facts[key] for key in ("context", "context_overlap", "given", "likelihood") if key in facts}
    bound = {"bound": facts["bound"]} if "bound" in facts else {}
    own = {
        "hidden": {"protocol": {**protocol, "shape": list(data.shape), "masked_share": hidden.SHARE}},
        "likelihoods": {"protocol": protocol, **bound},
        "reconstructions": {"protocol": protocol, **bound},
        "retrieval": {"protocol": protocol},
    }
    found = [
        cards.card(name, metric, *means[name], None, others.get(name, {}), own[metric.kind])
        for name, metric in metrics.items()
    ]
    objective = getattr(model, "objective", None)
    for card in found:
        if metrics[card["metric"]].kind == "likelihoods" and card["beats_baseline"] is False and objective is not None:
            what, figure = min(card["baselines"].items(), key=lambda item: item[1])
            facts["why"] = card["why"] = f"no better than a {what} ({figure:.3f}): {objective}"
    return {**facts, "split": plan.split, "n": n}, found


def data_of(loaded: Loaded, root: str | None) -> Data:
    """Build the data that the checkpoint was trained on, from `root` if that is given.

    Raises UserError if other data are found there.
    """
    node = dict(loaded.config["data"])
    if root is not None:
        if "paths" in node:
            raise UserError(
                "root= is for data in one place, and this was trained on several (data.paths): leave it out"
            )
        node["path" if "path" in node else "root"] = root
    data = build_stored(node, loaded.trust, (MODELS, DATA))
    if what := difference(nodes_of(loaded.modality, loaded.conditions), data.modality, data.conditions):
        raise UserError(
            f"the {what} of {loaded.path} is not that of its data now: give the data it was trained on with root="
        )
    return data


if __name__ == "__main__":
    raise SystemExit("error: this module is not a command: type genai evaluate, or python evaluate.py")
