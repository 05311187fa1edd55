"""Masked diffusion: its bound against closed forms, and its sampler's marginals."""

import itertools
import math

import pytest
import torch
from torch import nn

from genai.core.protocols import SPECIALS
from genai.models.masked.mdlm import MDLM
from genai.models.masked.sampling import ancestral, fill
from tests.models.masked.test_bert import net

WORDS, T = 2, 3
V, MASK = WORDS + len(SPECIALS), WORDS


class Exact(nn.Module):
    """A network that knows p(x_1 x_2 x_3): logits of each token given those that are not hidden, whatever x_0 is.

    With `wrong` the logits of texts with exactly one hidden token are 0.
    """

    def __init__(self, p, wrong=False):
        super().__init__()
        self.p, self.calls = nn.Parameter(p), 0
        table = torch.zeros(3, 3, 3, T, WORDS, dtype=p.dtype)  # by the tokens, of which 2 is hidden
        for row in itertools.product(range(3), repeat=T):
            known = p[tuple(slice(None) if x == MASK else slice(x, x + 1) for x in row)]
            for i in range(T):
                mass = known.sum([j for j in range(T) if j != i])
                full = torch.zeros(WORDS, dtype=p.dtype)
                full[slice(None) if row[i] == MASK else slice(row[i], row[i] + 1)] = mass
                table[row][i] = 0 if wrong and row.count(MASK) == 1 else full.clamp_min(1e-12).log()
        self.table = table

    def forward(self, tokens, mask=None, at=None, documents=None):
        self.calls += 1
        out = self.p.new_zeros(*tokens.shape, V)
        out[:, 1:, :WORDS] = self.table[tuple(tokens[:, 1:].T)]
        return out if at is None else out.gather(1, at[..., None].expand(-1, -1, V))


def exact(p, wrong=False, bound_samples=1):
    model = MDLM("tokens", V, True, T, net(), bound_samples=bound_samples).double().eval()
    model.net = Exact(p.double(), wrong)
    return model


def joint(seed=0):
    p = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return p / p.sum()


ALL = torch.tensor([(0, *x) for x in itertools.product(range(WORDS), repeat=T)])


def bound_of(model, tokens):
    """The bound by its definition: the integral of (1/t) E[sum over masked of -ln p], each masked with probability t.

    Of the sets S of n tokens it is the sum of B(|S|, n - |S| + 1) times their nats, with Euler's beta function.
    """
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for size in range(1, T + 1):
        beta = math.gamma(size) * math.gamma(T - size + 1) / math.gamma(T + 1)
        for chosen in itertools.combinations(range(1, T + 1), size):
            hidden = torch.zeros(tokens.shape, dtype=torch.bool)
            hidden[:, list(chosen)] = True
            total += beta * model.score_hidden({"tokens": tokens}, hidden)[0].sum(1)
    return total


@pytest.mark.parametrize("wrong", [False, True])
def test_the_estimate_has_the_integral_as_its_mean(wrong):
    """Over all orders and many stratified times; for exact conditionals the integral is -ln p itself."""
    model, p = exact(joint(), wrong), joint()
    want = bound_of(model, ALL)
    if not wrong:
        assert torch.allclose(want, -p.flatten().log(), atol=1e-9)
    orders = [torch.tensor((9, *o)) / 10 for o in itertools.permutations(range(T))]
    eligible = model.eligible({"tokens": ALL})
    assert not eligible[:, 0].any() and eligible[:, 1:].all()
    found = torch.zeros(len(ALL), dtype=torch.float64)
    for order in orders:
        for k in range(T):
            t = torch.full((len(ALL),), (k + 0.5) / T)
            found += model.nats({"tokens": ALL}, eligible, t, order.expand(len(ALL), -1)).detach() / (T * len(orders))
    assert torch.allclose(found, want, atol=1e-9)
    assert (want >= -p.flatten().log() - 1e-9).sum() >= (0 if wrong else len(ALL))


