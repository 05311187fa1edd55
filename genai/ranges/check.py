"""Check that every value of a config is in its range, and that related keys are consistent.

This is done before torch is imported and before anything is written. Nodes with a `_target_` of another package are not checked.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai.core.errors import UserError
from genai.ranges.kinds import Choice, Range, format_value
from genai.ranges.table import RANGES, SEPARATING, SHAPED, TARGET, TIES


def matches(pattern: Sequence[str], key: Sequence[str]) -> bool:
    """Tell whether a key's parts match a pattern, in which * stands for one part and ** for any number of them."""
    if not pattern or not key:
        return not pattern and not key
    if pattern[0] == "**":
        return any(matches(pattern[1:], key[i:]) for i in range(len(key)))
    return pattern[0] in ("*", key[0]) and matches(pattern[1:], key[1:])


Rows = dict[str, list[tuple[int, list[str], Any]]]


def index_by_last_part(table: Mapping[str, object]) -> Rows:
    """Index the rows of a table of patterns, with their positions, by the last part of each pattern."""
    found: Rows = {}
    for place, (pattern, said) in enumerate(table.items()):
        parts = pattern.split(".")
        found.setdefault(parts[-1], []).append((place, parts, said))
    return found


def first_match(rows: Rows, *names: str) -> Any:
    """Return the row of the first pattern that matches a key under its first name, else under the next; None if none does."""
    for key in (name.split(".") for name in names):
        for _, pattern, said in sorted((*rows.get(key[-1], ()), *rows.get("*", ())), key=lambda row: row[0]):
            if matches(pattern, key):
                return said
    return None


@functools.cache
def range_of(*names: str) -> Any:
    """Return the range of a key from RANGES, by any of its names; None if the table does not have it."""
    return first_match(ROWS, *names)


ROWS = index_by_last_part(RANGES)


@dataclass(frozen=True)
class Leaf:
    """One key of a config.

    Attributes:
        key: dotted, as on the command line.
        names: under which the table may have it.
        value: of the key.
        interpolated: whether the value is taken from another key.
    """

    key: str
    names: tuple[str, ...]
    value: Any
    interpolated: bool = False


