"""Adaptive augmentation: how p moves, what is done to images, and that it keeps a discriminator from knowing 200 by heart."""

import functools

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genai.data.base import Arrays, Data
from genai.data.images import Digits
from genai.modalities.image import Image
from genai.modalities.stored import nodes_of
from genai.models.gan.ada import ADA, Augment, linear, rotation, translation, warp
from genai.models.gan.stylegan2 import StyleGAN2
from genai.models.gan.stylegan2_nets import Discriminator, Generator
from genai.train.callbacks import File
from genai.train.ema import EMA
from genai.train.lit_adversarial import LitAdversarial
from genai.train.optim import adamw
from genai.train.record import Record
from tests.conftest import CONFIG
from tests.models.gan.test_stylegan2 import NAMES, again, build, example, only


def test_p_moves_as_published():
    """sign(r_t - 0.6) * batch * interval / 500,000 images, every fourth step, within [0, 1]."""
    ada, p = ADA(Augment(), p=0.5), 0.5
    confident, unsure = torch.tensor([1.0, 2.0, 3.0, -1.0, 4.0] * 20), torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0] * 20)
    unsure[:2] = -1  # r_t = 0.56, below the target of 0.6; `confident` has 0.6 but for one more
    confident[3] = 1
    for step in range(13):
        for half in (confident if step < 4 or step >= 8 else unsure).chunk(2):  # micro-batches
            ada.update(half, step)
        if step in (4, 8, 12):
            p += (1 if step in (4, 12) else -1) * 100 * 4 / 500_000
        assert torch.allclose(ada.p, torch.tensor(p)), step
    for start, logits, end in ((0.0, unsure, 0.0), (1.0, confident, 1.0), (0.3, torch.zeros(0), 0.3)):
        ada = ADA(Augment(), p=start, ramp_images=10)
        for step in range(5):
            ada.update(logits, step)
        assert torch.allclose(ada.p, torch.tensor(end))
    assert {"p", "signs"} <= set(ada.state_dict())


def test_p_moves_with_what_the_discriminator_says():
    ada = ADA(Augment(), interval_steps=2, target=-1.0, ramp_images=32)
    model, batch = build(augment=ada), example()
    seen = []
    for step in range(5):
        loss = model.discriminator_loss(batch, model.generate(batch, step), step)
        assert torch.equal(loss.logs["ada_p"][0], ada.p)
        seen.append((ada.p.item(), loss.logs["r_t"][0].item()))
    expected = [0.0] * 2 + [0.25 * (seen[0][1] + seen[1][1] > -2)] * 2
    assert [p for p, _ in seen[:4]] == expected
    model.eval().discriminator_loss(batch, model.generate(batch, 6), 6)
    assert ada.p.item() == seen[-1][0]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10)])
def test_without_probability_images_are_untouched_with_it_they_keep_shape_and_gradients(shape):
    x = example(shape, n=3, dtype=torch.float64)["image"].requires_grad_()
    assert torch.equal(Augment()(x, torch.tensor(0.0)), x)
    call = again(lambda: None)

    def augmented(x):
        call()
        return Augment()(x, torch.tensor(1.0))

    y = augmented(x)
    assert y.shape == x.shape and not torch.allclose(y, x)
    assert torch.autograd.gradcheck(augmented, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(augmented, x, fast_mode=True)


def test_warping_is_grid_sampling():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 7, 10).double()
    where = torch.eye(3).double() + 0.4 * torch.randn(6, 3, 3).double()
    where[:, 2] = torch.tensor([0.0, 0.0, 1.0])
    where[:, :2, 2] *= 20
    pixels = torch.tensor([4.5, 3.0]).double()  # half of the span from the first pixel to the last
    theta = where[:, :2].clone()
    theta[:, :, :2] *= pixels / pixels[:, None]
    theta[:, :, 2] /= pixels
    grid = F.affine_grid(theta, list(x.shape), align_corners=True)
    expected = F.grid_sample(x, grid, padding_mode="reflection", align_corners=True)
    assert torch.allclose(warp(x, where), expected, atol=1e-10)


def test_movements_are_what_they_are_called():
    torch.manual_seed(0)
    x, p = torch.randn(64, 3, 8, 8), torch.tensor(1.0)
    found = only(flip=1)(x, p)
    flipped = (found == x.flip(3)).flatten(1).all(1)
    assert torch.equal(found[~flipped], x[~flipped]) and 16 < flipped.sum() < 48
    turned = only(quarter_turns=1)(x, p)
    counts = [sum(torch.equal(a, b.rot90(k, (1, 2))) for a, b in zip(turned, x, strict=True)) for k in range(4)]
    assert sum(counts) == 64 and min(counts) > 5
    shifted = only(shift=1)(x, p)
    wholes = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    same = [
        [torch.equal(s[:, 1:-1, 1:-1], y.roll(by, (1, 2))[:, 1:-1, 1:-1]) for by in wholes]
        for s, y in zip(shifted, x, strict=True)
    ]
    assert all(sum(row) == 1 for row in same) and np.any(same, 0).all()
    one = torch.ones(1).double()
    turn = linear(*rotation(0.3 * one)) @ linear(*rotation(-0.3 * one))
    assert torch.allclose(turn, torch.eye(3).double()) and translation(torch.tensor([[2.0, 3.0]]))[0, 0, 2] == -2


