"""Build objects from configs: `build_typed` for what the user typed, `build_stored` for what a checkpoint file says.

A checkpoint may come from anywhere, and every `_target_` in its config is a function call. A stored config therefore builds
only the targets listed below and those of packages that the user trusts (`trust=`), and is checked as a whole before the first
call.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from genai.checkpoint.size_limit import SizeLimit
from genai.core import stored
from genai.core.errors import UserError
from genai.data.base import Data
from genai.modalities.base import Modality

MODELS, DATA, RUN, MODALITIES = "models", "data", "run", "modalities"
"""The kinds of objects that a file may build.

MODELS (with networks, losses, samplers) always; DATA when the user resumes, evaluates or samples from data items; RUN
(callbacks, loggers, optimisers, loops) when the user resumes; MODALITIES only in `build_modality`.
"""

MODEL_PACKAGES = ("genai.models.", "genai.nn.", "genai.losses.")
"""Packages of which any public class or function may be built: none of them writes files, downloads or starts processes."""

PARTS = (stored.PRETRAINED,)
"""Functions of other packages that may appear inside a model's config; they return the module that they are given."""

RUN_TARGETS = (
    "genai.evaluation.features.inception",
    "genai.evaluation.features.classifier",
    "genai.evaluation.features.module",
    "genai.train.callbacks.Cards",
    "genai.train.callbacks.Evaluate",
    "genai.train.callbacks.Samples",
    "genai.train.callbacks.Save",
    "genai.train.ema.EMA",
    "genai.train.lit.LitModel",
    "genai.train.lit_adversarial.LitAdversarial",
    "genai.train.optim.adamw",
    "genai.train.optim.muon",
    "genai.train.trackers.none",
    "genai.train.trackers.tensorboard",
    "genai.train.trackers.wandb",
)
METRICS = "genai.evaluation.metrics"
"""Module whose classes a resumed run may build too; none of them writes files, downloads or starts processes."""
# Largest integer in a model's stored config, such as a count of steps, unless its weights have more elements.
MAX_INTEGER = 10**7
MAX_DEPTH = 64  # nesting of nodes in a stored config


