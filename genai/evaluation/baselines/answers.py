"""A baseline of pairs of texts that answers with what it has seen."""

from typing import Any

import numpy as np
from torch import Tensor

from genai.core.errors import at_least
from genai.core.protocols import Batch
from genai.evaluation.baselines.base import Baseline, TrainingData

ROWS = 100  # sources that are compared with all of training at once
BEGIN = -2  # stands before the first id of a source


class NearestSource(Baseline):
    """The target of the training source with the greatest cosine of tf-idf weights of n-grams, by scikit-learn.

    Args:
        order: the longest n-grams have so many tokens.
    """

    field, needs = "tokens", ("source_levels",)

    def __init__(self, order: int = 4):
        self.order = at_least(order, 1, "baseline.order")
        self.what = f"target of the nearest source by {order}-grams"

    def fit(self, data: TrainingData, seed: int) -> "NearestSource":
        from sklearn.feature_extraction.text import TfidfVectorizer

        assert data.source is not None and data.mask is not None
        self.tokens, self.lengths = data.x[:, 1:].numpy(), data.mask.sum(1).numpy() - 1  # without the end
        options: Any = {"analyzer": self.grams, "dtype": np.float32}
        self.vectorizer: Any = TfidfVectorizer(**options)
        self.sources = self.vectorizer.fit_transform(data.source.numpy()).T.tocsr()
        return self

    def grams(self, source: np.ndarray) -> list[tuple[int, ...]]:
        """Return the n-grams of a source (S,) of all lengths, its end and a mark at its beginning counted as tokens."""
        ids = [BEGIN, *source[source >= 0].tolist()]
        return [tuple(ids[i : i + n]) for n in range(1, self.order + 1) for i in range(len(ids) - n + 1)]

    def answer(self, batch: Batch) -> list[list[int]]:
        found: list[int] = []
        sources: Tensor = batch["source"]
        for part in sources.split(ROWS):
            near = self.vectorizer.transform(part.numpy()) @ self.sources
            found += near.toarray().argmax(1).tolist()
        return [self.tokens[i, : self.lengths[i]].tolist() for i in found]