def test_colours_are_what_they_are_called():
    torch.manual_seed(0)
    x, p = torch.randn(200, 3, 2, 2), torch.tensor(1.0)
    mean = x.mean(1, keepdim=True)
    luma = only(luma_flip=1)(x, p)
    assert torch.allclose(luma - luma.mean(1, keepdim=True), x - mean, atol=1e-5)
    assert torch.allclose(luma.mean(1).abs(), mean[:, 0].abs(), atol=1e-5) and (luma != x).any()
    hue = only(hue=1)(x, p)  # length and lightness stay
    assert torch.allclose(hue.mean(1), mean[:, 0], atol=1e-5)
    assert torch.allclose(hue.norm(dim=1), x.norm(dim=1), atol=1e-4) and not torch.allclose(hue, x)
    saturation = only(saturation=1)(x, p)
    ratio = (saturation - saturation.mean(1, keepdim=True)) / (x - mean)
    assert torch.allclose(ratio.flatten(1), ratio[:, 0, 0, :1].expand(-1, 12), rtol=1e-2)
    assert abs(ratio[:, 0, 0, 0].log2().std() - 1) < 0.15 and (ratio > 0).all()
    contrast = only(contrast=1)(x, p) / x
    assert abs(contrast[:, 0, 0, 0].log2().std() - 0.5) < 0.08
    brightness = only(brightness=1)(x, p) - x
    assert torch.allclose(brightness, brightness[:, :1, :1, :1].expand_as(x), atol=1e-5)
    assert abs(brightness[:, 0, 0, 0].std() - 0.2) < 0.03
    grey = torch.randn(50, 1, 3, 3)
    assert torch.equal(only(hue=1, saturation=1)(grey, p), grey)
    flipped = only(luma_flip=1)(grey, p)
    assert torch.equal(flipped.abs(), grey.abs()) and not torch.equal(flipped, grey)


@pytest.mark.parametrize("name", NAMES)
def test_each_transformation_happens_with_its_probability(name):
    torch.manual_seed(0)
    x = torch.randn(4000, 3, 12, 12)
    whole = {"flip": 1 / 2, "luma_flip": 1 / 2, "quarter_turns": 3 / 4, "shift": 8 / 9}.get(name, 1.0)
    y = only(**{name: 0.5})(x, torch.tensor(0.6))
    changed = (y != x).flatten(1).any(1).float().mean()
    assert abs(changed - 0.3 * whole) < 0.03


@pytest.mark.slow
def test_on_200_images_the_discriminator_overfits_less_with_it_than_without(tmp_path):
    """The heuristic r_t, the mean sign of its answers to real images (Karras et al., 2020, eq. 1), over the last steps."""
    facts = {"batch_size": 16, "num_workers": 0}
    digits = Digits("image", [1, 8, 8], 10, 17, **facts).splits["train"]
    split = Arrays("image", digits.values[:200].numpy(), None)
    data = Data(
        field="image",
        shape=None,
        classes=None,
        levels=17,
        splits={"train": split, "val": split},
        found_shape=[1, 8, 8],
        class_names=None,
        found_levels=17,
        **facts,
    )
    found = {}
    for name, augment in (("without", None), ("with", ADA(Augment(), ramp_images=10_000))):
        torch.manual_seed(0)
        generator, discriminator = Generator([1, 8, 8], 16, [32, 16], 32, 2), Discriminator([1, 8, 8], [64, 64])
        model = StyleGAN2("image", [1, 8, 8], None, 16, generator, discriminator, gamma=0.0, augment=augment)
        optim = functools.partial(adamw, lr=2e-3, betas=(0.0, 0.99))
        folder = tmp_path / name
        folder.mkdir()
        record = Record(folder)
        record.cut(None)
        lit = LitAdversarial(
            model,
            data,
            optim,
            functools.partial(EMA, decay=0.99),
            record,
            discriminator_optim=optim,
            log_every_steps=300,
        )
        trainer = L.Trainer(
            max_steps=1500,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            plugins=[File(CONFIG, nodes_of(Image(), {}))],
        )
        trainer.fit(lit)
        found[name] = record.latest["train/r_t"]
    print(found, record.latest["train/ada_p"])
    assert found["with"] < found["without"] - 0.05
    assert 0 < record.latest["train/ada_p"] <= 1
