"""Fit all baselines of a data set, print the table of their scores and write it as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from genai import progress
from genai.checkpoint.build import build_typed
from genai.core import files
from genai.core.errors import UserError, at_least
from genai.core.runs import Facts
from genai.core.stored import Node
from genai.data.base import Data, underlying
from genai.evaluation.baselines.base import Baseline, TrainingData, check, name_of, training_data
from genai.evaluation.baselines.reference import can_score, row_node, score_baseline
from genai.evaluation.features import FeatureSet, classifier, extract_features
from genai.evaluation.metrics import standard_metrics
from genai.metrics.intervals import over_seeds

SAMPLE_METRICS = "frechet", "precision", "recall"  # in the features of cards
HIDDEN_METRICS = "masked_nats", "masked_accuracy", "pseudo_perplexity"
ANSWER_METRICS = "exact_match", "token_error_rate"
PAIR_METRICS = "reconstruction_psnr_db", "mel_l1", "stft_distance", "si_sdr_db"
DECIMALS = {"bits_per_dim": 3, "precision": 3, "recall": 3, "frechet": 2, "reconstruction_psnr_db": 2}  # else 4


def run(cfg: DictConfig) -> Facts:
    """Run `python -m genai.evaluation.baselines`; returns what is written to the JSON file."""
    node: Any = OmegaConf.to_container(cfg.data, resolve=True)
    data, node, forms = forms_of(build_typed(node), node)
    out = Path(cfg.out or f"runs/baselines/{title(node)}.json")
    files.check_folder(out.parent, "out")
    if out.is_dir():
        raise UserError(f"out={out} is a folder: name a file, such as {out / 'baselines.json'}")
    repeats = at_least(cfg.repeats, 1, "repeats")
    at_least(cfg.seed, 0, "seed")
    split = cfg.split or ("test" if "test" in data.splits else "val")
    if split not in data.splits:
        raise UserError(f"split={split} must be one of {', '.join(data.splits)}")
    before = [name for name in ("train", "val", "test") if name in data.splits]
    if not (cfg.fit is None or isinstance(cfg.fit, str) or OmegaConf.is_list(cfg.fit)):
        raise UserError(f"fit={cfg.fit} must be a list of splits, such as [train,val]")
    given = [cfg.fit] if isinstance(cfg.fit, str) else cfg.fit
    fit = list(given) if given is not None else before[: before.index(split)] or ["train"]
    chosen = baselines(cfg, forms)
    learned = {form: training_data(form, fit) for form in forms}
    real, sampled = None, any(form is data and hasattr(baseline, "sample") for form, _, _, baseline in chosen)
    if sampled and data.classes is not None and cfg.features is not None:
        real = extract_features(data.splits[split], data.field, classifier(data, node, "cpu"), ("features",))
    found = []
    for form, name, arguments, baseline in progress.track(chosen, "baselines", len(chosen)):
        with progress.task(baseline.what):
            compared = real if form is data else None
            metrics = score(baseline, learned[form], form, split, compared, repeats, cfg.seed)
        found.append({"baseline": name, "arguments": arguments, "what": baseline.what, "metrics": metrics})
    found = rows_with_metrics(found, cfg.get("baseline"))
    result = {
        "data": {k: v for k, v in node.items() if k not in ("batch_size", "num_workers")},
        "split": split,
        "fit": fit,
        "levels": data.levels,
        "seed": cfg.seed,
        "rows": found,
    }
    files.write_text(out, json.dumps(result, indent=2) + "\n", hint="name another file with out=")
    show(result, out)
    return result


def title(node: Node) -> str:
    """Return the name of a data set for a file's name: the name of its text file, or its class."""
    return Path(node["path"]).stem if node.get("path") else node["_target_"].rpartition(".")[2].lower()


def forms_of(data: Data, node: Any) -> tuple[Data, Any, list[Data]]:
    """Return the data that `data` are another form of, their config, and the forms on which baselines are scored.

    Images on grey levels are as likely as their tokens and stand for them; codes of sound are coarser than it, so both count.
    """
    own, theirs = underlying(data, node)
    return own, theirs, [own] if own.values == data.values else [data, own]


