"""Check that a sweep's metric is comparable between all of its jobs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genai.cli import conf_dir, resolved
from genai.core.errors import UserError
from genai.core.runs import Facts

DATA = "batch_size", "num_workers"  # keys of the data that do not change what a metric means
MODEL = "net", "encoder", "decoder", "generator", "discriminator", "latents", "guidance", "clip", "importance_samples"


class Comparison:
    """The check of one sweep: a loss is comparable only for the same model class and loss settings, any metric for the same data.

    Args:
        metric: that jobs are ranked by; None if they are not ranked.
        axes: the keys that are swept over, for the error.
    """

    def __init__(self, metric: str | None, axes: Iterable[str]):
        self.metric, self.axes = metric, list(axes)
        self.first: Facts | None = None

    def add(self, cfg: DictConfig) -> None:
        """Check a job's config against the first one's. Raises UserError if the metric is not comparable, or never computed."""
        if self.metric is None or self.metric.startswith("perf/"):
            return
        cards = cfg.get("callbacks") and cfg.callbacks.get("cards")
        if self.metric.startswith("card/") and not (cards and cards.get("every_steps")):
            raise UserError(
                f"sweep.metric={self.metric} is computed by callbacks.cards, which is off: add callbacks.cards.every_steps= and "
                f"callbacks.cards.metrics=[{self.metric.removeprefix('card/')}]"
            )
        found = self.settings(cfg)
        self.first = self.first or found
        for key in sorted(found.keys() | self.first.keys()):
            if found.get(key) != self.first.get(key):
                axis = next((axis for axis in self.axes if f"{key}.".startswith(f"{axis}.")), key)
                raise UserError(self.sentence(axis, key, found.get(key)))

    def settings(self, cfg: DictConfig) -> Facts:
        """Return the settings on which the meaning of a job's metric depends, by dotted key."""
        whole = resolved(cfg)
        flat = dict(leaves("data", whole.get("data")))
        if not has_own_units(str(self.metric)):
            flat |= {"loop._target_": (whole.get("loop") or {}).get("_target_")}
            for part in ("codec", "model"):
                flat |= dict(leaves(part, whole.get(part)))
        dropped = [f"data.{key}" for key in DATA] + [f"model.{key}" for key in MODEL]
        return {key: value for key, value in flat.items() if not f"{key}.".startswith(tuple(f"{d}." for d in dropped))}

    def sentence(self, axis: str, key: str, value: object) -> str:
        """Return the error for a metric that is not comparable over an axis."""
        because = "" if axis == key else f" ({key} becomes {value})"
        if has_own_units(str(self.metric)):
            return (
                f"sweep.metric={self.metric} does not compare over {axis}{because}, since figures of different data are of no "
                "common scale: sweep over something else, or give sweep.metric=null for no ranking"
            )
        return (
            f"sweep.metric={self.metric} does not compare over {axis}{because}, since that changes what a loss means: give a "
            "metric of samples, such as sweep.metric=card/frechet callbacks.cards.every_steps=1000 "
            "callbacks.cards.metrics=[frechet], or sweep.metric=null for no ranking"
        )


def has_own_units(metric: str) -> bool:
    """Tell whether a metric's units do not depend on the model: those of conf/metrics.yaml, on cards or validation data."""
    if metric.startswith("card/") or metric.rpartition("/")[2].startswith("loss"):
        return metric.startswith("card/")
    return metric.rpartition("/")[2] in OmegaConf.load(Path(conf_dir()) / "metrics.yaml")


def leaves(prefix: str, node: object) -> Iterable[tuple[str, Any]]:
    """Yield (dotted key, value) of all leaves of a node; a list counts as a value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(f"{prefix}.{key}", value)
    else:
        yield prefix, node
