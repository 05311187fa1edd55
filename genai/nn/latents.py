"""Samplers that interpolate between latents, for every family of models that has them."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, OnStep, for_models

Items = Callable[..., Tensor]
"""`items(split, index)`, and of samplers that take no item twice `items(split, index, False)`, see `Data.items`."""


@runtime_checkable
class LatentGenerator(Protocol):
    """A model that is sampled in two steps, latents and decoding, so that latents can be interpolated."""

    field: str

    def label(self, batch: Batch | None) -> Tensor | None:
        """Return the labels int64 (B,) among the conditions, None for a model without classes."""
        ...

    def latent(self, seeds: Tensor, label: Tensor | None, truncation: float | None = None) -> Tensor:
        """Draw latents (B, ...), one for each seed int64 (B,).

        `truncation` trades variety for quality, None for neither. Raises UserError, which names sampler.truncation, if
        it is out of range.
        """
        ...

    def decode(self, latent: Tensor, label: Tensor | None, seeds: Tensor) -> Tensor:
        """Decode latents (B, ...) -> (B, *shape); the seeds are for noise that the generator itself adds."""
        ...

    def interpolate_latents(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Interpolate from latents a to b along the space's own path; share (B,) in [0, 1]."""
        ...


@runtime_checkable
class LatentEncoder(Protocol):
    """A model that infers latents of given items."""

    def infer(self, x: Tensor) -> Tensor:
        """Infer the latents (B, ...) of x (B, *shape)."""
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
    """Draw rows of `columns` interpolated pictures; sample i is the cell seeds[i] of the picture.

    Row r goes from the latents of item 2 r of a split to those of item 2 r + 1 if the model can infer them, else from
    those of the row's first seed to those of its last. A cell has its own label and the row's noise. Raises UserError
    for fewer than 2 columns, and for truncation of inferred latents.
    """
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


def load_items(items: Items | None, split: str, index: Tensor, again: bool = True) -> Tensor:
    """Return items of a split, (B, *shape); indices past its end begin again, or with again=False are left out.

    Raises UserError if a sampler has no data to start from.
    """
    if items is None:
        raise UserError("this sampler starts from data: use it with sample.py, or give it items=")
    return items(split, index) if again else items(split, index, False)


def report(batch: Batch, on_step: OnStep | None) -> Batch:
    """Return the batch after calling on_step for the sampler's only step."""
    if on_step is not None:
        on_step(0, 1, batch)
    return batch
