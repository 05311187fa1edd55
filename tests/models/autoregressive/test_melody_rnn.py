"""MelodyRNN: what a step may depend on, its one-step form, and its likelihood."""

import math

import pytest
import torch

from genai.core.errors import UserError
from genai.models.autoregressive.melody_rnn import MelodyRNN

V = 9


def model(**given):
    torch.manual_seed(0)
    made = MelodyRNN("tokens", V, 32, **{"bar": 4, "width": 12, "attention": 6, **given}).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
        made.features.repeats.normal_()
    return made


def test_a_step_read_alone_gives_what_all_at_once_do():
    """Also past two bars and the outputs that are attended to."""
    rnn, tokens = model(), torch.randint(V, (3, 30))
    whole = rnn.logits(tokens)
    state = rnn.start(None, 3, 30)
    alone = torch.stack([rnn.next(token, state) for token in tokens.split(1, 1)], 1).double()
    assert torch.allclose(alone, whole, atol=1e-5)


def test_features_are_of_the_last_event_and_those_one_and_two_bars_before_the_next():
    """With the flags of whether the last repeats: of the events t - 1, t - 4, t - 5, t - 8 and t - 9, and of no other."""
    rnn, t = model(), 19  # the event that is predicted
    features = rnn.features
    tokens = torch.randint(V, (1, t))
    tokens[0, t - 1] = 0
    tokens[0, [t - 5, t - 9]] = 1

    def of(tokens):
        history = torch.nn.functional.pad(tokens, (features.reach - 1, 0), value=features.none)
        return features(history, torch.arange(t)[None])[0, -1]

    before = of(tokens)
    for i in range(t):
        changed = tokens.clone()
        changed[0, i] = 0 if i in (t - 5, t - 9) else (tokens[0, i] + 1) % V  # so that a flag is another
        assert torch.equal(of(changed), before) == (t - i not in (1, 4, 5, 8, 9)), i


def test_no_logits_depend_on_a_later_event():
    rnn, tokens = model(), torch.randint(V, (1, 24))
    held = []
    rnn.features.event.register_forward_hook(lambda _, inputs, out: held.append(out.requires_grad_()) or out)
    logits = rnn.logits(tokens)
    for t in (0, 7, 23):
        (slope,) = torch.autograd.grad(logits[0, t].sum(), held[0], retain_graph=True)
        moved = slope[0].abs().sum(-1)
        assert (moved[t + 1 :] == 0).all() and (moved[: t + 1] > 0).all()
    other = tokens.clone()
    other[0, 15] = (other[0, 15] + 1) % V
    assert torch.equal(rnn.logits(other)[0, :15], logits[0, :15])
    assert not torch.allclose(rnn.logits(other)[0, 15], logits[0, 15])


def test_attention_reaches_its_last_outputs_alone():
    """With an LSTM that forgets at once, an event moves the logits of as many steps as there are outputs attended to."""
    rnn, tokens = model(layers=1, bar=40), torch.randint(V, (1, 24))
    with torch.no_grad():  # gates: input, forget, cell, output
        rnn.lstm.weight_hh_l0.zero_()
        rnn.lstm.bias_ih_l0[12:24] = -1e9
    other = tokens.clone()
    other[0, 8] = (other[0, 8] + 1) % V
    moved = (rnn.logits(other) - rnn.logits(tokens)).abs().sum(-1)[0] > 0
    assert moved.nonzero()[:, 0].tolist() == [*range(8, 14)]


def test_the_likelihood_sums_to_one_and_leaves_out_what_is_masked():
    rnn = model()
    every = torch.cartesian_prod(*[torch.arange(V)] * 3)
    tokens = torch.cat([torch.full((len(every), 1), rnn.first), every], 1)
    assert rnn.log_prob({"tokens": tokens}, 0).exp().sum().item() == pytest.approx(1, abs=1e-10)
    text = torch.randint(V, (2, 12))
    padded = torch.nn.functional.pad(text, (0, 5), value=3)
    mask = torch.arange(17).expand(2, -1) < torch.tensor([[12], [12]])
    batch = {"tokens": padded, "mask": mask}
    assert torch.allclose(rnn.log_prob(batch, 0), rnn.log_prob({"tokens": text}, 0), atol=1e-10, rtol=0)
    one, other = rnn(batch, 0), rnn({"tokens": text}, 0)
    assert one.total.item() == pytest.approx(other.total.item(), abs=1e-10)
    assert float(one.weight) == float(other.weight) == 22
    rnn.head.weight.data.zero_(), rnn.head.bias.data.zero_()
    assert rnn(batch, 0).total.item() == pytest.approx(math.log(V), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"field": "image"}, "a MelodyRNN takes tokens, but this data has image"),
        ({"bar": 0}, "model.bar=0 must be a whole number, at least 1"),
    ],
)
def test_what_it_cannot_take_is_refused(given, said):
    with pytest.raises(UserError, match=f"^{said}"):
        MelodyRNN(**{"field": "tokens", "vocab_size": V, "length": 8, "bar": 4, **given})
