"""Metrics of sets of features against closed forms, loops by hand, and a public implementation where there is one."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from genai.core.errors import UserError
from genai.metrics import rows as rows_module
from genai.metrics.frechet import Moments, frechet
from genai.metrics.inception_score import inception_score
from genai.metrics.kid import kid
from genai.metrics.manifold import density_coverage, precision_recall
from tests.conftest import ROOT


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(n, mean, covariance, seed=0):
    """Features (n, D) whose mean and covariance are exactly these."""
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / (n - 1)), z.T, upper=False).T
    return z @ torch.linalg.cholesky(covariance).T + mean


def covariance(d, seed):
    root = normal(d, d, seed=seed)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


# Fréchet distance


def test_the_distance_of_gaussians_is_the_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 0.25, 1.0]).double()
    x, y = (with_moments(50, m, v.diag(), s) for s, (m, v) in enumerate([(a * 0, a), (b, b)]))
    expected = (b**2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()  # they commute
    assert frechet(Moments().add(x), Moments().add(y)) == pytest.approx(expected.item(), abs=1e-6)
    A, B = covariance(2, 1), covariance(2, 2)  # they do not: tr (A B)^(1/2) of 2 x 2 by Cayley and Hamilton
    root = ((A @ B).trace() + 2 * (A.det() * B.det()).sqrt()).sqrt()
    x, y = with_moments(70, torch.zeros(2).double(), A), with_moments(30, torch.ones(2).double(), B, 1)
    assert frechet(Moments().add(x), Moments().add(y)) == pytest.approx(
        (2 + A.trace() + B.trace() - 2 * root).item(), abs=1e-6
    )


@pytest.mark.parametrize("n", [2, 20, 400])
@pytest.mark.parametrize("scale", [1e-3, 1, 100])
def test_a_set_is_at_no_distance_from_itself(n, scale):
    x = normal(n, 64) * scale + 5 * scale
    assert frechet(Moments().add(x), Moments().add(x)) == pytest.approx(0, abs=1e-6)
    assert frechet(Moments().add(x), Moments().add(x.flip(0))) == pytest.approx(0, abs=1e-6 * max(1, scale**2))
    same = torch.ones(n, 64)  # no variance at all
    assert frechet(Moments().add(same), Moments().add(same)) == 0


def test_singular_covariances_have_a_distance():
    x = torch.zeros(40, 64).double()
    x[:, 0] = with_moments(40, torch.zeros(1).double(), torch.eye(1).double())[:, 0]
    y = x.roll(1, 1)  # variance along another axis: nothing in common
    assert frechet(Moments().add(x), Moments().add(y)) == pytest.approx(2, abs=1e-9)
    assert frechet(Moments().add(x), Moments().add(3 * x)) == pytest.approx(4, abs=1e-9)


def test_batches_and_parts_give_the_moments_of_the_whole():
    x = normal(1000, 8).float() + 1e4  # sums of raw squares would lose this in float32
    whole, parts, other = Moments().add(x), Moments(), Moments()
    for part in x[:600].split(7):
        parts.add(part)
    for part in x[600:].split(64):
        other.add(part.numpy())
    before = other.scatter.clone()
    parts.merge(other).merge(Moments())
    assert parts.n == 1000 and torch.equal(other.scatter, before) and parts.scatter.shape == (8, 8)
    expected = torch.from_numpy(np.cov(x.double().numpy().T))
    for moments in (whole, parts, Moments().merge(parts)):
        assert torch.allclose(moments.covariance(), expected, atol=1e-9)
        assert torch.allclose(moments.mean, x.double().mean(0), rtol=0, atol=1e-9)


def test_what_has_no_distance_is_refused():
    x = normal(10, 3)
    for wrong, said in [
        (lambda: frechet(Moments().add(x[:1]), Moments().add(x)), "at least 2 samples, and 1 were added"),
        (lambda: frechet(Moments().add(x), Moments()), "at least 2 samples, and 0"),
        (lambda: frechet(Moments().add(x), Moments().add(x[:, :2])), "dimension 3 and 2"),
        (lambda: Moments().add(x).add(x[:, :2]), "dimension 3 and 2"),
        (lambda: Moments().add(x / 0), "not finite"),
        (lambda: Moments().add(x[0]), r"features of shape \(3,\)"),
        (lambda: frechet(Moments().add(x * 1e200), Moments().add(x)), "too large"),
    ]:
        with pytest.raises(UserError, match=said):
            wrong()


# Kernel distance


def test_the_kernel_distance_is_that_of_a_loop(monkeypatch):
    x, y = normal(9, 4), normal(7, 4, seed=1) + 0.5
    k = lambda a, b: (float(a @ b) / 4 + 1) ** 3  # noqa: E731
    expected = (
        sum(k(x[i], x[j]) for i in range(9) for j in range(9) if i != j) / 72
        + sum(k(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
        - 2 * sum(k(a, b) for a in x for b in y) / 63
    )
    assert kid(x, y) == pytest.approx(expected, rel=1e-12)
    assert kid(y, x) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("genai.metrics.kid.BLOCK", 4)
    assert kid(x, y) == pytest.approx(expected, rel=1e-12)
    assert kid(x, x) < 0


def test_the_kernel_distance_has_no_bias():
    found = torch.tensor([kid(normal(12, 5, seed=s), normal(8, 5, seed=10000 + s)) for s in range(2000)])
    error = found.std() / len(found) ** 0.5
    assert found.mean().abs() < 2 * error and found.min() < 0
    x = normal(600, 5)
    diagonal = ((x.square().sum(1) / 5 + 1) ** 3).mean() / 10  # what the biased estimate adds for each set, about
    assert diagonal > 20 * error


def test_a_kernel_distance_needs_two_of_each_and_equal_dimensions():
    x, y = normal(300, 5), normal(200, 5, seed=1) + 0.3
    with pytest.raises(UserError, match="at least 2 of each"):
        kid(x, y[:1])
    with pytest.raises(UserError, match="real features have 5 numbers each and fake features 4"):
        kid(x, y[:, :4])


# Inception score


def test_the_inception_score_of_known_answers():
    sure = torch.eye(5).repeat(40, 1)
    assert inception_score(sure, splits=1) == pytest.approx((5, 0))
    assert inception_score(torch.full((50, 5), 0.2)) == pytest.approx((1, 0))
    p = normal(60, 4).softmax(1)
    expected = math.exp(sum(float(q @ (q / p.mean(0)).log()) for q in p) / 60)
    assert inception_score(p, splits=1).mean == pytest.approx(expected, rel=1e-12)
    by_class = inception_score(sure.sort(0, descending=True).values[:, :1].new_tensor(np.repeat(np.eye(5), 40, 0)), 5)
    assert 4.5 < by_class.mean <= 5 and by_class.std > 0  # shuffled: else each split would hold one class, and score 1
    for wrong, said in [(p.log(), "softmax"), (p * 2, "add up to 1"), (p[:9], "splits=10 of 9 samples")]:
        with pytest.raises(UserError, match=said):
            inception_score(wrong)


# Precision, recall, density, coverage


def by_hand(x, y, k_pr, k_dc):
    """The four figures by loops over pairs."""
    distance = lambda a, b: math.sqrt(sum((float(u) - float(v)) ** 2 for u, v in zip(a, b, strict=True)))  # noqa: E731

    def radii(points, k):
        return [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    n, m, r, s, t = len(x), len(y), radii(x, k_pr), radii(y, k_pr), radii(x, k_dc)
    precision = sum(any(distance(x[i], b) <= r[i] for i in range(n)) for b in y) / m
    recall = sum(any(distance(a, y[j]) <= s[j] for j in range(m)) for a in x) / n
    density = sum(distance(x[i], b) <= t[i] for i in range(n) for b in y) / (k_dc * m)
    return precision, recall, density, sum(any(distance(x[i], b) <= t[i] for b in y) for i in range(n)) / n


@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_balls_are_those_of_loops(kind, monkeypatch):
    x, y = normal(30, 2), 0.6 * normal(30, 2, seed=1) + 0.7
    if kind == "grid":  # many ties and copies, all exact
        x, y = x.mul(4).round() / 4, y.mul(4).round() / 4
    expected = by_hand(x, y, 3, 5)
    assert (*precision_recall(x, y), *density_coverage(x, y)) == pytest.approx(expected)
    assert min(expected) > 0 and expected[1] < 1
    monkeypatch.setattr(rows_module, "ELEMENTS", 70)
    monkeypatch.setattr(rows_module, "BLOCK", 7)
    assert (*precision_recall(x, y), *density_coverage(x, y)) == pytest.approx(expected)


def test_fidelity_and_diversity_are_separate_figures():
    x, y = normal(500, 4), normal(500, 4, seed=1)
    same = density_coverage(x, y)
    n = len(x)
    share = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, 6))
    assert same.density == pytest.approx(1, abs=0.1) and same.coverage == pytest.approx(share, abs=0.03)
    narrow, wide = precision_recall(x, 0.1 * y), precision_recall(x, 4 * y)
    assert narrow.precision > 0.95 > 0.2 > narrow.recall and wide.precision < 0.2 < 0.95 < wide.recall
    assert precision_recall(x, x) == (1, 1) and density_coverage(x, x).coverage == 1
    copies = x[:1].float().repeat(500, 1)
    assert precision_recall(copies, copies) == (1, 1)  # radius 0 holds what lies at 0, whatever the rounding
    for wrong, said in [
        (lambda: precision_recall(x, y[:-1]), "500 real and 499 fake features"),
        (lambda: precision_recall(x[:3], y[:3]), "at least 4 of each"),
        (lambda: density_coverage(x, y, k=0), "k=0 must be a whole number, at least 1"),
    ]:
        with pytest.raises(UserError, match=said):
            wrong()


FIT = """
import resource, time, torch
from genai.metrics.manifold import precision_recall
torch.set_num_threads(1)
x, y = torch.randn(10000, 64), torch.randn(10000, 64)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.process_time()
precision_recall(x, y)
print(peak() - before, time.process_time() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in KiB")
def test_ten_thousand_of_each_fit():
    done = subprocess.run([sys.executable, "-c", FIT], cwd=ROOT, capture_output=True, text=True, check=True)
    mib, seconds = map(float, done.stdout.split())
    assert mib < 300 and seconds < 30


# A public implementation, given the same features


class Given(nn.Module):
    """Features that are given as if they were images."""

    num_features = 16

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchmetrics_says_the_same():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(300, 16), normal(300, 16, seed=1) @ covariance(16, 3) + 0.3
    fid, peer = FrechetInceptionDistance(Given()).set_dtype(torch.float64), KernelInceptionDistance(Given(), 1, 300)
    for metric in (fid, peer):
        metric.update(x, real=True)
        metric.update(y, real=False)
    assert frechet(Moments().add(x), Moments().add(y)) == pytest.approx(fid.compute().item(), abs=1e-4)
    assert kid(x, y) == pytest.approx(peer.compute()[0].item(), abs=1e-4)
    score = InceptionScore(Given(), splits=1)
    score.update(x)
    assert inception_score(x.softmax(1), splits=1).mean == pytest.approx(score.compute()[0].item(), abs=1e-4)
