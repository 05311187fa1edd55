"""Sampling what has latents and a generator: draws, and ways between two of them.

Sampler functions `(model, seeds, cond, on_step, ...) -> Batch`; sample i depends on seeds[i] and its label alone.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from genai.core.errors import at_least
from genai.core.protocols import Batch, OnStep


@runtime_checkable
class LatentGenerator(Protocol):
    """A model that is sampled in two parts, so that what lies between them can be looked at."""

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

    def between(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Latents on the way from a to b that this space calls straight; share (B,) in [0, 1]."""
        ...

    def stand(self, batches: int, truncation: float | None = None) -> None:
        """Measure anew what the generator knows of batches. Raises UserError if it knows nothing of them."""
        ...


def gan(
    model: LatentGenerator,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    truncation: float | None = None,
    standing_batches: int = 0,
) -> Batch:
    """One pass of the generator. `standing_batches`: of how many batches batch norms take their statistics first, 0 for
    those of training."""
    _stand(model, standing_batches, truncation)
    label = model.label(cond)
    x = model.decode(model.latent(seeds, label, truncation), label, seeds)
    return _reported({model.field: x}, on_step)


def interpolate(
    model: LatentGenerator,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    truncation: float | None = None,
    standing_batches: int = 0,
    columns: int = 10,
) -> Batch:
    """Rows of `columns` pictures, each on the way from the latents of its first seed to those of its last. Sample i is the
    picture's cell seeds[i]; every cell has its own label, and noise of the row's first seed."""
    at_least(columns, 2, "sampler.columns")
    _stand(model, standing_batches, truncation)
    label, first = model.label(cond), seeds - seeds % columns
    a, b = (model.latent(end, label, truncation) for end in (first, first + columns - 1))
    share = (seeds % columns / (columns - 1)).to(a)
    return _reported({model.field: model.decode(model.between(a, b, share), label, first)}, on_step)


def _stand(model: LatentGenerator, batches: int, truncation: float | None) -> None:
    if at_least(batches, 0, "sampler.standing_batches"):
        model.stand(batches, truncation)


def _reported(batch: Batch, on_step: OnStep | None) -> Batch:
    if on_step is not None:
        on_step(0, 1, batch)
    return batch