def leaves(cfg: DictConfig, script: str) -> Iterator[Leaf]:
    """Yield every key of a config, except below nodes with a `_target_` of another package."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)

    def walk(node: dict[Any, Any], path: str, pattern: str, owner: str) -> Iterator[Leaf]:
        target = str(node.get("_target_", owner))
        if "_target_" in node and not target.startswith("genai.") and TARGET.holds(node["_target_"]):
            return
        for part, value in node.items():
            key, name = f"{path}{part}", f"{pattern}{part}"
            names = name if "." in str(part) else f"{target.rpartition('.')[2]}:{part}", name
            if isinstance(value, str) and "${" in value:
                try:
                    found = OmegaConf.select(cfg, key)
                except OmegaConfBaseException:
                    continue
                if OmegaConf.is_list(found):
                    found = OmegaConf.to_container(found)
                waits = found is None and not key.startswith("data.")  # filled in once the data are built
                if not waits and not OmegaConf.is_config(found):
                    yield Leaf(key, names, found, interpolated=True)
                continue
            yield Leaf(key, names, value)
            if isinstance(value, dict):
                yield from walk(value, f"{key}.", f"{name}.", target if "_target_" in value else "")
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, dict):
                        yield from walk(item, f"{key}[{i}].", "baseline.", str(item.get("baseline")))

    yield from walk(raw, "", "", f"genai.{script}")


def check(cfg: DictConfig, script: str, given: Iterable[Any] = (), before: Iterable[str] = ()) -> None:
    """Raise UserError for the first value of the config of `script` that is out of its range or breaks a rule.

    Args:
        given: the overrides of the command line; for a resumed run only these are checked.
        before: the keys of the config without them; a key that they add must be used by something.
    """
    given = list(given)
    typed = {o.key_or_group for o in given}
    for override in given:
        if override.is_add() and override.key_or_group not in before and not is_read(cfg, override.key_or_group):
            raise UserError(f"nothing reads {override.input_line.lstrip('+')}: leave it out (--help lists every key)")
    resumed = cfg.get("resume") is not None
    for leaf in sorted(leaves(cfg, script), key=lambda leaf: leaf.interpolated):
        if resumed and leaf.key not in typed:
            continue
        range_ = range_of(*leaf.names)
        if range_ is not None and not range_.holds(leaf.value):
            raise UserError(f"{leaf.key}={format_value(leaf.value)} {sentence(range_, leaf.value)}")
    for rule in () if resumed else RULES:
        rule(cfg, typed)


def sentence(range_: Range, value: object) -> str:
    """Return the part of the error after "key=value"."""
    if isinstance(range_, Choice) and range_.values != (True, False):
        return f"must be one of {', '.join(map(format_value, range_.values))}{', null' if range_.null else ''}"
    return f"must be {range_}"


def is_read(cfg: DictConfig, key: str) -> bool:
    """Tell whether an added key is used: by a constructor, a table of baselines, the callbacks, or an interpolation."""
    head, *rest = key.split(".")[:-1] or [""]
    paths = [".".join([head, *rest[:i]]) for i in range(len(rest) + 1)]
    if any(OmegaConf.is_dict(node := OmegaConf.select(cfg, path)) and "_target_" in node for path in paths if path):
        return True
    return (head in ("callbacks", "rows", "reference") and head in cfg) or f"${{{key}" in str(
        OmegaConf.to_container(cfg)
    )


# Rules between keys


def _check_schedule(cfg: DictConfig, typed: set[str]) -> None:
    """Check that the warm-up of a learning rate ends before its decay.

    A run that is shorter than the default warm-up of its config is allowed: it ends during the warm-up.
    """
    for name in ("optim", "discriminator_optim"):
        node = cfg.get(name)
        if not OmegaConf.is_dict(node) or not {"warmup_steps", "decay_steps", "lr", "lr_min"} <= set(node):
            continue
        explicit = not OmegaConf.is_interpolation(node, "decay_steps") or f"{name}.warmup_steps" in typed
        if explicit and node.decay_steps is not None and node.decay_steps <= node.warmup_steps:
            raise UserError(
                f"{name}.warmup_steps={node.warmup_steps} must be below {name}.decay_steps={node.decay_steps} steps: the rate "
                "first rises, then falls (decay_steps=null: never)"
            )
        if "adamw_lr" not in node and node.lr_min > node.lr:
            raise UserError(
                f"{name}.lr_min={node.lr_min} must be at most {name}.lr={node.lr}, where the rate falls from"
            )


def _check_ema(cfg: DictConfig, typed: set[str]) -> None:
    """Check that an average of weights moves at all."""
    if OmegaConf.select(cfg, "ema.decay") == 1 and cfg.ema.get("power", 1) is None and cfg.ema.get("ramp") is None:
        raise UserError("ema.decay=1 with ema.power=null never moves from the first weights: give ema.decay below 1")


def _check_order(cfg: DictConfig, typed: set[str]) -> None:
    """Check pairs of keys of which the first must be smaller."""
    for low, high in (
        ("model.schedule.log_snr_min", "model.schedule.log_snr_max"),
        ("model.sigma_min", "model.sigma_max"),
        ("sampler.sigma_min", "sampler.sigma_max"),
    ):
        least, most = _at(cfg, low), _at(cfg, high)
        if least is not None and most is not None and not least < most:
            raise UserError(f"{low}={least} must be below {high}={most}")
    for key, axis in (OmegaConf.select(cfg, "sweep.over") or {}).items():
        if OmegaConf.is_dict(axis) and {"low", "high"} <= set(axis) and not axis.low < axis.high:
            raise UserError(f"sweep.over.{key}.low={axis.low} must be below its high={axis.high}")


def _at(cfg: DictConfig, key: str) -> Any:
    try:
        value = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return None
    return OmegaConf.to_container(value) if OmegaConf.is_list(value) else value


TIED = index_by_last_part(TIES)


def check_agreement(cfg: DictConfig) -> None:
    """Raise UserError for a model of another kind of data than those that were built, or as `_check_ties` does."""
    model, shape = cfg.model, cfg.data.get("shape")
    if str(model.get("_target_")).startswith("genai.models.") and shape is not None:
        for key, range_ in SHAPED.items() if "shape" in model else ():
            if not range_.holds(value := _at(cfg, key)):
                raise UserError(f"{key}={format_value(value)} must be {range_}")
        if _at(cfg, "model.net.dim") is not None and len(shape) != 1:
            raise UserError(
                f"this model takes vectors (model.net.dim), but this data has shape {format_value(list(shape))}: choose "
                "data=toy2d, or another model="
            )
    _check_ties(cfg)


def _check_ties(cfg: DictConfig) -> None:
    """Raise UserError for a part of the model that is configured for another shape, number of classes or the like than the data.

    Facts that are null in `data` are not checked before the data are built. A model may ignore classes.
    """
    for leaf in leaves(cfg, "train"):
        if not leaf.key.startswith(("model.", "codec.")):
            continue
        sources = first_match(TIED, *leaf.names) or ()
        source = next((s for s in sources if OmegaConf.select(cfg, s.partition("[")[0]) is not None), None)
        if leaf.key == "model.classes" and leaf.value is None:
            continue
        if leaf.key.endswith(".classes") and "classes" in cfg.model and leaf.key != "model.classes":
            source = "model.classes"
        if source is not None and leaf.value != (wanted := _at(cfg, source)):
            raise UserError(
                f"{leaf.key}={format_value(leaf.value)} must be what {source} is, {format_value(wanted)}: give both the same"
            )


def _check_parts(cfg: DictConfig, typed: set[str]) -> None:
    if OmegaConf.is_dict(cfg.get("model")) and OmegaConf.is_dict(cfg.get("data")):
        _check_ties(cfg)
        target = str(cfg.model.get("_target_"))
        if cfg.data.get("separate") is True and target.startswith("genai.models.") and target not in SEPARATING:
            raise UserError(
                f"data.separate=true is for a model that keeps documents apart, such as model=gpt, and not for a "
                f"{target.rpartition('.')[2]}: leave it out"
            )
        for key in ("specials", "source_specials"):
            if cfg.model.get(key) is True and key not in cfg.data and target.startswith("genai.models."):
                raise UserError(
                    f"model.{key}=true is for data whose vocabulary has special ids, and this has no data.{key}: choose "
                    f"{'a text' if key == 'specials' else 'texts with labels'} with data="
                )
        if cfg.data.get("words") is True and target.startswith("genai.models.") and "whole_words" not in cfg.model:
            raise UserError(
                f"data.words=true is for a model that hides whole words, such as model=bert, and not for a "
                f"{target.rpartition('.')[2]}: leave it out"
            )


RULES: tuple[Callable[[DictConfig, set[str]], None], ...] = (_check_schedule, _check_ema, _check_order, _check_parts)
