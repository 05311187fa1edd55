"""Ways between the latents of a generator, for every family that has one."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, OnStep, for_models

Items = Callable[[str, Tensor], Tensor]


@runtime_checkable
class LatentGenerator(Protocol):
    """A model that is sampled in two parts, so that what lies between its latents can be looked at."""

    field: str

    def label(self, batch: Batch | None) -> Tensor | None:
        """The labels int64 (B,) among the conditions, None for a model without classes."""
        ...

    def latent(self, seeds: Tensor, label: Tensor | None, truncation: float | None = None) -> Tensor:
        """(B, ...), one for each seed; `truncation` trades variety for quality, None leaves both, and what it may be the
        model says: UserError that names sampler.truncation."""
        ...

    def decode(self, latent: Tensor, label: Tensor | None, seeds: Tensor) -> Tensor:
        """(B, *shape); the seeds are of noise that the generator itself adds."""
        ...

    def interpolate_latents(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Latents on the way from a to b that this space calls straight; share (B,) in [0, 1]."""
        ...


@runtime_checkable
class LatentEncoder(Protocol):
    """A model that knows the latents of given items."""

    def infer(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, ...)."""
        ...


@for_models(LatentGenerator)
@torch.no_grad()
def interpolate(
    model: LatentGenerator,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    items: Items | None = None,
    split: str = "val",
    columns: int = 10,
    truncation: float | None = None,
) -> Batch:
    """Rows of `columns` pictures: row r goes from the latents of item 2 r of a split to those of item 2 r + 1 where the model
    can tell them, else from those of its first seed to those of its last. Sample i is the picture's cell seeds[i], with a
    label of its own and the row's noise."""
    at_least(columns, 2, "sampler.columns")
    first, label, row = seeds - seeds % columns, model.label(cond), seeds // columns
    if isinstance(model, LatentEncoder):
        if truncation is not None:
            raise UserError(
                f"sampler.truncation={truncation} is of drawn latents, and these are of items: leave it null"
            )
        a, b = (model.infer(load_items(items, split, 2 * row + k)) for k in (0, 1))
    else:
        a, b = (model.latent(end, label, truncation) for end in (first, first + columns - 1))
    share = (seeds % columns / (columns - 1)).to(a)
    return report({model.field: model.decode(model.interpolate_latents(a, b, share), label, first)}, on_step)


def load_items(items: Items | None, split: str, index: Tensor) -> Tensor:
    """Items of a split. Raises UserError where a sampler has no data to start from."""
    if items is None:
        raise UserError("this sampler starts from data: use it with sample.py, or give it items=")
    return items(split, index)


def report(batch: Batch, on_step: OnStep | None) -> Batch:
    """The batch, after on_step has heard of it as the one step there is."""
    if on_step is not None:
        on_step(0, 1, batch)
    return batch
