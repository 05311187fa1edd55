"""Optimisers: Muon's orthogonal updates, and several optimisers as one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from genai.core.errors import UserError
from genai.train.ema import EMA
from genai.train.gradients import sum_over_ranks
from genai.train.lit import LitModel
from genai.train.muon import Muon, orthogonalize
from genai.train.optim import adamw, idle_from, lr_at, muon, reschedule, set_lr


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 12), nn.LayerNorm(12)
        self.inner, self.head = nn.Linear(12, 12), nn.Linear(12, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x) + self.inner(self.embed(x)))).logsumexp(-1).mean()


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_orthogonalised_keeps_directions_and_evens_out_lengths(shape):
    torch.manual_seed(0)
    g = torch.randn(shape) + 3 * torch.ones(shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    o = orthogonalize(g)
    inner = u.T @ o @ v.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-3
    assert inner.diag()[inner.diag() > 0.1].min() > 0.6 and inner.diag().max() < 1.3


def test_muon_is_torchs_up_to_its_precision():
    torch.manual_seed(0)
    ours = nn.Linear(12, 30, bias=False)
    theirs = copy.deepcopy(ours)
    a = Muon([{"params": list(ours.parameters())}], lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1)
    start = ours.weight.detach().clone()
    for _ in range(5):
        grad = torch.randn(30, 12)
        ours.weight.grad, theirs.weight.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    moved = (ours.weight - start).norm()
    assert (ours.weight - theirs.weight).norm() < 0.02 * moved


def chained(found_inf, grads, device="cpu"):
    """A network after one step of muon on each of the gradients, and the optimiser."""
    torch.manual_seed(0)
    with torch.device(device):
        net = Net()
    optimizer = muon(net, lr=0.02, adamw_lr=1e-3, weight_decay=0.1)
    for k, found in enumerate(found_inf):
        for i, p in enumerate(net.parameters()):
            p.grad = grads(k, i, p)
        if found is not None:
            optimizer.found_inf = found
        optimizer.step()
    return net, optimizer


def test_muon_skips_a_step_on_the_device_and_changes_no_other():
    def grads(k, i, p):
        return torch.full_like(p, torch.nan) if k == 2 else torch.randn(p.shape, generator=torch.manual_seed(9 * k + i))

    good, bad = torch.zeros(()), torch.ones(())
    (skipped, a), (twice, b) = chained([good, good, bad], grads), chained([None, None], grads)
    assert all(torch.equal(x, y) for x, y in zip(skipped.parameters(), twice.parameters(), strict=True))
    for x, y in zip(a.state.values(), b.state.values(), strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)


def test_muon_never_waits_for_the_device():
    """Tensors that only pretend to be on a GPU have no values to wait for."""
    with FakeTensorMode():
        found, group = torch.zeros((), device="cuda"), SimpleNamespace(guard=SimpleNamespace(stop_if_bad=pytest.fail))
        net, optimizer = chained([found], lambda k, i, p: torch.ones_like(p), "cuda")
        LitModel.skip_step_if_bad(None, optimizer, group, found)  # type: ignore[arg-type]
        assert optimizer.found_inf is found and net.inner.weight.is_cuda


def test_gradients_of_all_ranks_are_summed_at_once(monkeypatch):
    """Bit by bit as one by one, whatever their layout."""
    calls = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: calls.append(t.mul_(3)))
    shapes = [(3,), (2, 3, 4, 4), (), (5, 7)]
    grads = [torch.randn(s) for s in shapes]
    grads[1] = grads[1].to(memory_format=torch.channels_last)
    grads[3] = torch.randn(7, 5).T
    expected = [3 * grad for grad in grads]
    sum_over_ranks(grads)
    assert len(calls) == 1 and all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    sum_over_ranks([])
    assert len(calls) == 1


def test_each_parameter_has_one_optimiser():
    for tied in (False, True):
        net = Net(tied)
        chain = muon(net, lr=0.02, adamw_lr=1e-3, weight_decay=0.1)
        owned = [p for group in chain.param_groups for p in group["params"]]
        assert len(owned) == len({id(p) for p in owned}) == len(list(net.parameters()))
        assert [p is net.inner.weight for p in chain.param_groups[0]["params"]] == [True]


def test_a_chain_steps_saves_and_loads_as_one():
    """Both parts follow the schedule, and a loaded chain goes on exactly."""

    def go(net, optimizer, first, last):
        for step in range(first, last):
            set_lr(optimizer, step)
            optimizer.zero_grad()
            net(torch.arange(7)).backward()
            optimizer.step()

    torch.manual_seed(0)
    net = Net()
    again = copy.deepcopy(net)
    arguments = {"lr": 0.02, "adamw_lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 2, "decay_steps": 10}
    whole = muon(net, **arguments)
    go(net, whole, 0, 6)
    first = muon(again, **arguments)
    go(again, first, 0, 3)
    second = muon(again, **arguments)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    go(again, second, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert len(second.state) == 6
    assert [round(group["lr"] / whole.param_groups[0]["lr"], 6) for group in whole.param_groups] == [1, 0.05, 0.05]


def test_wrong_arguments():
    with pytest.raises(UserError, match=r"optim\.lr=0 and"):
        muon(Net(), lr=0, adamw_lr=1)
    with pytest.raises(UserError, match="has nothing to do"):
        muon(nn.Conv2d(1, 1, 3), lr=1, adamw_lr=1)
    with pytest.raises(UserError, match=r"optim\.lr=0"):
        adamw(Net(), lr=0)


def test_tied_weights_are_averaged_under_both_names():
    net = Net(tied=True)
    ema = EMA(net, decay=0.5, power=None)
    with torch.no_grad():
        net.embed.weight.add_(1)
    ema.update()
    state = ema.state_dict()
    assert torch.equal(state["embed.weight"], state["head.weight"])
    other = Net(tied=True)
    other.load_state_dict({**net.state_dict(), **state})
    assert torch.equal(other.embed.weight, ema.module.embed.weight)


def test_a_lazy_regulariser_slows_its_optimiser():
    """lr c and betas^c with c = k / (k + 1) (Karras et al., 2020, appendix B), of named parameters."""
    optimizer = adamw([("w", nn.Parameter(torch.ones(2, 2)))], lr=0.017, betas=(0.0, 0.99), lazy_every=16)
    (group,) = optimizer.param_groups
    assert group["lr_max"] == pytest.approx(0.016) and group["betas"] == pytest.approx((0.0, 0.99 ** (16 / 17)))
    with pytest.raises(UserError, match=r"optim.lazy_every=0"):
        adamw(nn.Linear(2, 2), lr=0.1, lazy_every=0)
    with pytest.raises(UserError, match=r"optim=muon needs a whole model"):
        muon([("w", nn.Parameter(torch.ones(2, 2)))], lr=0.1, adamw_lr=0.1)


def test_schedules_have_closed_forms():
    """Cosine, constant, and warm-up-stable-decay with 1 - sqrt (Hägele et al., 2024)."""
    rates = {"lr_max": 1.0, "lr_min": 0.1, "warmup_steps": 10, "decay_steps": 110}
    assert [lr_at(step, **rates, schedule=s) for s in ("cosine", "constant", "wsd") for step in (0, 9)] == [
        0.1,
        1.0,
    ] * 3
    assert lr_at(60, **rates) == lr_at(60, **rates, schedule="cosine") == pytest.approx(0.55)
    assert lr_at(10**6, **rates, schedule="constant") == 1.0
    wsd = {**rates, "schedule": "wsd", "cooldown": 0.2}  # from step 88 on
    assert [lr_at(step, **wsd) for step in (10, 50, 88)] == [1.0, 1.0, 1.0]
    for step in (89, 99, 105):
        assert lr_at(step, **wsd) == pytest.approx(0.1 + 0.9 * (1 - ((step - 88) / 22) ** 0.5))
    assert lr_at(110, **wsd) == lr_at(10**6, **wsd) == pytest.approx(0.1)
    assert lr_at(30, **{**wsd, "cooldown": 1.0}) == pytest.approx(
        0.1 + 0.9 * (1 - 0.2**0.5)
    )  # never within the warm-up


def test_schedules_are_checked_and_reach_every_group():
    for build in (lambda **k: adamw(Net(), lr=0.1, **k), lambda **k: muon(Net(), lr=0.1, adamw_lr=0.01, **k)):
        with pytest.raises(UserError, match=r"optim.schedule=linear must be one of cosine, constant, wsd"):
            build(schedule="linear")
        with pytest.raises(UserError, match=r"optim.cooldown=0 must be"):
            build(schedule="wsd", decay_steps=5, cooldown=0)
        with pytest.raises(UserError, match=r"schedule=wsd ends at optim.decay_steps, which is null"):
            build(schedule="wsd")
        optimizer = build(schedule="wsd", decay_steps=100, cooldown=0.5)
        set_lr(optimizer, 75)
        shares = [group["lr"] / group["lr_max"] for group in optimizer.param_groups]
        assert shares == pytest.approx([1 - 0.5**0.5] * len(shares))


def test_groups_of_before_there_were_schedules_follow_a_cosine():
    optimizer = adamw(Net(), lr=1.0, decay_steps=10)
    for group in optimizer.param_groups:
        del group["schedule"], group["cooldown"]
    assert set_lr(optimizer, 5) == pytest.approx(0.5)
    reschedule(optimizer.param_groups, adamw(Net(), lr=2.0, decay_steps=20).param_groups)
    assert set_lr(optimizer, 5) == pytest.approx(lr_at(5, 1.0, 0.0, 0, 20))


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ({}, None),
        ({"decay_steps": 30}, 30),
        ({"decay_steps": 30, "lr_min": 0.1}, None),
        ({"decay_steps": 40}, None),
        ({"decay_steps": 30, "schedule": "constant"}, None),
        ({"decay_steps": 30, "schedule": "wsd"}, 30),
    ],
)
def test_steps_at_a_rate_of_zero_are_found(arguments, first):
    assert idle_from(adamw(Net(), lr=1.0, warmup_steps=3, **arguments), 40) == first
