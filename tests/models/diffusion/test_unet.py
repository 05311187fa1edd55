"""Which places see which: attention and captions of every network of the README's tables over every data set of images."""

import functools
import re

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from genai.checkpoint.build import build_stored, build_typed
from genai.cli import compose_config
from genai.core.errors import UserError
from genai.data import captions
from genai.models.diffusion.nets.dit import DiT, DiTBlock
from genai.models.diffusion.nets.unet import AttentionBlock, UNet
from genai.models.gan import biggan
from genai.nn.text_encoder import TextEncoder
from tests.conftest import ROOT

DATA = {
    path.stem: node
    for path in sorted((ROOT / "conf/data").glob("*.yaml"))
    if (node := OmegaConf.load(path)).field == "image"
}
NETS = ("UNet", "DiT", "biggan.Generator", "biggan.Discriminator")
MODELS = sorted(
    path.stem
    for path in (ROOT / "conf/model").glob("*.yaml")
    if any(re.search(rf"_target_: .*{name}\n", path.read_text()) for name in NETS) and "audio" not in path.stem
)
RECIPES = sorted(
    path.stem for path in (ROOT / "conf/experiment").glob("*.yaml") if "attention_depths" in path.read_text()
)
NARROW = {"channels": 8, "width": 16, "blocks": 1, "layers": 2}
config = functools.cache(lambda choice: compose_config("train", [choice]))


def networks(choice, data=None):
    """The attending networks of a model's or experiment's config with the facts of `data`, narrow and without zeros."""
    cfg = config(choice).copy()
    if data is not None:
        cfg.data = DATA[data].copy()
    cfg.data.shape = cfg.data.shape or [3, 64, 64]
    cfg.data.levels = min(cfg.data.levels or 8, 8)
    if "codec" in cfg and data is not None:
        factor = cfg.codec.model.factor
        channels, height, width = cfg.data.shape
        cfg.codec.shape = [channels * factor**2, height // factor, width // factor]
    nodes = [cfg.model[key] for key in ("net", "generator", "discriminator") if key in cfg.model]
    for node in (node.net if "net" in node else node for node in nodes):
        node.update({key: value for key, value in NARROW.items() if key in node})
        if "text" in node:
            length = OmegaConf.select(cfg, "data.length", default=32)
            node.text = {"_target_": "genai.nn.text_encoder.TextEncoder", "length": length, "width": 16}
        net = build_typed(OmegaConf.to_container(node, resolve=True)).eval()
        for p in net.parameters():
            nn.init.normal_(p, 0.0, 0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
        yield net.double(), cfg.data.shape if "codec" not in cfg else cfg.codec.shape


def local(net):
    """The net without what else lets one place see all others, and with softmaxes that are far from flat."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm | nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return net


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("model", MODELS)
def test_every_place_sees_every_other(model, data):
    for net, shape in networks(f"model={model}", data):
        attends(net, shape)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_attend(recipe):
    for net, shape in networks(f"experiment={recipe}"):
        attends(net, shape)


def attends(net, shape):
    blocks = [m for m in net.modules() if isinstance(m, AttentionBlock | DiTBlock | biggan.SelfAttention)]
    assert blocks
    if not isinstance(net, UNet | DiT):
        return
    torch.manual_seed(0)
    x = torch.randn(1, *shape, dtype=torch.float64)
    cond = {} if net.label is None else {"label": torch.zeros(1, dtype=torch.int64)}
    if net.text is not None:
        words = captions.encode(["bird"], net.text.length, "length")
        context = net.text(words)
        cond |= {"states": context.states.detach().requires_grad_(), "real": context.real}
    time = torch.full((1,), 400.0, dtype=torch.float64)
    out = local(net)(x, time, **cond)
    far = x.clone()
    far.flatten(2)[..., -1] += 3
    assert (net(far, time, **cond) != out).all()
    if net.text is not None:  # and every byte of a caption, not the sum of it alone
        weight = torch.randn_like(out)
        (gradient,) = torch.autograd.grad((out * weight).sum(), cond["states"])
        moved = gradient[0].abs().amax(1)
        assert (moved[:5] > 1e-9).all() and (moved[5:] == 0).all()


DIGITS = {"shape": [1, 8, 8], "channels": 8, "multipliers": [1, 2], "blocks": 1}
TARGET = {"_target_": "genai.models.diffusion.nets.unet.UNet"}


def where(net):
    """The stages that attend, in the order they run."""
    stages = [*net.down, net.middle, *net.up]
    return [i for i, stage in enumerate(stages) if any(isinstance(block, AttentionBlock) for block in stage)]


@pytest.mark.parametrize(
    ("depths", "heights"), [([0], [8]), ([-2], [8]), ([1], [4]), ([-1], [4]), ([0, 1], [4, 8]), ([], [])]
)
def test_depths_count_halvings_from_either_end(depths, heights):
    """A config of before named heights, and means them still."""
    new = build_typed({**TARGET, **DIGITS, "attention_depths": depths})
    old = build_stored({**TARGET, **DIGITS, "attention": heights})
    assert where(new) == where(old)
    assert [*new.state_dict()] == [*old.state_dict()]
    assert [p.shape for p in new.parameters()] == [p.shape for p in old.parameters()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"attention_depths": [2]}, r"attention_depths=\[2\] .* 0 to 1, or -2 to -1"),
        ({"attention_depths": [0, -3]}, r"attention_depths=\[0, -3\] .* 0 to 1, or -2 to -1"),
        ({"attention": [16]}, r"attention=\[16\] .* heights \[8, 4\] .*\.attention_depths, such as"),
        ({"attention": [4], "attention_depths": [1]}, "give attention_depths alone"),
        ({"attention_depths": [], "text": TextEncoder(4, 8)}, r"attention_depths=\[\] .* caption"),
    ],
)
def test_attention_that_would_be_nowhere_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        UNet(**DIGITS, **arguments)


def test_a_network_attends_at_its_least_size_by_default():
    assert where(UNet(**DIGITS)) == where(UNet(**DIGITS, attention_depths=[-1])) != []


def test_a_stored_config_whose_heights_match_nothing_still_means_no_attention():
    for given in ({}, {"attention": [16]}):
        assert where(build_stored({**TARGET, **DIGITS, **given})) == []


@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_a_biggans_depths_are_its_heights_of_before(part):
    make = {"generator": functools.partial(biggan.Generator, latents=6), "discriminator": biggan.Discriminator}[part]
    new, old = make([1, 8, 8], attention_depths=[1]), make([1, 8, 8], attention=[4])
    assert [*new.state_dict()] == [*old.state_dict()] != [*make([1, 8, 8]).state_dict()]
    assert [*make([1, 8, 8], attention_depths=[-1]).state_dict()] != [*make([1, 8, 8]).state_dict()]
    for wrong, sentence in (({"attention": [7]}, "attention_depths"), ({"attention_depths": [3]}, "0 to 1|1 to 2")):
        with pytest.raises(UserError, match=sentence):
            make([1, 8, 8], **wrong)
