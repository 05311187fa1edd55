"""Metrics of single samples (images, texts, their likeness to training items) against closed forms and loops by hand."""

import math
import time

import numpy as np
import pytest
import torch

from genai.core.errors import UserError
from genai.data.images import Digits
from genai.data.stream import batches
from genai.metrics.images import psnr, ssim
from genai.metrics.intervals import bootstrap, over_seeds
from genai.metrics.memorisation import Memorisation, memorisation, nearest_neighbours, tails
from genai.metrics.text import distinct, longest_copy
from tests.metrics.test_metrics import normal

# Images


def test_psnr_is_the_mean_of_images():
    x, y = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.2)
    y[1] = 0.02
    assert psnr(x, y).tolist() == pytest.approx([20, 40], abs=1e-4)
    assert psnr(x, y, span=1).tolist() == pytest.approx([10 * math.log10(25), 10 * math.log10(2500)], abs=1e-4)
    assert psnr(x, x).isinf().all()
    with pytest.raises(UserError, match="cannot be compared"):
        psnr(x, y[:1])


def test_ssim_is_that_of_a_loop():
    x = normal(2, 2, 13, 12).clamp(-1, 1)
    y = (x + 0.3 * normal(2, 2, 13, 12, seed=1)).clamp(-1, 1)
    weight = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weight /= weight.sum()
    expected = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        found = []
        for c, i, j in np.ndindex(2, 3, 2):
            p, q = a[c, i : i + 11, j : j + 11] + 1, b[c, i : i + 11, j : j + 11] + 1  # from black
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            both = (weight * (p - mp) * (q - mq)).sum()
            top = (2 * mp * mq + 0.02**2) * (2 * both + 0.06**2)
            found.append(top / ((mp**2 + mq**2 + 0.02**2) * (vp + vq + 0.06**2)))
        expected.append(np.mean(found))
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-12)
    assert ssim(x, x).tolist() == pytest.approx([1, 1]) and ssim(x, -x).max() < 0
    assert torch.allclose(ssim(x * 127.5 + 127.5, y * 127.5 + 127.5, low=0, span=255), ssim(x, y))
    with pytest.raises(UserError, match="at least 11 by 11 pixels"):
        ssim(x[..., :10], y[..., :10])


def test_torchmetrics_sees_images_alike():
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = (image.clamp(-1, 1) for image in (normal(3, 3, 20, 17), normal(3, 3, 20, 17, seed=1)))
    _, similar = structural_similarity_index_measure(a + 1, b + 1, data_range=2.0, return_full_image=True)
    inside = similar[..., 5:-5, 5:-5].mean((1, 2, 3))  # its mean counts windows over mirrored borders too
    assert torch.allclose(ssim(a, b), inside, atol=1e-4)
    noise = peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(a, b), noise, atol=1e-4)


# Memorisation


def digits():
    data = Digits("image", [1, 8, 8], 10, 17, 64, 0)
    return (next(batches(data.splits[name], 2000))["image"] for name in ("train", "test"))


def test_neighbours_are_those_of_a_loop():
    x, train = normal(20, 1, 3, 3), normal(30, 1, 3, 3, seed=1)
    distance, index = nearest_neighbours(x, train)
    for i, a in enumerate(x):
        each = [(a - b).norm().item() for b in train]
        assert index[i] == int(np.argmin(each)) and distance[i] == pytest.approx(min(each), rel=1e-12)
    parts = nearest_neighbours(x, iter(train.split([7, 1, 22])))
    assert torch.equal(parts[0], distance) and torch.equal(parts[1], index)


def test_a_memoriser_is_flagged():
    train, held_out = digits()
    copy = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:300]]
    exact = memorisation(copy, train, held_out)
    assert exact.is_memorised and exact.copies == 300 and exact.ratio == 0 and exact.close == 1
    assert torch.equal(train[exact.nearest], copy) and exact.closest(2)[0][0] == 0
    blurred = memorisation(copy + 0.05 * normal(*copy.shape).float(), train, held_out)
    assert blurred.is_memorised and blurred.copies == 0 and 0 < blurred.ratio < 0.5
    mixed = memorisation(torch.cat([held_out[:180], copy[:20]]), train, held_out[180:])
    assert mixed.is_memorised and mixed.copies == 20 and mixed.ratio > 0.5 and 0.1 <= mixed.close < 0.2
    assert {i for i, _ in mixed.closest(20)} == set(range(180, 200))
    with pytest.raises(UserError, match="samples have 32 numbers each and held-out items 64"):
        memorisation(copy[:, :, :4], train, held_out)


def test_models_that_learned_are_not_flagged():
    mixture = pytest.importorskip("sklearn.mixture")
    train, held_out = digits()
    model = mixture.GaussianMixture(10, random_state=0, reg_covar=1e-3).fit(train.flatten(1).double().numpy())
    samples = model.sample(500)[0]
    quantize = (torch.from_numpy(samples).clamp(-1, 1) * 8).round() / 8
    for given in (samples, quantize):
        found = memorisation(given, train.flatten(1), held_out.flatten(1))
        assert found.is_memorised is False and found.copies == 0 and found.ratio > 0.8, found
    assert not memorisation(held_out[::2], train, held_out[1::2]).is_memorised
    few = memorisation(held_out[::2], train, held_out[1:20:2])
    assert few.is_memorised is None and few.reason == (
        "too few to tell: 180 samples and 10 held-out items cannot tell 5% of copies from chance"
    )
    words = torch.arange(4)[:, None].repeat(
        50, 1
    )  # data of four values: every sample is a copy, and so is what is held out
    found = memorisation(words, words, words)
    assert found.copies == 200 and found.ratio == 1 and found.close == 0 and not found.is_memorised


