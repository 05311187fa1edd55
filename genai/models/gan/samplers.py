"""Samplers of GANs: one pass of the generator, and style mixing."""

import contextlib

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, OnStep, for_models
from genai.models.gan.gan import GAN
from genai.models.gan.stylegan2 import StyleGAN2
from genai.nn.latents import report


@for_models(GAN, StyleGAN2)
def gan(
    model: GAN | StyleGAN2,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    truncation: float | None = None,
    standing_batches: int = 0,
) -> Batch:
    """Generate samples in one pass.

    Args:
        truncation: trades variety for quality, see the model's `latent`.
        standing_batches: batches of latents whose statistics the batch norms use for this call; 0 keeps those of
            training.

    Raises UserError for standing_batches of a generator without batch norm.
    """
    statistics = contextlib.nullcontext()
    if at_least(standing_batches, 0, "sampler.standing_batches"):
        if not isinstance(model, GAN):
            raise UserError("sampler.standing_batches: this generator has no batch norm, set it to 0")
        statistics = model.use_standing_statistics(standing_batches, truncation)
    label = model.label(cond)
    with statistics:
        samples = model.decode(model.latent(seeds, label, truncation), label, seeds)
    return report({model.field: samples}, on_step)


@for_models(StyleGAN2)
def style_mix(
    model: StyleGAN2,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    truncation: float | None = None,
    columns: int = 10,
    cut: int | None = None,
) -> Batch:
    """Mix the styles of pairs of samples in a table (StyleGAN, 2019, figure 3); sample i is its cell seeds[i].

    First row and column show samples; every other cell has the coarse styles, those of layers before `cut`, of its
    row's sample and the fine ones of its column's. cut None is the middle. Raises UserError for a cut that is not a
    layer.
    """
    layers = model.generator.layers
    if at_least(layers // 2 if cut is None else cut, 1, "sampler.cut") >= layers:
        raise UserError(f"sampler.cut={cut} must be below {layers}, the generator's layers")
    row, column = seeds // at_least(columns, 2, "sampler.columns"), seeds % columns
    label = model.label(cond)
    coarse, fine = (model.latent(source, label, truncation) for source in (row * columns, column))
    keep = torch.arange(layers) < (layers // 2 if cut is None else cut)
    keep = torch.where((row == 0)[:, None], False, torch.where((column == 0)[:, None], True, keep)).to(coarse.device)
    return report(
        {model.field: model.decode(torch.where(keep[:, :, None], coarse, fine), label, row * columns)}, on_step
    )