def baselines(cfg: DictConfig, forms: Sequence[Data]) -> list[tuple[Data, str, Node, Baseline]]:
    """Build the one baseline of `baseline=`, or all of `rows` that suit a form of the data.

    Returns (form, name, arguments, baseline) of each.

    Raises UserError if `baseline=` does not suit the data, or none does.
    """
    chosen: Any = None if cfg.get("baseline") is None else OmegaConf.to_container(cfg.baseline)
    rows: Any = OmegaConf.to_container(cfg.rows)
    found = []
    for form in forms:
        nodes = [row_node(row) for row in rows.get(form.field, [])]
        if chosen is not None:
            nodes = [(name_of(chosen["_target_"].rpartition(".")[2]), chosen)]
        for name, node in nodes:
            baseline = build_typed(node)
            try:
                check(baseline, form)
            except UserError:
                if chosen is not None and form is forms[-1] and not found:
                    raise
                continue
            found.append((form, name, {k: v for k, v in node.items() if k != "_target_"}, baseline))
    if not found:
        fields = " and ".join(form.field for form in forms)
        raise UserError(f"there are no baselines of {fields}, only of {', '.join(rows)}: choose another data=")
    return found


def score(
    baseline: Any, learned: TrainingData, data: Data, split: str, real: FeatureSet | None, repeats: int, seed: int
) -> dict[str, Facts]:
    """Fit a baseline and compute all its metrics; returns {metric: figure}, see `figure`.

    Only a baseline with a random fit is fitted more than once, and only samples are drawn anew for each repeat.
    """
    n, values = len(data.splits[split]), {}
    pairs = [name for name in PAIR_METRICS if standard_metrics()[name].suits(None, data)]
    names = [*data.modality.likelihoods, *HIDDEN_METRICS, *pairs]
    names += ANSWER_METRICS if data.modality.comparison == "answers" else ()
    items = {name: standard_metrics()[name] for name in names if can_score(baseline, standard_metrics()[name])}
    sampled = {
        name: standard_metrics()[name]
        for name in SAMPLE_METRICS
        if real is not None and can_score(baseline, standard_metrics()[name])
    }
    for k in range(repeats):
        metrics = sampled
        if k == 0 or baseline.random_fit:
            baseline.fit(learned, seed + k)
            metrics = items | sampled
        for name, value in score_baseline(baseline, data, metrics, split, n, real, seed + k * n).items():
            values.setdefault(name, []).append(value)
    whole: Any = data.splits[split]
    own = {"split": split, "n": whole.tokens - 1 if data.modality.windowed else n}
    on_samples = (
        {} if real is None else {"extractor": real.extractor.facts["extractor"], "real": split, "n": real.moments.n}
    )
    return {name: figure(name, found, on_samples if name in SAMPLE_METRICS else own) for name, found in values.items()}


def figure(name: str, found: list[float], protocol: Facts) -> Facts:
    """Summarise the values of a metric over repeats: mean, least and greatest, with the protocol."""
    spread = over_seeds(found)
    values = {"value": spread.mean, "low": spread.min, "high": spread.max}
    rounded = {key: round(value, 5) for key, value in values.items()}
    return {**rounded, "repeats": spread.n, "better": standard_metrics()[name].better, **protocol}


def rows_with_metrics(rows: list[Facts], chosen: object) -> list[Facts]:
    """Return the rows that have a metric. Raises UserError if none has."""
    found = [row for row in rows if row["metrics"]]
    if not found:
        which = "the baselines of this data are" if chosen is None else f"baseline={rows[0]['baseline']} is"
        raise UserError(
            f"{which} measured in the features of a classifier, which needs data.classes and features=classifier"
        )
    return found


def show(result: Facts, out: Path) -> None:
    """Print the table of scores, with least and greatest in brackets where there are several repeats."""
    metrics = [name for name in standard_metrics() if any(name in row["metrics"] for row in result["rows"])]
    table = Table("baseline", *metrics)
    for row in result["rows"]:
        table.add_row(row["what"], *(cell(name, row["metrics"].get(name)) for name in metrics))
    progress.console().print(table)
    sizes = sorted(
        {
            (figure["n"], figure.get("split") or f"{figure['real']} (samples)")
            for row in result["rows"]
            for figure in row["metrics"].values()
        }
    )
    scored = ", ".join(f"n={n} of {where}" for n, where in sizes)
    print(f"fitted on {'+'.join(result['fit'])}; {scored}; mean over repeats, least to greatest in brackets\n{out}")


def cell(name: str, found: Facts | None) -> str:
    """Format one cell of the table."""
    if found is None:
        return ""
    places = DECIMALS.get(name, 4)
    spread = f" ({found['low']:.{places}f}-{found['high']:.{places}f})" if found["low"] < found["high"] else ""
    return f"{found['value']:.{places}f}{spread}"
