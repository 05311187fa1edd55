"""MaskGIT: its loss, and what each step of sampling keeps, against their definitions."""

import itertools
import math
from functools import partial

import pytest
import torch

from genai.core.errors import UserError
from genai.core.protocols import PAD
from genai.models.masked import maskgit
from genai.models.masked.maskgit import MaskGIT, draw_masked
from genai.nn.attention import Attention
from genai.nn.grey_levels import GreyLevels
from genai.nn.latent_space import LatentTokens
from genai.nn.norm import RMSNorm
from genai.nn.text_image import TextImagePositions
from genai.nn.transformer import GELU, MLP, Transformer

LEVELS, LENGTH, SHAPE = 5, 6, (1, 3, 4)
N = math.prod(SHAPE)


def model(**given):
    torch.manual_seed(0)
    net = Transformer(
        16,
        2,
        partial(Attention, heads=2, causal=False),
        partial(MLP, activation=GELU()),
        RMSNorm,
        partial(TextImagePositions, length=LENGTH, grid=(3, 4)),
    )
    return MaskGIT("image", LENGTH, LatentTokens(GreyLevels("image", SHAPE, LEVELS)), net, **given).double().eval()


def batch(n=3):
    g = torch.Generator().manual_seed(0)
    image = torch.randint(LEVELS, (n, *SHAPE), generator=g) * (2 / (LEVELS - 1)) - 1
    return {"caption": torch.randint(256, (n, LENGTH), generator=g), "image": image}


def test_the_share_that_is_masked_has_the_mean_of_the_cosine():
    torch.manual_seed(0)
    masked = torch.cat([draw_masked(64, 100, torch.device("cpu")) for _ in range(50)])
    count = masked.sum(1)
    assert count.min() >= 1 and count.max() == 100
    assert count.double().mean() == pytest.approx(100 * 2 / math.pi + 0.5, abs=0.3)  # rounded up
    assert masked.double().mean(0).std() < 0.02  # places are alike


def test_the_loss_is_the_mean_over_masked_codes_and_sees_no_code_that_is_masked(monkeypatch):
    m, b = model(), batch()
    masked = torch.rand(3, N, generator=torch.Generator().manual_seed(1)) < 0.5
    monkeypatch.setattr(maskgit, "draw_masked", lambda *_: masked)
    codes = m.latent.encode(b)
    losses = m(b, 0)
    p = (
        m.logits(b["caption"], torch.where(masked, m.ids.mask, codes))
        .log_softmax(-1)
        .gather(2, codes[..., None])[..., 0]
    )
    assert torch.allclose(losses.total, -p[masked].mean()) and losses.weight == masked.sum()
    other = torch.where(masked, (codes + 1) % LEVELS, codes)
    changed = m.logits(b["caption"], torch.where(masked, m.ids.mask, other)).log_softmax(-1)
    assert torch.allclose(changed.gather(2, codes[..., None])[..., 0], p)


@pytest.mark.parametrize("steps", [1, 3, 8, 12, 20])
def test_each_step_leaves_as_many_codes_masked_as_the_cosine_says(steps):
    m, counts = model(), []
    made = maskgit.sample(
        m,
        torch.arange(3),
        {"caption": batch()["caption"]},
        lambda i, n, state: counts.append((state["tokens"] == m.ids.mask).sum(1).tolist()),
        steps=steps,
    )
    expected = [math.floor(N * math.cos(math.pi / 2 * k / steps) + 1e-4) for k in range(1, steps + 1)]
    assert counts == [[n] * 3 for n in expected] and counts[0][0] < N and counts[-1] == [0, 0, 0]
    assert made["tokens"].max() < LEVELS and made["image"].shape == (3, *SHAPE)


def test_codes_that_are_known_stay_and_sample_i_depends_on_its_seed_alone():
    m, b, seen = model(), batch(), []
    cond, seeds = {"caption": b["caption"]}, torch.arange(3) + 3
    made = maskgit.sample(m, seeds, cond, lambda i, n, state: seen.append(state["tokens"].clone()), guidance=1.0)
    for before, after in itertools.pairwise(seen):
        known = before != m.ids.mask
        assert torch.equal(before[known], after[known])
    alone = maskgit.sample(m, seeds[2:], {"caption": b["caption"][2:]}, guidance=1.0)
    assert torch.equal(alone["tokens"][0], made["tokens"][2])


def test_one_cold_step_is_the_most_probable_code_of_each_place():
    m, b = model(label_dropout=0.5), batch()
    masks = torch.full((3, N), m.ids.mask)
    given, null = (m.logits(c, masks) for c in (b["caption"], torch.full_like(b["caption"], PAD)))
    made = maskgit.sample(m, torch.arange(3), {"caption": b["caption"]}, steps=1, temperature=0.0, guidance=3.0)
    assert torch.equal(made["tokens"], (null + 3 * (given - null)).argmax(-1))


def test_any_part_of_a_picture_can_be_filled_in():
    m, b = model(), batch()
    mask = torch.ones(3, 1, 3, 4)
    mask[:, :, 1, 1:3] = 0
    made = maskgit.sample(m, torch.arange(3), {"caption": b["caption"]}, image=b["image"], mask=mask)
    kept = mask.flatten(1) > 0
    assert torch.equal(made["tokens"][kept], m.latent.encode(b)[kept]) and (made["tokens"] < LEVELS).all()
    assert torch.equal(made["image"][mask > 0], b["image"][mask > 0].to(made["image"]))


def test_the_marginals_of_a_known_source_are_those_of_the_network():
    """With one code left at a time a step draws from the network's own conditional distribution."""
    m = model()
    torch.nn.init.zeros_(m.head.weight)
    made = maskgit.sample(m, torch.arange(2000), steps=1)
    counts = torch.bincount(made["tokens"].flatten(), minlength=LEVELS).double()
    chi2 = ((counts - counts.sum() / LEVELS).square() / (counts.sum() / LEVELS)).sum()
    assert chi2 < 18.5  # 0.1 % of 4 degrees of freedom


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, r"sampler\.steps=0 must be"),
        ({"temperature": -1.0}, r"sampler\.temperature=-1\.0 must be"),
        ({"choice_temperature": -1.0}, r"sampler\.choice_temperature=-1\.0 must be"),
        ({"guidance": -1.0}, r"guidance=-1\.0 must be"),
    ],
)
def test_refuses_arguments(given, said):
    with pytest.raises(UserError, match=said):
        maskgit.sample(model(), torch.arange(1), **given)