@pytest.mark.parametrize("spread", [0.1, 2.0])
@pytest.mark.parametrize("m", [1, 8, 20, 100, 200])
@pytest.mark.parametrize("n", [30, 400])
def test_an_honest_model_is_hardly_ever_called_a_memoriser(n, m, spread):
    """Distances to the training items, of samples and of held-out items, are drawn from one distribution, narrow or wide."""
    draw = torch.Generator().manual_seed(n + m)
    distances = (torch.randn(500, n + m, generator=draw, dtype=torch.float64) * spread).exp()
    verdicts = [verdict(row[:n], row[n:]) for row in distances]
    assert sum(found is True for found in verdicts) <= 10  # 2 %
    if m <= 100 or n == 30:
        assert False not in verdicts
    copies = torch.zeros(n, dtype=torch.float64)
    assert verdict(copies, distances[0, n:]) is True or m == 1
    if m == 200 and n == 400:
        mixed = [torch.cat([row[: n - 40], row[:40] * 0]) for row in distances[:50]]  # every tenth is a copy
        assert all(verdict(row, distances[0, n:]) for row in mixed) and verdicts.count(False) > 490


def verdict(ours, theirs):
    ratio = (ours.quantile(0.5) / theirs.quantile(0.5)).item()
    close = (ours < theirs.quantile(0.01)).double().mean().item()
    return Memorisation(ours, torch.zeros(len(ours)), theirs, int((ours == 0).sum()), ratio, close).is_memorised


def test_the_tail_is_that_of_samples_drawn():
    u = torch.rand(20000, 30 + 12, generator=torch.Generator().manual_seed(0))
    below = (u[:, :30] < u[:, 30:].sort(1).values[:, 1:2]).sum(1)  # the second smallest of twelve
    for count in (0, 3, 9):
        assert tails(30, 12, 2)[count].item() == pytest.approx((below > count).double().mean().item(), abs=0.01)


# Text


def test_distinct_counts_n_grams():
    assert distinct(["abab", "ab"], 2) == 2 / 4
    assert distinct([[1, 2, 3], [4]], 1) == 1
    assert distinct([["the", "cat", "the", "cat"]], 2) == 2 / 3
    with pytest.raises(UserError, match="n=3: no text is that long"):
        distinct(["ab", ""], 3)


def longest_by_hand(text, train):
    for length in range(min(len(text), len(train)), 0, -1):
        for start in range(len(text) - length + 1):
            if text[start : start + length] in train:
                return length, start, train.index(text[start : start + length])
    return 0, 0, 0


def test_the_longest_copy_is_that_of_a_loop():
    random = np.random.default_rng(0)
    for _ in range(300):
        letters = "abcdé𝄞"[: random.integers(1, 7)]
        text, train = ("".join(random.choice(list(letters), random.integers(0, high))) for high in (25, 60))
        assert longest_copy(text, train) == longest_by_hand(text, train), (text, train)
    assert longest_copy("xyz", "abc") == (0, 0, 0)
    assert longest_copy([7, 5, 6, 9], [1, 5, 6, 2]) == (2, 1, 1)
    with pytest.raises(UserError, match="at least 0, and one is -1"):
        longest_copy([-1], [1])
    assert longest_copy("abc", "abc") == (3, 0, 0) == longest_copy("abc", "abcabc")


def test_a_megabyte_takes_seconds():
    random = np.random.default_rng(0)
    train = "".join(random.choice(list("abcdefgh "), 1_000_000))
    text = "".join(random.choice(list("abcdefgh "), 5_000))
    start = time.process_time()
    assert 5 < longest_copy(text, train).length < 16
    found = longest_copy(text + train[700_000:704_321] + text, train)
    assert found.length >= 4321 and found.start <= 5000 and 4321 - found.length + 5000 - found.start <= 5
    assert longest_copy(train[500_000:510_000], train) == (10_000, 0, 500_000)
    assert longest_copy("a" * 10_000, "a" * 1_000_000).length == 10_000
    assert time.process_time() - start < 30


# Intervals


def test_intervals():
    assert over_seeds([3, 1.0, 2]) == (2, 1, 3, 3)
    for wrong in ([], [1, math.nan]):
        with pytest.raises(UserError, match="must be finite numbers"):
            over_seeds(wrong)
    x = 3 * normal(400) + 1
    found = bootstrap(x)
    assert found == bootstrap(x.numpy()) != bootstrap(x, seed=1)
    mean, half = x.mean().item(), 1.96 * x.std().item() / 20
    assert found == pytest.approx((mean, mean - half, mean + half), abs=0.03)
    assert bootstrap(x, level=0.5).low > found.low and bootstrap(torch.ones(5)) == (1, 1, 1)
    held = [bootstrap(normal(50, seed=s), resamples=200) for s in range(200)]
    assert 0.88 < sum(i.low < 0 < i.high for i in held) / 200 < 0.99
    for wrong, said in [((x[:1],), "at least two"), ((x, 1.0), "level=1.0"), ((x, 0.9, 0), "resamples=0")]:
        with pytest.raises(UserError, match=said):
            bootstrap(*wrong)
