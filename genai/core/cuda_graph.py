"""Steps of a sampler, network included, as one CUDA graph: the host launches once instead of once an operation."""

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Literal

import torch
from torch import Tensor, nn

from genai.core.protocols import Batch

Trajectory = Callable[[Batch], Tensor]

_latest: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Trajectory | Literal["first", "failed"]]] = (
    weakref.WeakKeyDictionary()
)


def replayed(model: nn.Module, kind: Hashable, trajectory: Trajectory, inputs: Batch) -> Tensor:
    """trajectory(inputs), by a graph from the second call of a kind on; the latest graph of a model is kept.

    The first call runs as it is, which also warms up what is compiled or chosen at first use; the second is captured,
    and from then on each is a replay into the same memory.

    Args:
        kind: whatever the trajectory depends on besides `inputs` and the model's weights.
        inputs: tensors on the GPU; their shapes and dtypes count as part of the kind.
    """
    weights = tuple(p.data_ptr() for p in model.parameters())
    key = kind, weights, tuple((name, t.shape, t.dtype) for name, t in inputs.items())
    seen, graph = _latest.get(model, (None, "first"))
    if seen != key:
        _latest[model] = key, "first"
        return trajectory(inputs)
    if graph == "first":
        try:
            graph = capture(trajectory, inputs)
        except RuntimeError as error:
            say(str(error).strip().splitlines()[0])
            graph = "failed"  # and not the trajectory, which holds the model that its entry here is to end with
        _latest[model] = key, graph
    return trajectory(inputs) if isinstance(graph, str) else graph(inputs)


def capture(trajectory: Trajectory, inputs: Batch) -> Trajectory:
    """The trajectory as a graph over copies of its inputs. Raises RuntimeError where something in it needs the host."""
    static = {name: t.clone() for name, t in inputs.items()}
    first = next(iter(static.values()))
    with torch.cuda.device_of(first):  # which need not be the current one
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may copy data meanwhile
        with torch.cuda.graph(graph, stream=_stream(first.device), capture_error_mode="thread_local"):
            out = trajectory(static)

    def replay(inputs: Batch) -> Tensor:
        for name, t in inputs.items():
            static[name].copy_(t)
        graph.replay()
        return out.clone()

    return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs of a device are captured on: `torch.cuda.graph` has one for all devices, and cuBLAS keeps
    memory for each stream it has seen."""
    return torch.cuda.Stream(device)


def say(reason: str) -> None:
    """Warn that sampling goes on without a graph; Python shows one sentence once."""
    warnings.warn(f"sampling step by step, not as a CUDA graph: {reason}", stacklevel=2)
