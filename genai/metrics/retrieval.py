"""Retrieval: whether the nearest items of another medium are right ones."""

import torch
from torch import Tensor

CHUNK = 1024  # queries whose similarities are kept at once


def hits(queries: Tensor, gallery: Tensor, label: Tensor, k: int = 1) -> Tensor:
    """Return whether one of the k most similar items of a gallery has the label of the query, float64 (N,).

    Args:
        queries, gallery: embeddings (N, D) of the same N items in two media; similarity is the inner product.
        label: int64 (N,), what makes an item a right answer; a number of its own for each item if only its other half is.
        k: number of items retrieved; of equally similar ones the first.
    """
    found = []
    for part, own in zip(queries.split(CHUNK), label.split(CHUNK), strict=True):
        nearest = (part @ gallery.T).argsort(dim=1, descending=True, stable=True)[:, :k]
        found.append((label[nearest] == own[:, None]).any(1))
    return torch.cat(found).double()
