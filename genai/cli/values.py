"""Sets values of a composed config, checked against the keys and types that it has."""

from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from genai import nodes
from genai.cli.errors import nearest
from genai.core.errors import UserError
from genai.ranges import check as ranges


def keys(cfg: DictConfig, prefix: str = "") -> Iterable[str]:
    """Yield every dotted key of cfg, of groups as well as of values."""
    for key in cfg:
        yield f"{prefix}{key}"
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from keys(node, f"{prefix}{key}.")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return every value below a node by its dotted key; a list is one value."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {
        key: value
        for name, part in node.items()
        for key, value in flatten(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def apply_all(cfg: DictConfig, overrides: Iterable[Override], parts: dict[str, None]) -> None:
    """Set values as `apply` does, a node's `_target_` before its keys, and check the nodes with a new target.

    Args:
        parts: paths of the nodes that have a new target already, from files.

    Raises:
        UserError: as `apply` does, or a node lacks an argument that its target needs.
    """

    def order(override: Override) -> tuple[bool, int]:
        key, value = override.key_or_group, override.value()
        changes = key.endswith("._target_") or (isinstance(value, dict) and "_target_" in value)
        return not changes, key.count(".") if changes else 0

    for override in sorted(overrides, key=order):
        apply(cfg, override, parts)
    nodes.check(cfg, parts)


def apply(cfg: DictConfig, override: Override, parts: dict[str, None] | None = None) -> None:
    """Set one value; if it gives a node a `_target_`, the path of that node is added to `parts`, see `genai.nodes`.

    Raises UserError if there is no such key, or the value has another type than the present one.
    """
    key, parts = override.key_or_group, {} if parts is None else parts
    node, _, name = key.rpartition(".")
    if override.is_delete():
        raise UserError(f"{override.input_line} would remove a key: set it to null instead")
    known = list(keys(cfg))
    free = name == "_target_" and (node in known or _takes_argument(cfg, node, parts)) and not _node_at(cfg, node)
    if not override.is_add() and key not in known and not free and not _takes_argument(cfg, key, parts):
        adds = f"; +{key}= adds one" if "." in key and ranges.is_read(cfg, key) else ""
        raise UserError(f"there is no key {key}{nearest(key, known)} (--help lists all{adds})")
    value = override.value()
    present = _node_at(cfg, key) if key in known else None  # of a fact that the data are still to say: None
    change = OmegaConf.create()
    OmegaConf.update(change, key, value, force_add=True)
    parts |= dict.fromkeys(nodes.drop_stale_keys(cfg, change))
    if name == "_target_" or (isinstance(value, dict) and "_target_" in value):
        parts[node if name == "_target_" else key] = None
    OmegaConf.update(cfg, key, convert_value(key, value, present), force_add=True, merge=True)


def _takes_argument(cfg: DictConfig, key: str, parts: Iterable[str]) -> bool:
    """Return True if `key` is an argument of the new `_target_` of one of the nodes at `parts`."""
    node, _, name = key.rpartition(".")
    target = nodes.target_of(_node_at(cfg, node)) if node in parts else ""
    return target != "" and bool(nodes.parameters(target).keys() & {name, "**"})


def _node_at(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_missing=False, throw_on_resolution_failure=False)


def convert_value(key: str, value: Any, present: Any) -> Any:
    """Return a value converted to the type of the present one. Raises UserError if it cannot be."""
    if value is None and isinstance(present, DictConfig) and "." not in key:
        raise UserError(f"{key}=null would delete a group of keys ({', '.join(map(str, present))}): set one of them")
    if value is None or present is None:
        return value
    if isinstance(present, bool):
        ok, kind = isinstance(value, bool), "true or false"
    elif isinstance(present, int):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        ok, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif isinstance(present, float):
        ok, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif isinstance(present, str):
        value = str(value) if isinstance(value, int | float) else value
        ok, kind = isinstance(value, str), "a string"
    elif OmegaConf.is_list(present):
        ok, kind = isinstance(value, list), "a list like [1,2]"
    else:
        module, _, name = nodes.target_of(present).rpartition(".")
        such = f", such as {key}._target_={module}.{value}" if name and str(value).isidentifier() else ""
        ok, kind = isinstance(value, dict), f"a group of keys ({', '.join(map(str, present))}): set one of them{such}"
    if not ok:
        raise UserError(f"{key}={value} must be {kind}")
    return value