def test_the_bound_of_a_known_source_within_its_error():
    """Items drawn from a source: the mean bound is its entropy within four standard errors, as is the loss per token."""
    p = joint()
    generator = torch.Generator().manual_seed(1)
    items = ALL[torch.multinomial(p.flatten(), 3000, True, generator=generator)]
    model = exact(p, bound_samples=4)
    nats = -model.log_prob({"tokens": items}, 7)
    entropy, error = -(p * p.log()).sum(), nats.std() / math.sqrt(len(nats))
    assert abs(nats.mean() - entropy) < 4 * error and error < 0.03
    assert model.bound == "lower bound"
    torch.manual_seed(0)
    loss = model({"tokens": items}, 0)
    assert loss.total.item() * T == pytest.approx(entropy.item(), abs=0.15) and loss.weight == T * len(items)


def test_the_bound_of_an_item_depends_on_its_seed_alone():
    model = MDLM("tokens", V, True, 6, net(), bound_samples=3).eval()
    items = torch.randint(WORDS, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 0] = False
    with torch.no_grad():
        whole = model.log_prob({"tokens": items, "mask": mask}, 3)
        parts = [model.log_prob({"tokens": items[i : i + 2], "mask": mask[i : i + 2]}, 3 + i) for i in (0, 2, 4)]
        assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
        none = model.log_prob({"tokens": items, "mask": torch.zeros_like(mask)}, 3)
    assert not none.any() and whole.dtype == torch.float64


def test_the_first_token_and_those_outside_of_the_mask_are_never_hidden():
    model, seen = MDLM("tokens", V, True, 6, net()), []
    model.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    items = torch.randint(WORDS, (64, 7))
    mask = torch.zeros(64, 7, dtype=torch.bool)
    mask[:, 4:] = True
    for batch, context in (({"tokens": items}, 1), ({"tokens": items, "mask": mask}, 4)):
        seen.clear()
        loss = model(batch, 0)
        assert loss.total.isfinite() and loss.weight == 64 * (7 - context)
        assert torch.equal(seen[0][:, :context], items[:, :context])
        counts = (seen[0][:, context:] == MASK).sum(1)
        most = 7 - context
        assert counts.bincount(minlength=most + 1)[1:].sub(64 / most).abs().max() <= 1, "every number of masks as often"


@pytest.mark.parametrize(("steps", "exactly"), [(1000, True), (1, False)])
def test_the_samplers_marginals_by_chi_square(steps, exactly):
    """Many steps draw from the joint distribution; a single one from the product of the marginals alone."""
    p, n = joint(3), 6000
    model = exact(p)
    found = ancestral(model, torch.arange(n), steps=steps)["tokens"]
    want = p if exactly else torch.einsum("a,b,c->abc", p.sum((1, 2)), p.sum((0, 2)), p.sum((0, 1)))
    counts = (found @ torch.tensor([4, 2, 1])).bincount(minlength=8)
    chi = ((counts - n * want.flatten()) ** 2 / (n * want.flatten())).sum()
    assert chi < 24.3, "7 degrees of freedom, 0.1 %"
    other = p if not exactly else torch.full_like(p, 1 / 8)
    assert ((counts - n * other.flatten()) ** 2 / (n * other.flatten())).sum() > 24.3


def test_log_probabilities_of_samples_one_at_a_time_are_those_of_the_text():
    p = joint(3)
    model = exact(p)
    for batch in (fill(model, torch.arange(20), temperature=1.0), ancestral(model, torch.arange(20), steps=10**4)):
        want = p[tuple(batch["tokens"].T)].log()
        assert torch.allclose(batch["log_prob"].double().sum(1), want, atol=1e-5)


def test_calls_without_a_revealed_token_are_left_out():
    model = exact(joint())
    ancestral(model, torch.arange(2), steps=500)
    assert model.net.calls <= 2 * T
