"""Does a run beat its baselines? Figures that evaluate.py wrote beside those of the table, where they may be compared."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from genai.core.errors import UserError

Figure = dict[str, Any]
LIKELIHOODS = "bits_per_dim", "nats_per_token", "bits_per_character"
RECONSTRUCTION = "reconstruction_psnr_db"


def figures(path: Path) -> dict[str, list[Figure]]:
    """Name -> figures of an evaluation (JSON), or of all evaluations and cards below a run directory.

    Raises UserError if there are none.
    """
    files = [path] if path.is_file() else [*sorted(path.glob("checkpoints/*.json")), *sorted(path.glob("cards/*.json"))]
    found: dict[str, list[Figure]] = {}
    for file in files:
        for name, figure in _figures(_read(file)):
            found.setdefault(name, []).append({**figure, "file": str(file)})
    if not found:
        raise UserError(f"against={path} holds no figures: run evaluate.py ckpt={path} first, or name its JSON file")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"against: {file} is no JSON of evaluate.py ({error}): name another") from None
    return content if isinstance(content, dict) else {}


def _figures(content: dict[str, Any]) -> list[tuple[str, Figure]]:
    if "metric" in content:  # a card
        protocol = content["protocol"]
        sha = protocol["extractor"].get("sha256")
        return [
            (
                content["metric"],
                {"value": content["value"], "real": protocol["split"], "n": protocol["n"], "sha256": sha},
            )
        ]
    own = {"split": content.get("split"), "n": content.get("tokens", content.get("n")), "levels": content.get("levels")}
    own |= {"vocabulary": content.get("vocabulary")}
    return [(name, {"value": content[name], **own}) for name in (*LIKELIHOODS, RECONSTRUCTION) if name in content]


def comparable(name: str, mine: Figure, theirs: Figure, levels: int | None) -> bool:
    """Whether a figure of a run and one of a baseline are of the same thing.

    Likelihoods need one split, whole, and one set of values; bits per character any tokens; reconstructions one split; samples
    one judge, as many of them, and the same real images.
    """
    if name in ("frechet", "precision", "recall"):
        same = mine["sha256"] == theirs["extractor"].get("sha256") and mine["sha256"] is not None
        return same and mine["n"] == theirs["n"] and mine["real"] == theirs["real"]
    if mine["split"] != theirs["split"]:
        return False
    if name == "bits_per_dim":
        return mine["levels"] == levels and mine["n"] == theirs["n"]
    if name == "nats_per_token":
        return mine["vocabulary"] == levels and mine["n"] == theirs["n"]
    return name == "bits_per_character" or mine["n"] == theirs["n"]


def source(node: dict[str, Any]) -> str:
    """What makes a data set's items: captions and pixels as tokens are of other images."""
    return str(node.get("images", node)["_target_"])


def check_source(path: Path, node: dict[str, Any]) -> None:
    """Raises UserError for a run of other data than the baselines'."""
    if not (path / "config.yaml").is_file():
        return
    config: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    if source(config["data"]) != source(node):
        raise UserError(
            f"against={path} was trained on {source(config['data'])}, and these baselines are of {source(node)}: choose its "
            "data="
        )


def verdicts(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Of each row its `verdicts`: {metric: {value, baseline, beats}} where they compare, and in words.

    Raises UserError if no figure of the run compares with any of the baselines.
    """
    check_source(path, result["data"])
    mine, rows = figures(path), []
    for row in result["rows"]:
        found = {}
        for name, theirs in row["metrics"].items():
            for figure in mine.get(name, []):
                if comparable(name, figure, theirs, result["levels"]):
                    beats = beaten(figure["value"], theirs)
                    found[name] = {"value": figure["value"], "baseline": theirs["value"], "beats": beats}
        words = (f"{name} {v['value']:.4g}: {'yes' if v['beats'] else 'no'}" for name, v in found.items())
        rows.append({"what": row["what"], "metrics": found, "text": ", ".join(words)})
    if not any(row["metrics"] for row in rows):
        seen = ", ".join(f"{name} of split={f[-1].get('split') or f[-1].get('real')}" for name, f in mine.items())
        raise UserError(
            f"against={path} has {seen}, which compares with no figure of these baselines: evaluate the whole of "
            f"split={result['split']}, and for cards give judge=network and n= as many as it has"
        )
    return {"against": str(path), "verdicts": rows}


def beaten(value: float, theirs: Figure) -> bool:
    """Better than the best of the baseline's repeats, not than their mean alone."""
    return value < theirs["low"] if theirs["better"] == "lower" else value > theirs["high"]
