"""Beam search against every text of a small vocabulary, and against the most likely token each time."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.protocols import Reorderable, check_sampler
from genai.models.autoregressive import beam as module
from genai.models.autoregressive.beam import beam
from genai.models.autoregressive.decode import generate
from tests.models.autoregressive.test_autoregressive import (
    PROMPTS,
    ROWS,
    Melodies,
    Recurrent,
    Translations,
    Waves,
    made,
)
from tests.models.autoregressive.test_gpt import gpt

SOURCES = [torch.tensor([5, 3, 9, 1]), torch.tensor([2, 2]), torch.tensor([7, 10, 4])]
SOURCE = torch.stack([F.pad(row, (0, 4 - len(row)), value=-1) for row in SOURCES])
STOP = torch.tensor([4, 0, 7])
PENALTIES = (0.0, 1.0, 3.0, -1.0)


class Few(Translations):
    """Only ids 0, 1 and 2, so that every text can be listed; 0 ends one. The first id stays that of targets."""

    ids = 3

    def next(self, tokens, state):
        return super().next(tokens, state)[:, : self.ids]

    def whole(self, tokens, source):
        return super().whole(tokens, source)[:, : self.ids]


def few(seed=0):
    model = made(Few)
    model.vocab_size = model.ids
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.5 if p.ndim > 1 else 1))
    return model


def log_p(model, text, source, begin=None):
    """ln p of a text (T,) by the definition, all of it anew."""
    begin = torch.tensor([model.first]) if begin is None else begin
    logits = model.whole(torch.cat([begin, text[:-1]]), source)[len(begin) - 1 :]
    return logits.double().log_softmax(-1).gather(1, text[:, None]).sum().item()


def every_text(ids, n, stop):
    """All texts of at most n tokens: those that end, and those that are cut at n."""
    for length in range(1, n + 1):
        for text in itertools.product(range(ids), repeat=length):
            if stop not in text[:-1] and (text[-1] == stop or length == n):
                yield torch.tensor(text)


def score(model, text, source, power):
    return log_p(model, text, source) / ((5 + len(text)) / 6) ** power


@pytest.mark.parametrize("power", PENALTIES)
def test_with_many_beams_it_is_exhaustive(power):
    """The best of all 3 + ... texts of 4 tokens; with fewer beams never better, and each score is that of its text."""
    n, stop = 4, torch.zeros(3, dtype=torch.int64)
    worse = 0
    for seed in range(6):
        model = few(seed)
        cond = {"source": SOURCE, "stop": stop}
        wide = beam(model, torch.arange(3), cond, beams=100, length_penalty=power, max_new_tokens=n)
        narrow = beam(model, torch.arange(3), cond, beams=2, length_penalty=power, max_new_tokens=n)
        for b, source in enumerate(SOURCES):
            best = max(
                every_text(3, n, 0), key=lambda text, model=model, source=source: score(model, text, source, power)
            )
            length = len(best)
            assert wide["tokens"][b, :length].tolist() == best.tolist()
            assert wide["score"][b].item() == pytest.approx(score(model, best, source, power), abs=1e-5)
            assert wide["length"][b] == length - (best[-1] == 0).long()
        assert (narrow["score"] <= wide["score"] + 1e-6).all()
        worse += (narrow["score"] < wide["score"] - 1e-6).sum().item()
    assert worse > 0


@pytest.mark.parametrize("kind", [Translations, Melodies])
def test_one_beam_takes_the_most_likely_token_each_time(kind):
    model = made(kind)
    for cond in ({"stop": STOP}, {}, {**PROMPTS, "stop": STOP}):
        greedy = generate(model, torch.arange(3), cond, temperature=0)
        found = beam(model, torch.arange(3), cond, beams=1)
        assert torch.equal(found["tokens"], greedy["tokens"]) and torch.equal(found["length"], greedy["length"])
        assert torch.allclose(found["log_prob"], greedy["log_prob"], atol=1e-5)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_score_is_that_of_the_text_whatever_the_batch(power):
    """With prompts of several lengths, several sources and ends; alone or together."""
    model = made(Translations)
    cond = {**PROMPTS, "source": SOURCE, "stop": STOP}
    found = beam(model, torch.arange(3), cond, beams=5, length_penalty=power, max_new_tokens=9)
    for b, (row, source) in enumerate(zip(ROWS, SOURCES, strict=True)):
        length = int(found["length"][b])
        text = found["tokens"][b, : min(length + 1, 9)]
        expected = log_p(model, text, source, row)
        assert found["log_prob"][b].sum().item() == pytest.approx(expected, abs=1e-5)
        assert found["score"][b].item() == pytest.approx(expected / ((5 + len(text)) / 6) ** power, abs=1e-5)
        own = {"tokens": row[None], "source": source[None], "stop": STOP[b : b + 1]}
        alone = beam(model, torch.arange(1), own, beams=5, length_penalty=power, max_new_tokens=9)
        assert torch.equal(alone["tokens"][0], found["tokens"][b])


@pytest.mark.parametrize("power", PENALTIES)
def test_it_stops_where_nothing_open_can_win(power, monkeypatch):
    """The same as a search that goes on to the last token, in fewer calls."""
    calls, found = [], []
    for stops in (True, False):
        if not stops:
            monkeypatch.setattr(module.Texts, "can_win", lambda self, *_: ~torch.zeros_like(self.ended[:, 0]))
        for seed in range(4):
            model = few(seed)
            count = []
            model.net.head.register_forward_hook(lambda *_, count=count: count.append(1))
            cond = {"source": SOURCE, "stop": torch.zeros(3, dtype=torch.int64)}
            found.append(beam(model, torch.arange(3), cond, beams=3, length_penalty=power, max_new_tokens=12)["tokens"])
            calls.append(len(count))
    assert all(torch.equal(one, two) for one, two in zip(found[:4], found[4:], strict=True))
    assert sum(calls[4:]) == 48 and (power > 1 or sum(calls[:4]) < 48)  # a great penalty leaves hope to the last


@pytest.mark.parametrize("options", [{}, {"shift": True}, {"position": "learned"}, {"kv_heads": 1}], ids=str)
def test_a_gpt_branches_too_also_past_its_context(options):
    """A score is that of the text read at once, and past the context that of the text read token by token."""
    model = gpt(length=12, **options)
    found = beam(model, torch.arange(3), {**PROMPTS, "stop": STOP}, beams=4, max_new_tokens=4)
    for b, row in enumerate(ROWS):
        length = min(int(found["length"][b]) + 1, 4)
        text = torch.cat([row, found["tokens"][b, :length]])
        logs = model.net(text[None, :-1])[0, len(row) - 1 :].log_softmax(-1).gather(1, text[len(row) :, None])
        assert found["log_prob"][b].sum().item() == pytest.approx(logs.sum().item(), abs=1e-4)
    long = beam(model, torch.arange(1), beams=3, max_new_tokens=20)
    again = model.start(None, 1, 20)
    total, read = 0.0, torch.tensor([[model.first]])
    with torch.no_grad():
        for token in long["tokens"][0]:
            total += model.next(read, again).log_softmax(-1)[0, token].item()
            read = token.view(1, 1)
    assert long["log_prob"].sum().item() == pytest.approx(total, abs=1e-4)


def test_more_beams_are_seldom_worse_and_report_progress():
    model, seen = made(Translations), []
    cond = {"source": SOURCE, "stop": STOP}
    scores = [beam(model, torch.arange(3), cond, beams=k)["score"].sum().item() for k in (1, 3, 20)]
    assert scores[0] <= scores[1] <= scores[2] and scores[0] < scores[2]

    def count(i, n, state):
        seen.append((i, n, *state))

    count.counts_only = True
    beam(model, torch.arange(3), cond, count)
    assert seen[-1] == (14, 15, "tokens") and seen[:2] == [(0, 15), (1, 15)]


def test_a_beam_is_refused_to_what_cannot_branch_and_out_of_range():
    assert isinstance(gpt(), Reorderable) and not isinstance(made(Waves), Reorderable)
    for kind in (Waves, Recurrent):
        with pytest.raises(UserError, match=f"beam is for a Reorderable, and this model is a {kind.__name__}"):
            check_sampler(beam, made(kind))
    for given, sentence in (
        ({"beams": 0}, "sampler.beams=0 must be a whole number, at least 1"),
        ({"length_penalty": 11}, "sampler.length_penalty=11 must be a number at least -10 and at most 10"),
        ({"max_new_tokens": 0}, "sampler.max_new_tokens=0 must be a whole number, at least 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            beam(gpt(), torch.arange(1), **given)
