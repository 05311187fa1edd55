"""A sampler's steps, network included, as one CUDA graph: the host launches once per batch instead of once per
operation."""

import functools
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from genai.core.protocols import Batch

MAX_KINDS = 4  # graphs kept per model
Made = TypeVar("Made")
Trajectory = Callable[[Batch], Tensor]
Kinds = dict[tuple[int, Hashable], Trajectory | Literal["eager", "failed"]]
"""Graphs by batch size and kind, the one used last at the end."""

_kinds: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Kinds]] = weakref.WeakKeyDictionary()


def find_graph(model: nn.Module, kind: Hashable, trajectory: Trajectory, inputs: Batch) -> Trajectory | None:
    """Return the graph of a trajectory from the second batch of a kind and size on; None says to run it eagerly.

    The first, eager run also warms up what is compiled or tuned at first use. A smaller batch borrows the graph of a
    larger one. The last MAX_KINDS graphs of a model are kept.

    Args:
        kind: whatever the trajectory depends on besides `inputs` and the model's weights.
        inputs: tensors (B, ...) on the GPU; all of their shapes but B, and their dtypes, count as part of the kind.
    """
    weights, n = tuple(p.data_ptr() for p in model.parameters()), len(next(iter(inputs.values())))
    known, kinds = _kinds.get(model, (weights, {}))
    if known != weights:  # graphs read the memory that they were captured with
        kinds = {}
    _kinds[model] = weights, kinds
    kind = kind, tuple((name, t.shape[1:], t.dtype) for name, t in inputs.items())
    graph = kinds.pop((n, kind), None)
    if graph == "eager":
        try:
            graph = retry_without_graphs(model, lambda: capture(trajectory, inputs))
        except RuntimeError as error:
            warn_no_graph(str(error).strip().splitlines()[0])
            graph = "failed"  # not the trajectory: it holds the model, whose entry here would then never be collected
    kinds[n, kind] = graph or "eager"
    if len(kinds) > MAX_KINDS:
        del kinds[next(iter(kinds))]
    if graph is None:
        larger = [size for (size, other), graph in kinds.items() if other == kind and size > n and callable(graph)]
        graph = kinds[min(larger), kind] if larger else None
    return graph if callable(graph) else None


def retry_without_graphs(model: nn.Module, make: Callable[[], Made]) -> Made:
    """Return make(); if the device runs out of memory, drop the model's graphs and try once more."""
    try:
        return make()
    except torch.OutOfMemoryError:
        _, kinds = _kinds.get(model, ((), {}))
        if not any(map(callable, kinds.values())):
            raise
    kinds.clear()
    return make()


def capture(trajectory: Trajectory, inputs: Batch) -> Trajectory:
    """Capture a trajectory as a graph over copies of its inputs; the graph replays batches of up to as many samples.

    Raises RuntimeError if an operation in it needs the host.
    """
    static = {name: t.clone() for name, t in inputs.items()}
    first = next(iter(static.values()))
    with torch.cuda.device_of(first):  # the model's device need not be the current one
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
    """Return the stream on which graphs of a device are captured.

    `torch.cuda.graph` has one stream for all devices, and cuBLAS keeps a workspace for each stream it has seen.
    """
    return torch.cuda.Stream(device)


def warn_no_graph(reason: str) -> None:
    """Warn that sampling continues without a graph; Python shows a repeated warning once."""
    warnings.warn(f"sampling step by step, not as a CUDA graph: {reason}", stacklevel=2)
