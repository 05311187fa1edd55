"""Samplers of autoencoders: draws from the prior, reconstructions, and traversals of single latents.

Sampler functions `(model, seeds, cond, on_step, ...) -> Batch`. `pixels="mean"` shows E[x | z], "draw" a draw of p(x |
z) by Philox stream 1. `items(split, index)` gives items of the data, int64 (B,) -> (B, *shape); a picture has rows of
`columns` cells, and sample i is its cell seeds[i].
"""

from typing import cast

import torch
from torch import Tensor, nn

from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, Codec, OnStep, Reconstructor, for_models
from genai.models.vae.vae import VAE
from genai.nn.latents import Items, load_items, report


@for_models(VAE)
def prior(
    model: VAE,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    temperature: float = 1.0,
    pixels: str = "mean",
) -> Batch:
    """Decode z ~ N(0, temperature^2) from Philox stream 0. Raises UserError for pixels that is neither mean nor
    draw."""
    z = temperature * model.latent(seeds)
    return _decode_samples(model, z, seeds, on_step, pixels)


@for_models(Reconstructor)
def reconstruct(
    model: Reconstructor,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    items: Items | None = None,
    split: str = "val",
    columns: int = 10,
) -> Batch:
    """Show rows of items, and below each row their reconstructions; `original`, bool (B,), marks the items."""
    row, column = _cells(seeds, columns)
    x = load_items(items, split, row // 2 * columns + column).to(_device(model))
    original = (row % 2 == 0).to(x.device)
    shown = torch.where(original.view(-1, *[1] * (x.ndim - 1)), x, model.reconstruct({model.field: x}))
    return report({model.field: shown, "original": original}, on_step)


@for_models(Codec)
def random_latents(
    model: Codec, seeds: Tensor, cond: Batch | None = None, on_step: OnStep | None = None, temperature: float = 1.0
) -> Batch:
    """Decode random latents: normal numbers, or token ids of equal probability.

    The model has no prior over them, so the result shows what a second stage has to learn.
    """
    seeds = seeds.to(_device(model))
    if model.vocabulary is None:
        z = temperature * rng.normal(seeds, model.latent_shape, stream=rng.INITIAL)
    else:
        z = (rng.uniform(seeds, model.latent_shape, stream=rng.INITIAL) * model.vocabulary).long()
    return report({model.field: model.decode(z)}, on_step)


@for_models(VAE)
def traverse(
    model: VAE,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    items: Items | None = None,
    split: str = "val",
    columns: int = 10,
    extent: float = 3.0,
    pixels: str = "mean",
) -> Batch:
    """Move one latent per row: row r moves latent r of item 0 from -extent to extent.

    Rows beyond the last latent begin again with the next item.
    """
    row, column = _cells(seeds, columns)
    z = model.infer(load_items(items, split, row // model.latents))
    value = extent * (2 * column / max(columns - 1, 1) - 1)
    z[torch.arange(len(z)), (row % model.latents).to(z.device)] = value.to(z)
    return _decode_samples(model, z, seeds, on_step, pixels)


def _device(model: Reconstructor | Codec) -> torch.device:
    return next(cast(nn.Module, model).parameters()).device


def _cells(seeds: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    at_least(columns, 1, "sampler.columns")
    return seeds // columns, seeds % columns


def _decode_samples(model: VAE, z: Tensor, seeds: Tensor, on_step: OnStep | None, pixels: str) -> Batch:
    if pixels not in ("mean", "draw"):
        raise UserError(f"sampler.pixels={pixels} is neither mean nor draw")
    with torch.no_grad():
        out = model.out(z)
        if pixels == "mean":
            x = model.likelihood.mean(out)
        else:
            x = model.likelihood.draw(out, rng.uniform(seeds.to(z.device), model.shape, stream=rng.STEP))
    return report({model.field: x}, on_step)
