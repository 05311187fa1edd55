"""Optimisers: Muon's orthogonal updates, and several optimisers as one."""

import copy

import pytest
import torch
from torch import nn

from genai.core.errors import UserError
from genai.train.ema import EMA
from genai.train.muon import Muon, orthogonalised
from genai.train.optim import adamw, muon, set_lr


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
    o = orthogonalised(g)
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


def test_a_lazy_regulariser_slows_its_player():
    """lr c and betas^c with c = k / (k + 1) (Karras et al., 2020, appendix B), of named parameters."""
    optimizer = adamw([("w", nn.Parameter(torch.ones(2, 2)))], lr=0.017, betas=(0.0, 0.99), lazy_every=16)
    (group,) = optimizer.param_groups
    assert group["lr_max"] == pytest.approx(0.016) and group["betas"] == pytest.approx((0.0, 0.99 ** (16 / 17)))
    with pytest.raises(UserError, match=r"optim.lazy_every=0"):
        adamw(nn.Linear(2, 2), lr=0.1, lazy_every=0)
    with pytest.raises(UserError, match=r"optim=muon needs to know a model's layers"):
        muon([("w", nn.Parameter(torch.ones(2, 2)))], lr=0.1, adamw_lr=0.1)
