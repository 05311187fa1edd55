"""Every value of a config is in its range, and keys keep what they must between them, before torch is imported and before
anything is written. What lies in a node whose `_target_` is not of this project is its author's business."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai.core.errors import UserError
from genai.ranges.kinds import Choice, Range, format_value
from genai.ranges.table import RANGES, TARGET, TIES


def matches(pattern: Sequence[str], key: Sequence[str]) -> bool:
    """Whether a key's parts are of a pattern, in which * is one part and ** any number of them."""
    if not pattern or not key:
        return not pattern and not key
    if pattern[0] == "**":
        return any(matches(pattern[1:], key[i:]) for i in range(len(key)))
    return pattern[0] in ("*", key[0]) and matches(pattern[1:], key[1:])


Rows = dict[str, list[tuple[int, list[str], Any]]]


def index_by_last_part(table: Mapping[str, Any]) -> Rows:
    """The rows of a table of patterns, with their place in it, under the last part of each."""
    found: Rows = {}
    for place, (pattern, said) in enumerate(table.items()):
        parts = pattern.split(".")
        found.setdefault(parts[-1], []).append((place, parts, said))
    return found


def first_match(rows: Rows, *names: str) -> Any:
    """What the first pattern says that matches a key by its first name, else by the next; None if none does."""
    for key in (name.split(".") for name in names):
        for _, pattern, said in sorted((*rows.get(key[-1], ()), *rows.get("*", ())), key=lambda row: row[0]):
            if matches(pattern, key):
                return said
    return None


@functools.cache
def range_of(*names: str) -> Any:
    """The row of RANGES for a key under any of its names; None for one that nothing is said of."""
    return first_match(ROWS, *names)


ROWS = index_by_last_part(RANGES)


@dataclass(frozen=True)
class Leaf:
    """One key of a config: as a person writes it, the names it is looked up by, its value, and whether that is taken from
    another key."""

    key: str
    names: tuple[str, ...]
    value: Any
    interpolated: bool = False


def leaves(cfg: DictConfig, script: str) -> Iterator[Leaf]:
    """Every key of a config of which something can be said: not below a node that is built from somebody else's package."""
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
                waits = found is None and not key.startswith("data.")  # for what the data will say
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
    """Raise UserError for the first value of the config of `script` that is out of its range, or breaks a rule.

    Args:
        given: the command line's overrides; of a run that is resumed they alone are checked, for it goes on as it began.
        before: the keys that there were without them; an added one must be read by something.
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


def sentence(range_: Range, value: Any) -> str:
    """What follows "key=value"."""
    if isinstance(range_, Choice) and range_.values != (True, False):
        return f"must be one of {', '.join(map(format_value, range_.values))}{', null' if range_.null else ''}"
    return f"must be {range_}"


def is_read(cfg: DictConfig, key: str) -> bool:
    """Whether a key that is added has a reader: a constructor, a table of baselines, the callbacks, or a value that refers to
    it."""
    head, *rest = key.split(".")[:-1] or [""]
    paths = [".".join([head, *rest[:i]]) for i in range(len(rest) + 1)]
    if any(OmegaConf.is_dict(node := OmegaConf.select(cfg, path)) and "_target_" in node for path in paths if path):
        return True
    return (head in ("callbacks", "rows", "reference") and head in cfg) or f"${{{key}" in str(
        OmegaConf.to_container(cfg)
    )


# What keys must keep between them


def _schedule(cfg: DictConfig, typed: set[str]) -> None:
    """A learning rate warms up, then decays. A run shorter than the warm-up its config came with stays in it, as ever."""
    for name in ("optim", "discriminator_optim"):
        node = cfg.get(name)
        if not OmegaConf.is_dict(node) or not {"warmup_steps", "decay_steps", "lr", "lr_min"} <= set(node):
            continue
        stated = not OmegaConf.is_interpolation(node, "decay_steps") or f"{name}.warmup_steps" in typed
        if stated and node.decay_steps is not None and node.decay_steps <= node.warmup_steps:
            raise UserError(
                f"{name}.warmup_steps={node.warmup_steps} must be below {name}.decay_steps={node.decay_steps} steps: the rate "
                "first rises, then falls (decay_steps=null: never)"
            )
        if "adamw_lr" not in node and node.lr_min > node.lr:
            raise UserError(
                f"{name}.lr_min={node.lr_min} must be at most {name}.lr={node.lr}, where the rate falls from"
            )


def _average(cfg: DictConfig, typed: set[str]) -> None:
    if OmegaConf.select(cfg, "ema.decay") == 1 and cfg.ema.get("power", 1) is None and cfg.ema.get("ramp") is None:
        raise UserError("ema.decay=1 with ema.power=null never moves from the first weights: give ema.decay below 1")


def _ends(cfg: DictConfig, typed: set[str]) -> None:
    """Pairs of which one must be the smaller."""
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
    """Raise UserError for a fact of the data, or of the model, that one of its parts was told otherwise.

    What the data has yet to say is null in `data` and passes; run once more when it has. A model may leave classes out.
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


def _parts(cfg: DictConfig, typed: set[str]) -> None:
    if OmegaConf.is_dict(cfg.get("model")) and OmegaConf.is_dict(cfg.get("data")):
        check_agreement(cfg)


RULES: tuple[Callable[[DictConfig, set[str]], None], ...] = (_schedule, _average, _ends, _parts)
