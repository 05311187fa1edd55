"""Baselines of pairs of texts that answer with what they have seen."""

import functools
from typing import Any

import numpy as np
from torch import Tensor

from genai.core.errors import at_least, number
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
        options: Any = {"analyzer": functools.partial(grams, order=self.order), "dtype": np.float32}
        self.vectorizer: Any = TfidfVectorizer(**options)
        self.sources = self.vectorizer.fit_transform(data.source.numpy()).T.tocsr()
        return self

    def answer(self, batch: Batch) -> list[list[int]]:
        found: list[int] = []
        sources: Tensor = batch["source"]
        for part in sources.split(ROWS):
            near = self.vectorizer.transform(part.numpy()) @ self.sources
            found += near.toarray().argmax(1).tolist()
        return [self.tokens[i, : self.lengths[i]].tolist() for i in found]


class Majority(Baseline):
    """The most frequent label, whatever the source."""

    field, needs, what = "tokens", ("labels",), "most frequent label"

    def fit(self, data: TrainingData, seed: int) -> "Majority":
        self.label = int(data.x[:, 1].bincount().argmax())
        return self

    def answer(self, batch: Batch) -> list[list[int]]:
        return [[self.label]] * len(batch["source"])


class NaiveBayes(Baseline):
    """The label of the greatest probability by the counts of a source's n-grams, as if they were independent, by scikit-learn.

    Args:
        order: the longest n-grams have so many tokens.
        smoothing: added to each count.
    """

    field, needs = "tokens", ("labels",)

    def __init__(self, order: int = 5, smoothing: float = 0.1):
        self.order, self.smoothing = at_least(order, 1, "baseline.order"), number(smoothing, "baseline.smoothing", 0)
        self.what = f"naive Bayes of {order}-grams"

    def fit(self, data: TrainingData, seed: int) -> "NaiveBayes":
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.naive_bayes import MultinomialNB

        assert data.source is not None
        options: Any = {"analyzer": functools.partial(grams, order=self.order)}
        self.vectorizer: Any = CountVectorizer(**options)
        counts = self.vectorizer.fit_transform(data.source.numpy())
        self.model = MultinomialNB(alpha=self.smoothing).fit(counts, data.x[:, 1].numpy())
        return self

    def answer(self, batch: Batch) -> list[list[int]]:
        return [[int(i)] for i in self.model.predict(self.vectorizer.transform(batch["source"].numpy()))]


def grams(source: np.ndarray, order: int) -> list[tuple[int, ...]]:
    """Return the n-grams of a source (S,) of all lengths up to `order`, its end and a mark at its beginning counted as tokens."""
    ids = [BEGIN, *source[source >= 0].tolist()]
    return [tuple(ids[i : i + n]) for n in range(1, order + 1) for i in range(len(ids) - n + 1)]
