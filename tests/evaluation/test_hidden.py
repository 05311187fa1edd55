"""Scores of hidden tokens: each once, with a stated share hidden; counts of neighbours on both sides by brute force."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from genai.core.errors import UserError
from genai.evaluation import hidden
from genai.evaluation.baselines.base import TrainingData
from genai.evaluation.baselines.two_sided import TwoSidedNGram
from genai.evaluation.metrics import Hidden

V = 5


class Seen:
    """Notes what is hidden; nats are 1 at position 1, 2 at 2 and so on, and odd positions are right."""

    def __init__(self):
        self.hidden = []

    def score_hidden(self, batch, hidden):
        self.hidden.append(hidden)
        at = torch.arange(hidden.shape[1])
        return at * hidden.float(), (at % 2 == 1) & hidden


@pytest.mark.parametrize("length", [2, 7, 20, 64])
def test_each_target_counts_once_and_a_fixed_share_is_hidden_at_a_time(length):
    mask = torch.ones(3, length + 1, dtype=torch.bool)
    mask[:, 0] = False
    mask[1, length // 2 + 1 :] = False
    model = Seen()
    batch = {"tokens": torch.zeros(3, length + 1, dtype=torch.int64), "mask": mask}
    found = hidden.score(model, batch, "tokens", 5)
    at = torch.arange(length + 1)
    want = torch.stack([(at * mask).sum(1), (at % 2 * mask).sum(1), mask.sum(1)], 1)
    assert torch.equal(found, want.double())
    for b, n in enumerate(mask.sum(1).tolist()):
        size = max(round(hidden.SHARE * n), 1)
        assert all(seen[b].sum() == size for seen in model.hidden[: -(-n // size)])
        assert not any((seen[b] & ~mask[b]).any() for seen in model.hidden)
    again = Seen()
    part = hidden.score(again, {name: value[2:] for name, value in batch.items()}, "tokens", 7)
    assert torch.equal(part, found[2:]) and torch.equal(again.hidden[0][0], model.hidden[0][2])


def test_the_facts_are_means_over_all_targets():
    scores = torch.tensor([[4.0, 1.0, 2.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
    facts = hidden.facts_of(scores)
    assert facts["masked_nats"] == 1 and facts["masked_accuracy"] == round(4 / 6, 4) and facts["masked_tokens"] == 6
    assert facts["pseudo_perplexity"] == round(math.e, 4) and facts["masked_share"] == 0.15
    assert Hidden("nats")(scores).mean() == pytest.approx(1) and Hidden("accuracy")(scores).mean() == pytest.approx(
        4 / 6
    )


def counted(order, tokens, known, train):
    """The distribution of the token at each hidden place, by counters over the training text."""
    found = {}
    for b, t in zip(*np.nonzero(~known), strict=True):
        reach = []
        for by in (-1, 1):
            n = 0
            while n < order and 0 <= t + by * (n + 1) < tokens.shape[1] and known[b, t + by * (n + 1)]:
                n += 1
            reach.append(n)
        p = np.full(V, 1 / V)
        for n in range(2 * order + 1):
            right = min(n // 2, reach[1])
            left = min(n - right, reach[0])
            right = min(n - left, reach[1])
            if left + right < n:
                break
            around = [tuple(tokens[b, t - left : t]), tuple(tokens[b, t + 1 : t + 1 + right])]
            counts = Counter(
                train[i]
                for i in range(left, len(train) - right)
                if [tuple(train[i - left : i]), tuple(train[i + 1 : i + 1 + right])] == around
            )
            if counts:
                total, kinds = sum(counts.values()), len(counts)
                p = np.array([(counts[v] + kinds * p[v]) / (total + kinds) for v in range(V)])
        found[b, t] = p
    return found


@pytest.mark.parametrize("order", [0, 1, 2])
def test_counts_of_neighbours_are_those_by_brute_force(order):
    rng = np.random.default_rng(order)
    train, tokens = rng.integers(0, V, 200), rng.integers(0, V, (4, 11))
    known = rng.random(tokens.shape) > 0.3
    baseline = TwoSidedNGram(order).fit(TrainingData(torch.from_numpy(train), None, "tokens", [10], V, None), 0)
    nats, right = baseline.score_hidden({"tokens": torch.from_numpy(tokens)}, torch.from_numpy(~known))
    for (b, t), p in counted(order, tokens, known, train).items():
        assert p.sum() == pytest.approx(1)
        assert nats[b, t] == pytest.approx(-math.log(p[tokens[b, t]]))
        assert bool(right[b, t]) == (p.argmax() == tokens[b, t])
    assert not nats[torch.from_numpy(known)].any() and not right[torch.from_numpy(known)].any()


def test_an_unseen_original_changes_nothing():
    rng = np.random.default_rng(0)
    train, tokens = rng.integers(0, V, 200), torch.from_numpy(rng.integers(0, V, (2, 9)))
    gone = torch.zeros(2, 9, dtype=torch.bool)
    gone[:, 3:5] = True
    baseline = TwoSidedNGram(2).fit(TrainingData(torch.from_numpy(train), None, "tokens", [8], V, None), 0)
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % V
    one, two = (baseline.score_hidden({"tokens": x}, gone)[0] for x in (tokens, other))
    assert torch.equal(one[:, 3], two[:, 3])
    with pytest.raises(UserError, match=r"baseline\.order"):
        TwoSidedNGram(-1)
