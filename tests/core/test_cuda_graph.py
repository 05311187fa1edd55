"""One CUDA graph a trajectory: which batches are captured, replayed and padded, what is kept, and who hears of it.

There is no GPU here: a graph is the recorded operations of a call, run again on the same memory.
"""

import contextlib
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genai import sampling
from genai.checkpoint import Loaded
from genai.cli import compose_config
from genai.core import cuda_graph, rng
from genai.evaluation.samples import sample_batches
from genai.modalities.base import Modality
from genai.modalities.image import Image
from genai.modalities.label import Label
from genai.models.diffusion.sampling import samplers
from genai.models.diffusion.sampling.samplers import sample
from genai.progress import Task
from tests.models.diffusion.test_samplers import FAMILIES, ddim, tiny_unet


class Recorded(TorchDispatchMode):
    """In the place of a CUDA graph: what runs within is noted, and `replay` runs it again into the same memory. The host's part
    is not run again, so a number that it reads or a shape that it grows would show."""

    made: list["Recorded"]

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0
        self.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are captured, of models which count as being on a GPU."""
    made = []

    @contextlib.contextmanager
    def graph(recorded, stream, capture_error_mode):
        with recorded:
            yield

    monkeypatch.setattr(Recorded, "made", made, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(cuda_graph, "_stream", lambda device: None)
    asked, on_gpu = samplers._uses_graph, cast(Any, SimpleNamespace(device=torch.device("cuda"), training=False))
    monkeypatch.setattr(samplers, "_uses_graph", lambda cuda_graph, model, *rest: asked(cuda_graph, on_gpu, *rest))
    return made


def loaded(steps=4, **rest):
    node = {
        "_target_": "genai.models.diffusion.sampling.samplers.sample",
        "_partial_": True,
        "steps": steps,
        "impl": "torch",
        **rest,
    }
    node["solver"] = {"_target_": "genai.models.diffusion.sampling.tables.ddim", "_partial_": True}
    conditions: dict[str, Modality] = {"label": Label(10)}
    return Loaded(
        tiny_unet(), {"sampler": node, "data": {}}, Image(), conditions, 0, Path("runs/x/checkpoints/last.ckpt")
    )


def test_a_short_last_batch_is_padded_and_cut_again(graphs):
    """Five batches, one graph; a sample does not depend on the others of its batch."""
    m = loaded()
    walked = sampling.sample(m, n=18, batch_size=4, sampler={**m.config["sampler"], "cuda_graph": False})["image"]
    assert not graphs
    assert torch.equal(sampling.sample(m, n=18, batch_size=4)["image"], walked)
    assert [g.replays for g in graphs] == [4]  # the first is walked, the second captured
    again = sampling.sample(m, n=3, seed=40)["image"]  # a further call replays the same
    assert [g.replays for g in graphs] == [5]
    fresh = loaded()
    node = {**m.config["sampler"], "cuda_graph": False}
    alone = [sampling.sample(fresh, n=1, seed=40 + i, label=i, sampler=node)["image"] for i in range(3)]
    assert torch.allclose(again, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("solver", FAMILIES, ids=lambda f: f.__name__)
def test_a_replayed_batch_has_the_bits_of_its_steps(solver, graphs):
    """With noise by seed, an image and a mask, and guidance in an interval alone."""
    model, keys = tiny_unet(), {"solver": solver, "steps": 4, "guidance_interval": [0.1, 3], "impl": "torch"}
    image, mask = torch.rand(6, 1, 8, 8), (torch.rand(6, 1, 8, 8) > 0.5).float()
    for n in (6, 6, 6, 4):
        seeds, cond = rng.seed_range(n, n), {"label": torch.arange(n)}
        given = {**keys, "image": image[:n], "mask": mask[:n], "strength": 0.9}
        walked = sample(model, seeds, cond, cuda_graph=False, **given)["image"]
        assert torch.equal(sample(model, seeds, cond, **given)["image"], walked)
        image, mask = image.flip(0), mask.flip(0)
    assert [g.replays for g in graphs] == [3]


def test_settings_have_graphs_of_their_own(graphs):
    m = loaded()
    for steps, w in ((4, 2), (5, 2), (4, 3), (4, 2), (5, 2), (4, 3), (4, 2), (5, 2), (4, 3)):
        sampling.sample(m, n=4, batch_size=4, steps=steps, guidance=w)
    assert [g.replays for g in graphs] == [2, 2, 2]


def test_the_batches_of_an_evaluation_replay(graphs):
    """One small batch for its clock, then batches of one size, in all sets."""
    m, clock, sizes = loaded(), Task("evaluating", 150, "samples"), []
    for k in range(3):
        sizes.append([len(batch["image"]) for batch in sample_batches(m, 50, 50 * k, 20, clock)])
    assert sizes == [[16, 20, 14], [20, 20, 10], [20, 20, 10]]
    assert [g.replays for g in graphs] == [5, 1]  # all but those before the second of 20; the second of 10 has its own


def test_a_progress_bar_counts_batches_and_other_watchers_see_every_step(graphs, monkeypatch, tmp_path):
    heard = []

    monkeypatch.setattr(Task, "to", lambda task, done, total: heard.append((done, total)))
    m = loaded()
    monkeypatch.setattr(sampling.checkpoint, "load", lambda *_, **__: m)
    cfg = compose_config("sample", ["ckpt=x", "n=10", "batch_size=4", f"out={tmp_path / 's'}"])
    cfg.sampler = m.config["sampler"]
    sampling.run(cfg)
    assert heard == [(1, 12), (2, 12), (3, 12), (4, 12), (8, 12), (12, 12)]
    assert [g.replays for g in graphs] == [2]
    states = []
    sampling.sample(m, n=8, batch_size=4, on_step=lambda i, n, state: states.append(state["x"]))
    assert len(states) == 8 and [g.replays for g in graphs] == [2]
    assert sampling.sample(m, n=8, batch_size=4, frames=True)["frames"].shape == (4, 5, 1, 8, 8)
    with pytest.warns(UserWarning, match="not as a CUDA graph: frames=true shows every step"):
        node = {**m.config["sampler"], "cuda_graph": True}
        assert sampling.sample(m, n=4, sampler=node, frames=True)["frames"].shape == (4, 5, 1, 8, 8)


def call(kind, n, model, calls=None, value=1.0):
    """A batch of a kind, as `sample` makes it."""

    def trajectory(inputs):
        if calls is not None:
            calls.append(len(inputs["x"]))
        return inputs["x"] * 2

    inputs = {"x": torch.full((n, 1), value)}
    graph = cuda_graph.find_graph(model, kind, trajectory, inputs)
    out = trajectory(inputs) if graph is None else graph(inputs)
    assert torch.equal(out, inputs["x"] * 2)
    return graph


def test_as_many_kinds_are_kept_as_asked_for_last(graphs):
    model, kinds = nn.Linear(1, 1), range(cuda_graph.MAX_KINDS + 2)
    for kind in kinds:
        call(kind, 2, model)
        call(kind, 2, model)
    assert len(graphs) == len(kinds) and len(cuda_graph._kinds[model][1]) == cuda_graph.MAX_KINDS
    alive = [weakref.ref(g) for g in graphs]
    graphs.clear()
    gc.collect()
    assert [ref() is not None for ref in alive] == [False] * 2 + [True] * cuda_graph.MAX_KINDS
    call(2, 2, model)  # asked for again, so that the next one takes the place of 3
    call("new", 2, model)
    gc.collect()
    assert [k for k, ref in enumerate(alive) if ref() is None] == [0, 1, 3]
    del model
    gc.collect()
    assert not any(ref() for ref in alive)


def test_each_size_that_comes_again_has_its_graph_and_the_first_borrows_a_larger_one(graphs):
    model, calls = nn.Linear(1, 1), []
    for value, n in enumerate([1, 3, 2, 3, 1, 4, 2, 4, 3]):
        call("a", n, model, calls, float(value))
    assert calls == [1, 3, 2, 3, 1, 4, 2, 4]  # walked or captured
    assert [g.replays for g in graphs] == [2, 1, 1, 1]
    call("a", 5, model)
    call("b", 2, model)
    assert len(calls) == 8 and [g.replays for g in graphs] == [2, 1, 1, 1]
    model.weight = nn.Parameter(torch.ones(1, 1))  # a graph would read the old memory
    assert call("a", 3, model) is None
    call("a", 3, model)
    for value in (7.0, 8.0):
        call("a", 2, model, calls, value)
    assert len(calls) == 9 and [g.replays for g in graphs][4:] == [2, 1]


def test_graphs_make_room_where_memory_is_short(graphs, monkeypatch):
    model, full = nn.Linear(1, 1), [torch.OutOfMemoryError("out of memory")]
    call("a", 2, model)
    call("a", 2, model)
    alive, done = weakref.ref(graphs.pop()), []

    def make():
        gc.collect()
        if alive() is not None:
            raise full[0]
        return "made"

    assert cuda_graph.retry_without_graphs(model, make) == "made"
    with pytest.raises(torch.OutOfMemoryError):  # nothing to free any more
        cuda_graph.retry_without_graphs(model, lambda: done.append(1) or (_ for _ in ()).throw(full[0]))
    assert done == [1]
    walks = iter(full)

    def walk(*args):
        for error in walks:
            raise error
        return args[2]

    model, seeds = tiny_unet(), rng.seed_range(0, 2)
    for _ in range(2):
        ddim(model, seeds, {"label": seeds}, steps=2, impl="torch")
    monkeypatch.setattr(samplers, "run_table", walk)
    ddim(model, seeds, {"label": seeds}, steps=3, impl="torch")
    assert not cuda_graph._kinds[model][1]


def test_a_graph_that_cannot_be_says_why():
    model, seeds = tiny_unet(), rng.seed_range(0, 2)
    cond = {"label": torch.tensor([1, 2])}
    plain = ddim(model, seeds, cond, steps=2)["image"]
    with pytest.warns(UserWarning, match="sampling step by step, not as a CUDA graph: the model is on cpu"):
        asked = ddim(model, seeds, cond, steps=2, cuda_graph=True)["image"]
    assert torch.equal(asked, plain)


def test_a_capture_that_fails_is_said_and_not_tried_again(monkeypatch):
    tried = []

    def capture(trajectory, inputs):
        tried.append(trajectory(inputs))
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "capture", capture)
    model = nn.Linear(1, 1)
    call("a", 2, model)
    with pytest.warns(UserWarning, match="not as a CUDA graph: operation not permitted when stream is capturing$"):
        assert call("a", 2, model) is None
    assert call("a", 2, model) is call("a", 1, model) is None and len(tried) == 1
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.gpu
@pytest.mark.parametrize("solver", FAMILIES, ids=lambda f: f.__name__)
def test_a_graph_gives_the_samples_of_the_steps(solver):
    model, label = tiny_unet().cuda(), torch.arange(4)
    for first, n in ((0, 4), (4, 4), (8, 4), (12, 3)):  # walked, captured, replayed twice
        seeds, cond = rng.seed_range(first, n), {"label": label[:n]}
        graphed = sample(model, seeds, cond, solver=solver, steps=5)["image"]
        walked = sample(model, seeds, cond, solver=solver, steps=5, cuda_graph=False)["image"]
        assert (graphed - walked).abs().max() < 1e-5
        label = label + 1
    assert [size for (size, _), graph in cuda_graph._kinds[model][1].items() if callable(graph)] == [4]
