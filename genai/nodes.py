"""Config nodes whose `_target_` changes, by a file merged over others or on the command line.

Such a node builds another object: of its old keys those stay that the new target takes by name, and what comes with the
change is merged over them. So no key of the old object is left for the new one to fail on.
"""

import functools
import inspect
import pydoc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genai.core.errors import UserError

COMPLETED = ("loop", "logger")  # nodes whose missing arguments the run supplies


@functools.cache
def parameters(target: str, node: str = "") -> dict[str, inspect.Parameter]:
    """Return what a class or function takes by name, under `**` what takes any name.

    Raises UserError, which names the path of the node, if there is no such target.
    """
    given = f"{node}{'.' if node else ''}_target_={target}"
    try:
        found: Any = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"{given} cannot be imported ({error.value!r}): mend it, or name another") from error
    if found is None:
        raise UserError(f"{given} cannot be found: give the dotted name of a class or function")
    if getattr(getattr(found, "__init__", None), "__module__", "") == "torch.nn.modules.module":
        return {}  # whose *args and **kwargs refuse all
    try:
        signature = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        raise UserError(f"{given} is not a class or function: give the dotted name of one") from None
    named = [p for p in signature if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    return {"**" if p.kind is p.VAR_KEYWORD else p.name: p for p in named}


def drop_stale_keys(cfg: DictConfig, change: DictConfig, path: str = "") -> Iterator[str]:
    """Drop the keys of cfg that a change must not be merged with; yields the dotted path of each node concerned.

    These are the nodes that had keys and get another `_target_`. Raises UserError for a target that does not exist.
    """
    for name in change:
        old: Any = cfg._get_node(name, validate_access=False)
        new: Any = change._get_node(name)
        if not (_has_keys(old) and _has_keys(new)):
            continue
        target, before = target_of(new), target_of(old)
        if target and before and target != before:
            own = [key for key in old if not str(key).startswith("_")]
            for key in [key for key in own if key not in parameters(target, f"{path}{name}")]:
                del old[key]
            if own:
                yield f"{path}{name}"
        yield from drop_stale_keys(old, new, f"{path}{name}.")


def target_of(node: Any) -> str:
    """Return the target of a node, "" if it is not a dotted name."""
    found = node._get_node("_target_", validate_access=False) if _has_keys(node) else None
    target = None if found is None else found._value()
    return target if isinstance(target, str) and all(part.isidentifier() for part in target.split(".")) else ""


def arguments(node: Any) -> dict[str, str]:
    """Return the options of a node by name, each with its dotted path below the node: its own keys, then those of
    nodes in it."""
    own = {str(key): str(key) for key in node if not str(key).startswith("_")}
    for key in [key for key in own if isinstance(node[key], Mapping | DictConfig) and "_target_" in node[key]]:
        own = {**{name: f"{key}.{path}" for name, path in arguments(node[key]).items()}, **own}
    return own


def name_of(sampler: Any) -> str:
    """Return the name of a sampler's node: that of its solver, if it has one."""
    return str((sampler.get("solver") or sampler).get("_target_")).rpartition(".")[2]


def _has_keys(node: object) -> bool:
    return isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()


def check(cfg: DictConfig, paths: Iterable[str]) -> None:
    """Raise UserError unless the nodes at these paths have the keys that their targets need, and no others."""
    for path in paths:
        node = OmegaConf.select(cfg, path)
        if not (target := target_of(node)):
            continue
        takes = parameters(target, path)
        extra = [str(key) for key in node if not str(key).startswith("_") and not takes.keys() & {key, "**"}]
        if extra:
            names = ", ".join(takes) or "nothing"
            raise UserError(f"{path}.{extra[0]} is nothing that {target} takes: it takes {names}")
        needs = [name for name, p in takes.items() if p.default is p.empty and name != "**" and name not in node]
        if needs and not node.get("_partial_") and path not in COMPLETED:
            raise UserError(
                f"{path}._target_={target} needs {' and '.join(needs)}: add {' '.join(f'{path}.{name}=' for name in needs)}"
            )
