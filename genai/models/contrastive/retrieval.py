"""Retrieval by a contrastive model: the items of the data whose embeddings are most similar to a query's."""

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, OnStep, for_models
from genai.models.contrastive.pairs import Contrastive
from genai.nn.latents import Items, load_items, report


@for_models(Contrastive)
@torch.inference_mode()
def retrieve(
    model: Contrastive,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    split: str = "val",
    candidates: int = 500,
    items: Items | None = None,
) -> Batch:
    """Return images of the data by their similarity to what `cond` holds, such as a caption or a sound: sample i is that of rank
    seeds[i], 0 for the most similar.

    Args:
        split: of the images.
        candidates: number of images to choose from, the first ones of the split; all of a split that has fewer.
        items: see `genai.nn.latents`.

    Raises UserError without a query, for a rank past the candidates, and for a model without an encoder of images.
    """
    first, device = torch.arange(at_least(candidates, 1, "sampler.candidates")), model.log_scale.device
    found = load_items(items, split, first, again=False).to(device)
    n = len(found)
    gallery = model.embed_media({"image": found})
    queries = model.embed_media({name: value.to(device) for name, value in (cond or {}).items()})
    asked = next((name for name in queries if name not in gallery), None)
    if not gallery:
        raise UserError(
            f"sampler=retrieve shows images, and this model embeds {' and '.join(model.encoders)}: leave model.encoders.image as "
            "it is, or train with callbacks.samples=null"
        )
    if asked is None:
        raise UserError(
            f"this model retrieves images by {' or '.join(n for n in model.encoders if n != 'image')}: give prompt="
        )
    if int(seeds.max()) >= n:
        raise UserError(
            f"seed={int(seeds.max())} is a rank past the {n} candidates of split={split}: give a smaller seed or n"
        )
    similarity = queries[asked] @ next(iter(gallery.values())).T
    ranked = similarity.argsort(dim=1, descending=True, stable=True)
    chosen = ranked.gather(1, seeds.to(device)[:, None])[:, 0]
    return report({"image": found[chosen], "similarity": similarity.gather(1, chosen[:, None])[:, 0]}, on_step)
