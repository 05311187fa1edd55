"""Steps of a sampler, network included, as one CUDA graph: the host launches once instead of once an operation."""

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from genai.core.protocols import Batch

MAX_KINDS = 4  # kinds of a model
Made = TypeVar("Made")
Trajectory = Callable[[Batch], Tensor]
Kinds = dict[tuple[int, Hashable], Trajectory | Literal["walked", "failed"]]
"""Graphs by size of the batch and what else they depend on, the one asked for last at the end."""

_kinds: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Kinds]] = weakref.WeakKeyDictionary()


def find_graph(model: nn.Module, kind: Hashable, trajectory: Trajectory, inputs: Batch) -> Trajectory | None:
    """The graph of a trajectory, from the second batch of a kind and size on; the first borrows that of a larger batch.

    None says to walk it, which also warms up what is compiled or chosen at first use. The last KEPT of a model are known.

    Args:
        kind: whatever the trajectory depends on besides `inputs` and the model's weights.
        inputs: tensors (B, ...) on the GPU; their shapes but for B and their dtypes count as part of the kind.
    """
    weights, n = tuple(p.data_ptr() for p in model.parameters()), len(next(iter(inputs.values())))
    known, kinds = _kinds.get(model, (weights, {}))
    if known != weights:  # graphs read the memory that they were captured with
        kinds = {}
    _kinds[model] = weights, kinds
    kind = kind, tuple((name, t.shape[1:], t.dtype) for name, t in inputs.items())
    graph = kinds.pop((n, kind), None)
    if graph == "walked":
        try:
            graph = retry_without_graphs(model, lambda: capture(trajectory, inputs))
        except RuntimeError as error:
            warn_no_graph(str(error).strip().splitlines()[0])
            graph = "failed"  # and not the trajectory, which holds the model that its entry here is to end with
    kinds[n, kind] = graph or "walked"
    if len(kinds) > MAX_KINDS:
        del kinds[next(iter(kinds))]
    if graph is None:
        larger = [size for (size, other), graph in kinds.items() if other == kind and size > n and callable(graph)]
        graph = kinds[min(larger), kind] if larger else None
    return graph if callable(graph) else None


def retry_without_graphs(model: nn.Module, make: Callable[[], Made]) -> Made:
    """make(), once more without the model's graphs where the device has no memory left beside them."""
    try:
        return make()
    except torch.OutOfMemoryError:
        _, kinds = _kinds.get(model, ((), {}))
        if not any(map(callable, kinds.values())):
            raise
    kinds.clear()
    return make()


def capture(trajectory: Trajectory, inputs: Batch) -> Trajectory:
    """The trajectory as a graph over copies of its inputs, which replays batches of up to as many rows. Raises RuntimeError where
    something in it needs the host."""
    static = {name: t.clone() for name, t in inputs.items()}
    first = next(iter(static.values()))
    with torch.cuda.device_of(first):  # which need not be the current one
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may copy data meanwhile
        with torch.cuda.graph(graph, stream=_stream(first.device), capture_error_mode="thread_local"):
            out = trajectory(static)

    def replay(inputs: Batch) -> Tensor:
        n = len(next(iter(inputs.values())))
        for name, t in inputs.items():
            static[name][:n].copy_(t)  # the rest stays what an earlier batch was
        graph.replay()
        return out[:n].clone()

    return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs of a device are captured on: `torch.cuda.graph` has one for all devices, and cuBLAS keeps
    memory for each stream it has seen."""
    return torch.cuda.Stream(device)


def warn_no_graph(reason: str) -> None:
    """Warn that sampling goes on without a graph; Python shows one sentence once."""
    warnings.warn(f"sampling step by step, not as a CUDA graph: {reason}", stacklevel=2)
