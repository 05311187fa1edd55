"""Metrics and baselines of what is written for sources: by hand, and against public implementations."""

import random

import pytest
import torch

from genai.core.errors import UserError
from genai.data.pairs import Pairs
from genai.evaluation.baselines.answers import NearestSource
from genai.evaluation.baselines.base import check, training_data
from genai.evaluation.baselines.ngram import NGram
from genai.evaluation.metrics import BLEU, Answers, ExactMatch, TokenErrorRate, compute
from genai.metrics.intervals import interval
from genai.metrics.text import edit_distance
from tests.data.test_pairs import PAIRS, SETTINGS


def answers(written, references):
    """Answers whose tokens are words."""
    split = [[one.split() for one in right] for right in references]
    return Answers(written, [one.split() for one in written], references, split)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2), ("abc", "abc", 0)],
)
def test_an_edit_distance_by_hand(a, b, distance):
    assert edit_distance(a, b) == distance


def test_an_edit_distance_is_a_metric():
    draw = random.Random(0)
    words = ["".join(draw.choices("ab", k=draw.randrange(6))) for _ in range(30)]
    for a in words:
        for b in words:
            d = edit_distance(a, b)
            assert (
                d == edit_distance(b, a) and (d == 0) == (a == b) and abs(len(a) - len(b)) <= d <= max(len(a), len(b))
            )
            assert all(d <= edit_distance(a, c) + edit_distance(c, b) for c in words[:5])


def test_an_error_rate_is_of_all_tokens_and_by_the_nearest_reference():
    given = answers(["a b c", "d", "x y"], [["a c", "a b c d e f"], ["d"], ["x y z z"]])
    rate = compute("token_error_rate", TokenErrorRate(), given)
    assert rate.mean().item() == pytest.approx((1 + 0 + 2) / (2 + 1 + 4))
    assert compute("exact_match", ExactMatch(), given).tolist() == [0, 1, 0]
    assert compute("exact_match", ExactMatch(), answers(["a", "b"], [["c", "a"], ["c"]])).mean() == 0.5
    assert interval(rate).low < rate.mean() < interval(rate).high


def test_an_error_rate_is_jiwers():
    jiwer = pytest.importorskip("jiwer")
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abc", k=draw.randrange(1, 7))) for _ in range(80)]
    given = answers(texts[:40], [[text] for text in texts[40:]])
    expected = jiwer.wer(texts[40:], texts[:40])
    assert compute("token_error_rate", TokenErrorRate(), given).mean().item() == pytest.approx(expected, abs=1e-12)


def test_bleu_is_sacrebleus_with_as_many_references_as_there_are():
    sacrebleu = pytest.importorskip("sacrebleu")
    written = ["the cat sat on the mat", "there is a dog in the garden"]
    one = [["the cat sat on a mat"], ["a dog is in the garden there"]]
    value = compute("bleu", BLEU(), answers(written, one))
    assert value.tolist() == [sacrebleu.corpus_bleu(written, [[right[0] for right in one]]).score]
    two = [[*one[0], written[0]], one[1]]
    assert compute("bleu", BLEU(), answers(written, two)) > value
    assert compute("bleu", BLEU(), answers(written, [[text] for text in written])).item() == pytest.approx(100)


def test_a_metric_of_answers_gives_one_number_or_one_for_each():
    class Odd(ExactMatch):
        def __call__(self, answers):
            return torch.zeros(2)

    with pytest.raises(UserError, match="answers need one finite number, or one for each item"):
        compute("odd", Odd(), answers(["a"] * 3, [["a"]] * 3))


def data():
    """Sources of which each held-out one shares most with one of training."""
    return Pairs([(f"{a}{b * 5}", f"{b} {a}") for a in "abcdefghij" for b in "xyz"], **{**SETTINGS, "val": 0.1})


def test_the_nearest_source_answers_with_its_own_target():
    pairs = data()
    baseline = NearestSource(3).fit(training_data(pairs, ["train"]), 0)
    train = pairs.splits["train"].batch(torch.arange(len(pairs.splits["train"])), None)
    own = [row[mask].tolist()[:-1] for row, mask in zip(train["tokens"], train["mask"], strict=True)]
    assert baseline.answer(train) == own, "a source of training is nearest to itself"
    part = pairs.splits["test"]
    found = Answers.of(pairs, part, baseline.answer(part.batch(torch.arange(len(part)), None)))
    assert all(
        text[0] == right[0][0] and text != right[0] for text, right in zip(found.texts, found.references, strict=True)
    )


def test_a_baseline_is_fitted_on_splits_of_different_lengths():
    pairs = Pairs([*PAIRS, ("999", "nine " * 9)], **SETTINGS)
    both = training_data(pairs, ["train", "val", "test"])
    assert both.x.shape == (41, 11) and both.source.shape == (41, 4)
    assert both.mask.sum() == sum(part.tokens for part in pairs.splits.values())
    part = pairs.splits["train"].batch(torch.arange(3), None)
    alone = NGram(9).fit(training_data(Pairs(PAIRS, **SETTINGS), ["train"]), 0)  # no target has nine tokens
    assert alone.log_prob(part, 0).isfinite().all() and len(alone.orders) < 9


def test_the_nearest_source_needs_sources():
    pairs = data()
    check(NearestSource(), pairs)
    pairs.source_levels = None
    with pytest.raises(UserError, match="needs data with sources"):
        check(NearestSource(), pairs)