def build_typed(node: Any) -> Any:
    """Instantiate a config node that the user typed or chose, inner nodes first.

    Raises UserError for an argument that a target does not take.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause, message = error.__cause__, str(error).splitlines()
        while cause is not None and isinstance(cause.__cause__, Exception) and not isinstance(cause, UserError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        refused = {"locating", "blocklisted"} & set(message[0].split())
        if (isinstance(cause, TypeError) and "argument" in str(cause)) or refused:
            raise UserError(
                f"{node.get('_target_')} cannot be built: {cause or ' '.join(message).partition('. ')[0]}"
            ) from error
        raise (cause or error) from None


def build_stored(
    node: object,
    trust: Sequence[str] = (),
    kinds: Sequence[str] = (MODELS,),
    weights: Mapping[str, Tensor] | None = None,
) -> Any:
    """Build a config node that was read from a checkpoint file, inner nodes first.

    Args:
        node: plain values: dicts (with `_target_` where something is built), lists, strings, numbers, booleans and None.
        trust: packages whose classes and functions may be built too.
        kinds: what may be built, any of MODELS, DATA and RUN.
        weights: for a model, the file's tensors by name. Building a model with far more elements than these is stopped,
            unless a package is trusted.

    Raises UserError for a node of other values, a target that is not admitted, and any error while building.
    """
    elements = sum(tensor.numel() for tensor in (weights or {}).values())
    # The config of a run holds step counts of any size; that of a model holds sizes, which its weights bound.
    largest = None if RUN in kinds else max(MAX_INTEGER, elements)
    call = _check_node(node, "", lambda target: check_target(target, trust, kinds), largest, 0)
    larger = _refusal("it describes a model that is far larger than the file's weights")
    size_limit = contextlib.nullcontext() if weights is None or trust else SizeLimit(elements, len(weights), larger)
    with stored.build_context(), size_limit:
        return _build(call, bool(trust))


def build_modality(node: Any, trust: Sequence[str] = ()) -> Modality:
    """Restore a modality from its `_target_` and `state` in a file; the state is plain data, nothing in it is called.

    Raises UserError for a target that is not admitted, and for an invalid state.
    """
    kind: Any = check_target(node["_target_"], trust, (MODALITIES,))
    if not (inspect.isclass(kind) and issubclass(kind, Modality)):
        raise UserError(f"the checkpoint wants to build {node['_target_']}, which is not a modality")
    try:
        with stored.build_context():
            return kind.from_state(node["state"])
    except Exception as error:
        if trust and not isinstance(error, UserError):
            raise  # an error in the user's own code needs its traceback
        raise UserError(f"the checkpoint's modalities are refused: {kind.__name__}: {reason(error)}") from error


def check_stored(node: object, trust: Sequence[str] = (), kinds: Sequence[str] = (MODELS,)) -> None:
    """Raise UserError for a config node of a file that is more than data, or names a target that is not admitted."""
    _check_node(node, "", lambda target: check_target(target, trust, kinds), None, 0)


class Call(NamedTuple):
    """A checked node: the call `target(**arguments)`, or `functools.partial` of it."""

    target: Callable[..., Any]
    arguments: dict[str, Any]
    partial: bool


def _check_node(
    node: Any, key: str, check: Callable[[Any], Callable[..., Any]], largest: int | None, depth: int
) -> Any:
    """Replace every dict with a `_target_` by a Call. Raises UserError for values that are not plain."""
    kind = type(node)  # compared exactly: a subclass of dict or str could run code of its own
    if depth > MAX_DEPTH:
        raise _refusal(f"{key[:40]}... is nested more than {MAX_DEPTH} times")
    if kind is list:
        return [_check_node(value, f"{key}[{i}]", check, largest, depth + 1) for i, value in enumerate(node)]
    if kind is dict:
        for name in node:
            if type(name) is not str:
                raise _refusal(f"{key or 'it'} has the key {name!r}, and only strings may be keys")
            if name.startswith("_") and name not in ("_target_", "_partial_"):
                raise _refusal(
                    f"it has the key {name}; of keys with an underscore only _target_ and _partial_ are allowed"
                )
        target = check(node["_target_"]) if "_target_" in node else None
        if type(node.get("_partial_", False)) is not bool:
            raise _refusal(f"the _partial_ of {node.get('_target_')} must be true or false")
        values = {
            name: _check_node(value, f"{key}.{name}".lstrip("."), check, largest, depth + 1)
            for name, value in node.items()
            if name not in ("_target_", "_partial_")
        }
        return values if target is None else Call(target, values, node.get("_partial_", False))
    if kind not in (str, int, float, bool, type(None)):
        raise _refusal(
            f"{key or 'it'} is a {kind.__name__}, and only dicts, lists, strings, numbers, true, false and null may be"
        )
    if kind is str and "${" in node:
        raise _refusal(f"{node!r} is an interpolation; a stored config must hold values only")
    if kind is int and largest is not None and abs(node) > largest:
        raise _refusal(f"{key}={node:.3g} is out of proportion to the file's weights: it must be at most {largest:,}")
    return node


def _refusal(reason: str) -> UserError:
    return UserError(f"the checkpoint's config is refused: {reason}")


def _build(node: object, trusted: bool) -> Any:
    """Carry out the Calls of a checked node, inner ones first."""
    if type(node) is list:
        return [_build(value, trusted) for value in node]
    if type(node) is dict:
        return {name: _build(value, trusted) for name, value in node.items()}
    if not isinstance(node, Call):
        return node
    arguments = {name: _build(value, trusted) for name, value in node.arguments.items()}
    if node.partial:
        return functools.partial(node.target, **arguments)
    try:
        return node.target(**arguments)
    except UserError:
        raise
    except Exception as error:
        name = f"{node.target.__module__}.{node.target.__qualname__}"
        if trusted and not (isinstance(error, TypeError) and "argument" in str(error)):
            raise  # an error in the user's own code needs its traceback
        raise UserError(f"{name} cannot be built from the checkpoint's config: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_target(target: Any, trust: Sequence[str] = (), kinds: Sequence[str] = (MODELS,)) -> Callable[..., Any]:
    """Import and return the class or function that `target` names.

    Raises UserError unless a file may build it: it must be public, defined in the module that the target names (not imported
    there), and in one of the packages admitted for `kinds` or trusted.
    """
    wants = f"the checkpoint wants to build {target}"
    module, _, name = target.rpartition(".") if type(target) is str else ("", "", "")
    if not (module and all(part.isidentifier() for part in target.split("."))):
        raise UserError(f"{wants}, which names no class or function")
    trusted = f"{module}.".startswith(tuple(f"{package}." for package in trust))
    listed = RUN in kinds and (target in RUN_TARGETS or module == METRICS)
    modality = MODALITIES in kinds and module.startswith("genai.modalities.")
    data = DATA in kinds and module.startswith("genai.data.")
    if not (trusted or listed or modality or data or target in PARTS or f"{module}.".startswith(MODEL_PACKAGES)):
        package = target.partition(".")[0]
        hint = f"; if you trust it, add trust={package}" if package not in ("genai", "os", "builtins") else ""
        what = "models" if DATA not in kinds else "models and data"
        raise UserError(f"{wants}, which is not one of genai's {what}{hint}")
    try:
        found = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError):
        raise UserError(f"{wants}, which is not defined in a module of that name") from None
    builds = inspect.isclass(found) or inspect.isfunction(found)
    if not builds or f"{found.__module__}.{found.__qualname__}" != target:
        raise UserError(f"{wants}, which is not a class or function defined there")
    if not trusted and name.startswith("_"):
        raise UserError(f"{wants}, which is not public")
    if data and not trusted and not _returns_data(found):
        raise UserError(f"{wants}, which is not a data set")
    return found


def _returns_data(found: object) -> bool:
    """Return True for a subclass of Data, and for a function that is annotated to return one."""
    try:
        made = found if inspect.isclass(found) else get_type_hints(found).get("return")
    except NameError:  # an annotation that is imported for type checkers only
        return False
    return inspect.isclass(made) and issubclass(made, Data)


def packages_of(node: object) -> tuple[str, ...]:
    """Return the packages other than genai that a config's targets are in, sorted."""
    if isinstance(node, dict):
        below = {package for value in node.values() for package in packages_of(value)}
        return tuple(
            sorted(below | ({str(node["_target_"]).partition(".")[0]} - {"genai"} if "_target_" in node else set()))
        )
    if isinstance(node, list):
        return tuple(sorted({package for value in node for package in packages_of(value)}))
    return ()
