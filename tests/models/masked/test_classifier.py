"""The classifier of texts: the label's likelihood, padding, the protocol of writing, and baselines of labels."""

from functools import partial

import pytest
import torch

from genai.core.errors import UserError
from genai.core.protocols import SPECIALS
from genai.evaluation.baselines.answers import Majority, NaiveBayes
from genai.evaluation.baselines.base import TrainingData
from genai.modalities.tokenizers import Char, WithSpecials, from_state
from genai.models.autoregressive.decode import generate
from genai.models.masked.classifier import BERTClassifier, Reader
from genai.nn import norm
from genai.nn.attention import Attention, LearnedPositions, RotaryPositions
from genai.nn.transformer import GELU, MLP, Transformer, TwoSidedShift

WORDS, LABELS = 9, 3
V, SEP = WORDS + len(SPECIALS), WORDS + SPECIALS.index("[SEP]")


def reader(position=RotaryPositions, causal=False, shift=TwoSidedShift):
    torch.manual_seed(0)
    attention = partial(Attention, heads=2, causal=causal)
    made = Transformer(16, 2, attention, partial(MLP, activation=GELU()), norm.RMSNorm, position, shift)
    return Reader(V, LABELS + 1, made)


def model(**options):
    return BERTClassifier("tokens", LABELS + 1, True, 2, reader(**options)).eval()


def batch():
    source = torch.tensor([[1, 2, 3, 4, SEP], [5, 6, SEP, -1, -1], [SEP, -1, -1, -1, -1]])
    labels = torch.tensor([2, 0, 1])
    end = torch.full((3,), LABELS)
    mask = torch.tensor([False, True, True]).expand(3, 3)
    return {"source": source, "tokens": torch.stack([end, labels, end], 1), "mask": mask}


def test_the_probabilities_of_labels_sum_to_1_and_are_the_loss():
    made, given = model(), batch()
    with torch.no_grad():
        each = []
        for label in range(LABELS):
            tokens = given["tokens"].clone()
            tokens[:, 1] = label
            each.append(made.log_prob({**given, "tokens": tokens}, 0))
        assert torch.allclose(torch.stack(each).exp().sum(0), torch.ones(3))
        loss = made(given, 0)
    right = torch.stack([each[label][i] for i, label in enumerate(given["tokens"][:, 1])])
    assert torch.allclose(loss.total, -right.mean()) and loss.weight == 3
    best = torch.stack(each).argmax(0) == given["tokens"][:, 1]
    assert loss.logs["accuracy"][0] == best.float().mean()


def test_padding_and_other_texts_change_nothing():
    made, given = model(), batch()
    with torch.no_grad():
        together = made.logits(given, 3)
        for i, n in enumerate((5, 3, 1)):
            assert torch.allclose(made.logits({"source": given["source"][i : i + 1, :n]}, 1)[0], together[i], atol=1e-5)
        assert torch.allclose(made.logits(None, 2), together[2].expand(2, -1), atol=1e-5), "no text is the empty one"
        other = given["source"].clone()
        other[0, 1] = 7
        assert not torch.allclose(made.logits({"source": other}, 3)[0], together[0], atol=1e-4)


def test_a_label_is_written_and_then_the_end():
    made, given = model(), batch()
    cond = {"source": given["source"], "tokens": torch.full((3, 1), LABELS), "pad": torch.zeros(3, dtype=torch.int64)}
    cond |= {"lead": torch.ones(3, dtype=torch.int64), "stop": torch.full((3,), LABELS)}
    found = generate(made, torch.arange(3), cond, temperature=0)
    with torch.no_grad():
        log_p = made.logits(given, 3).log_softmax(1)
    assert found["tokens"][:, 0].tolist() == log_p.argmax(1).tolist() and found["length"].tolist() == [1, 1, 1]
    assert (found["tokens"][:, 1] == LABELS).all() and not found["log_prob"][:, 1].any()
    assert torch.allclose(found["log_prob"][:, 0], log_p.max(1).values, atol=1e-5)
    many = {name: value[:1].expand(4000, *value.shape[1:]) for name, value in cond.items()}
    drawn = generate(made, torch.arange(4000), many)["tokens"][:, 0].bincount(minlength=LABELS + 1)
    p = log_p[0].exp()
    assert drawn[LABELS] == 0 and ((drawn / 4000 - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()


def test_what_cannot_be_is_refused():
    for arguments, said in (
        (("image", 4, True, 2), "takes texts and their labels"),
        (("tokens", 4, True, 3), "set data.target_tokenizer=word"),
        (("tokens", 4, False, 2), "set data.source_specials=true"),
    ):
        with pytest.raises(UserError, match=said):
            BERTClassifier(*arguments, reader())
    with pytest.raises(UserError, match="reads both sides"):
        model(causal=True, shift=None)
    with pytest.raises(UserError, match="longer than the 4 positions"):
        model(position=partial(LearnedPositions, length=4)).logits(batch(), 3)
    with pytest.raises(UserError, match="this data has none"):
        Reader(None, 4, reader().transformer)


def test_a_tokenizer_whose_documents_end_with_sep():
    made = WithSpecials(Char("ab"), closed=True)
    assert made.end == 4 and made.decode([0, 1, 4]) == "ab" and made.decode([0, 2]) == "a[MASK]"
    again = from_state(made.state())
    assert again.end == 4 and again.state() == made.state()
    for state in ({**made.state(), "closed": 1}, {**WithSpecials(Char("a", True)).state(), "closed": True}):
        with pytest.raises(UserError, match="has one end of documents"):
            from_state(state)


def test_baselines_of_labels_are_those_of_counts():
    """Majority by hand; naive Bayes of unigrams by its formula."""
    source = torch.tensor([[0, 1, 9], [0, 0, 9], [1, 1, 9], [1, 9, -1], [1, 1, 9]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    x = torch.stack([torch.full_like(labels, 2), labels, torch.full_like(labels, 2)], 1)
    data = TrainingData(x, None, "tokens", [2], 3, None, source=source)
    given = {"source": torch.tensor([[0, 9, -1], [1, 1, 9]])}
    assert Majority().fit(data, 0).answer(given) == [[1], [1]]
    bayes = NaiveBayes(1, 0.5).fit(data, 0)
    assert bayes.answer(given) == [[0], [1]]
    counts = torch.tensor([[2.0, 3.0, 1.0, 2.0], [3.0, 0.0, 5.0, 3.0]])  # the mark, 0, 1, end
    p = (counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)
    seen = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 2.0, 1.0]])
    want = (seen @ p.log().T + torch.tensor([2 / 5, 3 / 5]).log()).softmax(1)
    got = torch.tensor(bayes.model.predict_proba(bayes.vectorizer.transform(given["source"].numpy())))
    assert torch.allclose(got.float(), want, atol=1e-6)
