"""The protocol of models that write one token after the other, by models that know nothing else of the package."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Autoregressive, Capturable, Rewindable, check_sampler
from genai.models.autoregressive import decode, speculative
from genai.models.autoregressive.melody_rnn import MelodyRNN
from genai.models.autoregressive.seq2seq import Seq2Seq
from genai.models.autoregressive.wavenet import Categorical, WaveNet
from genai.models.autoregressive.wavenet_cpu import ArrayQueues
from tests.models.autoregressive.test_gpt import SHAPES, V, gpt, replay_of
from tests.models.autoregressive.test_seq2seq import seq2seq


class Recurrent(nn.Module):
    """An LSTM that a label may start. Its first token is not part of a sample."""

    vocab_size, length, first, starts = V, 15, V, 0

    def __init__(self, width=12):
        super().__init__()
        self.embed, self.label = nn.Embedding(V + 1, width), nn.Embedding(3, width)
        self.cell, self.head = nn.LSTMCell(width, width), nn.Linear(width, V)

    def start(self, cond, batch, total, pad=None):
        self.starts += 1
        h = self.head.weight.new_zeros(batch, self.head.in_features)
        c = h.clone() if cond is None else self.label(cond["label"])
        return SimpleNamespace(h=h, c=c, read=0, pad=pad)

    def next(self, tokens, state):
        for token in tokens.T:
            new = self.cell(self.embed(token), (state.h, state.c))
            for held, value in zip((state.h, state.c), new, strict=True):
                held.copy_(value if state.pad is None else torch.where((state.read >= state.pad)[:, None], value, held))
            state.read += 1
        return self.head(state.h).float()

    def fix(self, state):
        state.pad = None
        return True

    def whole(self, tokens, label):
        """Logits (T, V) of all of one text (T,), by the definition."""
        h = torch.zeros_like(self.label.weight[:1])
        c = h if label is None else self.label(label[None])
        rows = []
        for token in tokens:
            h, c = self.cell(self.embed(token)[None], (h, c))
            rows.append(self.head(h)[0])
        return torch.stack(rows)


class Waves(WaveNet):
    """A WaveNet, with the definition of what it computes."""

    def __init__(self):
        super().__init__("tokens", V, 15, None, None, None, None, 0.0, 12, 8, 3, 3, 2, [1, 2, 4], Categorical(V))

    def whole(self, tokens, label):
        return self.output.log_probs(self.outputs(tokens[None], self.biases(None, 1)[:, None])[0])[0]


class Melodies(MelodyRNN):
    """Bars of 4, two of which a text is longer than, and attention over 5."""

    def __init__(self):
        super().__init__("tokens", V, 15, bar=4, width=12, attention=5)

    def whole(self, tokens, label):
        return self.logits(tokens[None])[0]


class Translations(Seq2Seq):
    """An encoder of the source, and a decoder with attention to it."""

    def __init__(self):
        like = seq2seq()
        super().__init__("tokens", V, 15, like.net)
        self.head = self.net.head

    def whole(self, tokens, source):
        source = self.null()["source"] if source is None else source
        return self.net(tokens[None], self.net.encode(source[None]))[0]


def made(kind):
    torch.manual_seed(0)
    model = kind().double().eval()
    with torch.no_grad():  # so that logits are far from uniform
        for p in model.parameters():
            p.mul_(3)
    return model


def naive(model, text, seed, n, label=None, **shape):
    """The definition: all of the text anew for each token."""
    u = rng.uniform(torch.tensor([seed]), (n,), stream=rng.TOKENS)
    with torch.no_grad():
        for i in range(n):
            p = decode.distribution(model.whole(text, label)[-1:].float(), **shape)
            text = torch.cat([text, decode.draw(p, u[:, i : i + 1])[0]])
    return text[-n:].tolist()


ROWS = [torch.tensor([3, 1]), torch.tensor([2, 5, 7, 1, 12, 4, 4]), torch.tensor([6, 1, 2, 9])]
PROMPTS = {
    "tokens": torch.stack([F.pad(row, (7 - len(row), 0)) for row in ROWS]),
    "pad": torch.tensor([7 - len(row) for row in ROWS]),
}
KINDS = [Recurrent, Waves, Melodies, Translations]


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_protocol_writes_what_its_own_loop_does(kind, shape):
    """In a batch, padded and streamed; with its log-probabilities."""
    model, seen = made(kind), []
    batch = decode.generate(
        model, torch.arange(3) + 5, PROMPTS, lambda i, n, s: seen.append(s["tokens"].clone()), **shape
    )
    assert batch["tokens"].shape == (3, 15) and batch["length"].tolist() == [15] * 3
    for b, row in enumerate(ROWS):
        assert batch["tokens"][b].tolist() == naive(model, row, 5 + b, 15, **shape)
        text = torch.cat([row, batch["tokens"][b]])
        logs = model.whole(text[:-1], None)[len(row) - 1 :].log_softmax(-1).gather(1, text[len(row) :, None])[:, 0]
        assert torch.allclose(batch["log_prob"][b].double(), logs, atol=1e-5)
    assert len(seen) == 15 and all(torch.equal(s, batch["tokens"][:, : i + 1]) for i, s in enumerate(seen))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_seed_depend_neither_on_the_batch_nor_on_stops(kind):
    model, seeds, calls = made(kind), torch.arange(12), []
    free = decode.generate(model, seeds, max_new_tokens=100)["tokens"]
    parts = [decode.generate(model, part, max_new_tokens=100)["tokens"] for part in seeds.split(5)]
    assert torch.equal(free, torch.cat(parts))
    assert free[3, :40].tolist() == naive(model, torch.tensor([model.first]), 3, 40)
    stop = torch.arange(12) % 3
    batch = decode.generate(model, seeds, {"stop": stop}, lambda i, n, s: calls.append(i), max_new_tokens=10_000)
    ended = min(len(calls), 100)
    assert ended > batch["length"].unique().numel() > 3 and len(calls) % decode.CHECK_STOP_EVERY == 0
    for b, length in enumerate(batch["length"].tolist()):
        assert torch.equal(batch["tokens"][b, : min(length, 100)], free[b, : min(length, 100)])
        assert stop[b] not in batch["tokens"][b, :length] and (batch["tokens"][b, length:] == stop[b]).all()
        assert (batch["log_prob"][b, length + 1 :] == 0).all() and batch["log_prob"][b, length] < 0


def test_a_model_reads_its_conditions_once_a_call():
    model = made(Recurrent)
    labels = torch.tensor([0, 2, 1])
    for cond, rows in (({"label": labels}, [torch.tensor([V])] * 3), ({**PROMPTS, "label": labels}, ROWS)):
        model.starts = 0
        batch = decode.generate(model, torch.arange(3), cond, max_new_tokens=12)
        assert model.starts == 1
        for b, row in enumerate(rows):
            assert batch["tokens"][b].tolist() == naive(model, row, b, 12, labels[b])
    assert "label" in cond and "tokens" in cond  # the caller's own


def test_a_decoder_attends_to_its_source_by_keys_and_values_projected_once(monkeypatch):
    """Sources and prompts of several lengths in one batch, also with a step that is captured."""
    model, calls = made(Translations), []
    sources = [torch.tensor([5, 3, 9, 1]), torch.tensor([2, 2]), torch.tensor([7, 10, 4])]
    source = torch.stack([F.pad(row, (0, 4 - len(row)), value=-1) for row in sources])
    model.net.decoder.blocks[1].cross.kv.register_forward_hook(lambda *_: calls.append(1))
    cond = {**PROMPTS, "source": source}
    batch = decode.generate(model, torch.arange(3), cond, max_new_tokens=12, top_k=5)
    assert len(calls) == 1
    for b, (row, own) in enumerate(zip(ROWS, sources, strict=True)):
        assert batch["tokens"][b].tolist() == naive(model, row, b, 12, own, top_k=5)
    other = decode.generate(model, torch.arange(3), {**cond, "source": source.flip(0)}, max_new_tokens=12, top_k=5)
    assert not torch.equal(other["tokens"][0], batch["tokens"][0])
    monkeypatch.setattr(decode, "capture", replay_of)
    monkeypatch.setattr(decode, "_uses_graph", lambda _, writer: writer.model.fix(writer.state))
    again = decode.generate(model, torch.arange(3), cond, max_new_tokens=12, top_k=5)
    assert torch.equal(again["tokens"], batch["tokens"])
    std = seq2seq().net.decoder.blocks[0].cross.out.weight.std().item()
    assert std == pytest.approx(0.3 / 6**0.5, rel=0.15)  # one of six that write to the residual stream


def test_the_token_that_begins_a_sample_is_none_of_it():
    """The penalty is of what was written alone, and the first token need be no id of the vocabulary."""
    model, text, penalty = made(Recurrent), torch.tensor([V]), 3.0
    got = decode.generate(model, torch.arange(1), max_new_tokens=12, temperature=0, repetition_penalty=penalty)
    for _ in range(12):
        logits = model.whole(text, None)[-1]
        seen = text[1:].unique()
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        text = torch.cat([text, logits.argmax(keepdim=True)])
    assert got["tokens"][0].tolist() == text[1:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_protocol_can_be_captured(kind, monkeypatch):
    """The second step is recorded and replayed; a model without `fix` goes on step by step, and says so where asked."""
    model = made(kind)
    expected = decode.generate(model, torch.arange(3), PROMPTS, max_new_tokens=20, top_k=6)
    monkeypatch.setattr(decode, "capture", replay_of)
    monkeypatch.setattr(decode, "_uses_graph", lambda _, writer: writer.model.fix(writer.state))
    monkeypatch.setattr(ArrayQueues, "suits", lambda _: False)  # as on a GPU
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    got = decode.generate(model, torch.arange(3), PROMPTS, max_new_tokens=20, top_k=6)
    assert len(calls) == 3  # the prompt, the step that warms up, the step that is recorded
    assert torch.equal(got["tokens"], expected["tokens"])


def test_what_a_model_cannot_do_is_refused_by_its_name():
    model = made(Recurrent)
    assert isinstance(model, Autoregressive) and isinstance(model, Capturable) and not isinstance(model, Rewindable)
    check_sampler(decode.generate, model)
    with pytest.raises(UserError, match="speculative is for a Rewindable, and this model is a Recurrent"):
        check_sampler(speculative.speculative, model)
    with pytest.raises(UserError, match="generate is for an Autoregressive, and this model is a Linear"):
        check_sampler(decode.generate, nn.Linear(1, 1))
    with pytest.raises(
        UserError,
        match=r"^a Recurrent cannot rewind the tokens it has read: use sampler=generate$",
    ):
        speculative.speculative(gpt(), torch.tensor([0]), draft=model)


class Snapshots(Recurrent):
    """Takes back what it has read: a copy of its state after each token."""

    def start(self, cond, batch, total, pad=None, rewinds=False):
        state = super().start(cond, batch, total, pad)
        state.before = []
        return state

    def scores(self, tokens, state):
        return torch.stack([self.next(token[:, None], state) for token in tokens.T], 1)

    def next(self, tokens, state):
        for token in tokens.T:
            state.before.append((state.h.clone(), state.c.clone()))
            logits = super().next(token[:, None], state)
        return logits

    def rewind(self, state, n):
        state.h, state.c = state.before[-n]
        del state.before[-n:]


@pytest.mark.parametrize("labelled", [False, True])
def test_any_model_that_can_be_rewound_takes_part_in_speculative_decoding(labelled):
    """The likeliest token each time is what `generate` writes, for a model and a draft of any kind."""
    other = made(Snapshots)
    model = copy.deepcopy(other)
    with torch.no_grad():
        model.head.weight.add_(0.3 * torch.randn(model.head.weight.shape))
    cond = {**PROMPTS, **({"label": torch.tensor([0, 2, 1])} if labelled else {})}
    expected = decode.generate(model, torch.arange(3), cond, max_new_tokens=15, top_k=1)
    assert not torch.equal(
        expected["tokens"], decode.generate(other, torch.arange(3), cond, None, 15, top_k=1)["tokens"]
    )
    for draft in (other, gpt().double()):
        got = speculative.speculative(model, torch.arange(3), cond, draft=draft, max_new_tokens=15, top_k=1)
        assert torch.equal(got["tokens"], expected["tokens"])
        assert torch.allclose(got["log_prob"], expected["log_prob"], atol=1e-5)
