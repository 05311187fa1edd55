"""The one place where a config becomes objects: what the user typed by `build_typed`, what a file says by `build_stored`.

A file may have been written by somebody else, and a `_target_` is a call. So a stored config builds only what the register
below admits, and packages the user admits with `trust=`; all of it is checked before anything is called.
"""

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genai.core import stored
from genai.core.errors import UserError
from genai.data.base import Data
from genai.modalities.base import Modality

MODELS, DATA, RUN, MODALITIES = "models", "data", "run", "modalities"
"""The kinds of object that a file may build: models with their networks, losses and samplers always; data sets where the user
asks to resume, to evaluate or to draw items; callbacks, loggers, optimisers and loops where the user asks to resume; modalities
by `build_modality` alone."""

MODEL_PACKAGES = ("genai.models.", "genai.nn.", "genai.losses.")
"""Any public class or function that is defined there: nothing there writes, downloads or runs."""

PARTS = (stored.PRETRAINED,)
"""Functions of other rooms that may be part of a model: they give back the module that they are given."""

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
"""Of a run too: nothing there writes, downloads or runs."""
LARGEST = 10**7  # number in a stored config that no weight stands for, such as a count of steps
DEPTH = 64  # of nodes in nodes


def build_typed(node: Any) -> Any:
    """Instantiate a config node that the user typed or chose, everything inside it first.

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
    node: Any, trust: Sequence[str] = (), kinds: Sequence[str] = (MODELS,), weights: Mapping[str, Tensor] | None = None
) -> Any:
    """Build what a config node in a file says, everything inside it first.

    Args:
        trust: packages whose classes and functions may be built too.
        kinds: what may be built, of MODELS, DATA and RUN.
        weights: for a model, the file's own; what makes far more tensors or numbers is stopped, unless a package is trusted.

    Raises UserError for a node that is more than data, a target that is not admitted, and whatever goes wrong in building.
    """
    numbers = sum(tensor.numel() for tensor in (weights or {}).values())
    largest = None if RUN in kinds else max(LARGEST, numbers)
    call = _checked(node, "", lambda target: check_target(target, trust, kinds), largest, 0)
    bound = contextlib.nullcontext() if weights is None or trust else _Bounded(numbers, len(weights))
    with stored.building(), bound:
        return _made(call, bool(trust))


def build_modality(node: Any, trust: Sequence[str] = ()) -> Modality:
    """The modality that a file describes by a target and a state, which is data: nothing in it is called.

    Raises UserError for a target that is not admitted, and for a state that describes none.
    """
    kind: Any = check_target(node["_target_"], trust, (MODALITIES,))
    if not (inspect.isclass(kind) and issubclass(kind, Modality)):
        raise UserError(f"the checkpoint wants to build {node['_target_']}, which is not a modality")
    try:
        with stored.building():
            return kind.from_state(node["state"])
    except Exception as error:
        if trust and not isinstance(error, UserError):
            raise  # code of the user's own is better mended with a traceback
        raise UserError(f"the checkpoint's modalities are refused: {kind.__name__}: {reason(error)}") from error


class Call(NamedTuple):
    """A checked node: `target(**arguments)`, or a partial of it."""

    target: Callable[..., Any]
    arguments: dict[str, Any]
    partial: bool


def _checked(node: Any, key: str, check: Callable[[Any], Any], largest: int | None, depth: int) -> Any:
    """The node with a Call in the place of every dict that has a target. Raises UserError for what is more than data."""
    kind = type(node)
    if depth > DEPTH:
        raise _refusal(f"{key[:40]}... is nested more than {DEPTH} times")
    if kind is list:
        return [_checked(value, f"{key}[{i}]", check, largest, depth + 1) for i, value in enumerate(node)]
    if kind is dict:
        for name in node:
            if type(name) is not str:
                raise _refusal(f"{key or 'it'} has the key {name!r}, and only texts may be keys")
            if name.startswith("_") and name not in ("_target_", "_partial_"):
                raise _refusal(f"it uses {name}, and only _target_ and _partial_ may be")
        target = check(node["_target_"]) if "_target_" in node else None
        if type(node.get("_partial_", False)) is not bool:
            raise _refusal(f"the _partial_ of {node.get('_target_')} must be true or false")
        values = {
            name: _checked(value, f"{key}.{name}".lstrip("."), check, largest, depth + 1)
            for name, value in node.items()
            if name not in ("_target_", "_partial_")
        }
        return values if target is None else Call(target, values, node.get("_partial_", False))
    if kind not in (str, int, float, bool, type(None)):
        raise _refusal(
            f"{key or 'it'} is a {kind.__name__}, and only dicts, lists, texts, numbers, true, false and null may be"
        )
    if kind is str and "${" in node:
        raise _refusal(f"{node!r} is an interpolation, and only values may be stored")
    if kind is int and largest is not None and abs(node) > largest:
        raise _refusal(f"{key}={node:.3g} is out of proportion to the file's weights, at most {largest:,} may be")
    return node


def _refusal(reason: str) -> UserError:
    return UserError(f"the checkpoint's config is refused: {reason}")


def _made(node: Any, trusted: bool) -> Any:
    if type(node) is list:
        return [_made(value, trusted) for value in node]
    if type(node) is dict:
        return {name: _made(value, trusted) for name, value in node.items()}
    if not isinstance(node, Call):
        return node
    arguments = {name: _made(value, trusted) for name, value in node.arguments.items()}
    if node.partial:
        return functools.partial(node.target, **arguments)
    try:
        return node.target(**arguments)
    except UserError:
        raise
    except Exception as error:
        name = f"{node.target.__module__}.{node.target.__qualname__}"
        if trusted and not (isinstance(error, TypeError) and "argument" in str(error)):
            raise  # code of the user's own is better mended with a traceback
        raise UserError(f"{name} cannot be built from the checkpoint's config: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of what an exception says, and its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_target(target: Any, trust: Sequence[str] = (), kinds: Sequence[str] = (MODELS,)) -> Callable[..., Any]:
    """The class or function that `target` truly names. Raises UserError unless a file may build it."""
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
        raise UserError(f"{wants}, which is none of genai's {what}{hint}")
    try:
        found = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError):
        raise UserError(f"{wants}, which is not defined in a module of that name") from None
    builds = inspect.isclass(found) or inspect.isfunction(found)
    if not builds or f"{found.__module__}.{found.__qualname__}" != target:
        raise UserError(f"{wants}, which is not a class or function defined there")
    if not trusted and name.startswith("_"):
        raise UserError(f"{wants}, which is not public")
    if data and not trusted and not _makes_data(found):
        raise UserError(f"{wants}, which is not a data set")
    return found


def _makes_data(found: Any) -> bool:
    try:
        made = found if inspect.isclass(found) else get_type_hints(found).get("return")
    except NameError:  # a type that only a checker imports
        return False
    return inspect.isclass(made) and issubclass(made, Data)


def packages_of(node: Any) -> tuple[str, ...]:
    """The packages other than genai that a config names, sorted."""
    if isinstance(node, dict):
        below = {package for value in node.values() for package in packages_of(value)}
        return tuple(
            sorted(below | ({str(node["_target_"]).partition(".")[0]} - {"genai"} if "_target_" in node else set()))
        )
    if isinstance(node, list):
        return tuple(sorted({package for value in node for package in packages_of(value)}))
    return ()


class _Bounded(TorchDispatchMode):
    """Raises UserError where a model is built that is far larger than its file, before the memory or the time is spent."""

    def __init__(self, numbers: int, tensors: int):
        super().__init__()
        self.numbers, self.operations = 8 * numbers + 2**24, 30 * tensors + 5000

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.operations -= 1
        self.numbers -= _numbers(func, [*args, *(kwargs or {}).values()])
        if self.operations < 0 or self.numbers < 0:
            raise _refusal("it describes a model that is far larger than the file's weights")
        return func(*args, **(kwargs or {}))


_COUNTING = ("arange", "linspace", "logspace", "eye", "randperm", "tril_indices", "triu_indices")


def _numbers(func: Any, arguments: list[Any]) -> float:
    """About how many numbers an operation is about to make, read off its arguments."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    sizes = [
        math.prod(map(abs, a)) for a in arguments if isinstance(a, list | tuple) and all(type(n) is int for n in a)
    ]
    name = func.overloadpacket.__name__
    if name in _COUNTING:
        sizes += [abs(a) ** (2 if name == "eye" else 1) for a in arguments if type(a) in (int, float)]
    if name == "repeat":
        sizes = [n * t.numel() for n in sizes for t in tensors]
    if len(tensors) > 1 and torch.Tag.pointwise in func.tags:
        sizes.append(math.prod(torch.broadcast_shapes(*(t.shape for t in tensors))))
    return max(sizes, default=0)
