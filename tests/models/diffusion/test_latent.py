"""First stages, latent diffusion over them, captions that steer it."""

import functools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import genai
from genai import checkpoint
from genai.checkpoint.build import build_typed
from genai.cli import compose_config, prepare_training
from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Codec, Reconstructor
from genai.data import captions
from genai.data.image_folder import ImageFolder
from genai.data.images import Digits
from genai.losses.perceptual import LPIPS, RandomFeatures
from genai.modalities.caption import Caption
from genai.modalities.label import Label
from genai.modalities.vector import Vector
from genai.models.diffusion.flow import Flow
from genai.models.diffusion.nets.dit import DiT
from genai.models.diffusion.nets.unet import UNet
from genai.models.diffusion.sampling import samplers, tables
from genai.models.vae.autoencoder import Autoencoder
from genai.models.vae.nets import MapDecoder, MapEncoder
from genai.models.vae.quantize import GumbelSoftmax, ResidualQuantizer, VectorQuantizer
from genai.models.vae.vqvae import VQVAE
from genai.nn.attention import CrossAttention
from genai.nn.latent_space import Latent, SpaceToDepth
from genai.nn.text_encoder import TextEncoder
from genai.train.ema import EMA
from genai.train.run import run

ddim = functools.partial(samplers.sample, solver=tables.ddim)
DDIM = {
    "_target_": "genai.models.diffusion.sampling.samplers.sample",
    "_partial_": True,
    "steps": 2,
    "guidance": None,
    "solver": {"_target_": "genai.models.diffusion.sampling.tables.ddim", "_partial_": True},
}
SMALL = ["logger=none", "max_steps=4", "data.batch_size=8", "callbacks.evaluate.n=16", "callbacks.samples.n=2"]
TEXT = ["+model.net.text._target_=genai.nn.text_encoder.TextEncoder", "+model.net.text.length=32"]


def maps(latent_shape, outputs, channels=8):
    shape = [1, 8, 8]
    return (
        MapEncoder(shape, latent_shape, outputs, channels, [1, 2]),
        MapDecoder(shape, latent_shape, channels, [1, 2]),
    )


def vqvae(quantizer=None):
    torch.manual_seed(0)
    encoder, decoder = maps([4, 2, 2], 4)
    return VQVAE("image", [1, 8, 8], [4, 2, 2], encoder, quantizer or VectorQuantizer(16, 4), decoder)


def autoencoder(**arguments):
    torch.manual_seed(0)
    encoder, decoder = maps([4, 2, 2], 8)
    return Autoencoder("image", [1, 8, 8], [4, 2, 2], encoder, decoder, **arguments)


def images(n=16):
    return rng.uniform(rng.seed_range(3, n), (1, 8, 8)) * 2 - 1


@pytest.mark.parametrize("residual", [False, True])
def test_tokens_are_all_that_a_vqvae_passes_on(residual):
    quantizer = ResidualQuantizer([VectorQuantizer(16, 4), VectorQuantizer(16, 4)]) if residual else None
    model, x = vqvae(quantizer).eval(), images()
    tokens = model.encode(x)
    assert isinstance(model, Codec)
    assert tokens.shape == (16, *model.latent_shape) == (16, 8 if residual else 4)
    assert tokens.min() >= 0 and tokens.max() < model.vocabulary
    through = model.decoder(model.quantizer(model.encoder(x)).z)
    assert torch.allclose(model.decode(tokens), through, atol=1e-5)
    assert torch.equal(model.reconstruct({"image": x}), model.decode(tokens).clamp(-1, 1))


def test_perplexity_is_how_many_codes_are_in_use():
    model = vqvae()
    assert model.perplexity(torch.arange(16)).item() == pytest.approx(16)
    assert model.perplexity(torch.tensor([3, 3, 5, 5])).item() == pytest.approx(2)


def test_the_loss_of_a_vqvae_is_error_and_commitment():
    model, x = vqvae().eval(), images()
    z = model.encoder(x)
    code = model.quantizer.decode(model.encode(x).view(-1, 2, 2, 1))
    expected = (model.decoder(code) - x).square().mean() + 0.25 * (z - code).square().mean()
    assert model({"image": x}, 0).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_a_dvae_relaxes_its_codes_at_the_temperature_of_the_step():
    model, x = vqvae(GumbelSoftmax(4, anneal_steps=10)).train(), images()
    torch.manual_seed(1)
    losses = model({"image": x}, 10)
    torch.manual_seed(1)
    z = model.encoder(x)
    y = model.decoder(((z - torch.empty_like(z).exponential_().log()) * 16).softmax(1))
    kl = (z.softmax(1) * (4 * z.softmax(1)).log()).sum(1).mean()
    assert losses.total.item() == pytest.approx(((y - x).square().mean() + 0.25 * kl).item(), rel=1e-5)
    assert losses.logs["kl"][0].item() == pytest.approx(kl.item(), rel=1e-5)


def test_the_loss_of_an_autoencoder_is_error_kl_and_what_the_eye_sees():
    model, x = autoencoder(kl_weight=0.5, perceptual=RandomFeatures([1, 8, 8]), perceptual_weight=0.3).eval(), images()
    torch.manual_seed(1)
    losses = model({"image": x}, 0)
    torch.manual_seed(1)
    mean, log_variance = model.posterior(x)
    z = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
    y = model.decoder(z)
    normal = torch.distributions.Normal
    kl = (
        torch.distributions.kl_divergence(normal(mean, torch.exp(log_variance / 2)), normal(0, 1)).sum((1, 2, 3)).mean()
    )
    expected = (y - x).square().mean() + 0.5 * kl / 64 + 0.3 * model.perceptual(x, y).mean()
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(model.encode(x), mean)
    assert isinstance(model, Codec) and isinstance(model, Reconstructor)


class PublishedDistance(nn.Module):
    """What the package lpips has: features, and dropout before the last layer."""

    def __init__(self, net, verbose):
        super().__init__()
        self.features, self.last = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Dropout(), nn.Conv2d(8, 1, 1))

    def forward(self, x, y):
        return self.last((self.features(x) - self.features(y)).square()).mean((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch):
    package = types.ModuleType("lpips")
    package.LPIPS = PublishedDistance
    monkeypatch.setitem(sys.modules, "lpips", package)


def test_lpips_stays_in_evaluation_mode_and_out_of_every_state(lpips):
    torch.manual_seed(0)
    plain, model = autoencoder(), autoencoder(perceptual=LPIPS(), perceptual_weight=0.3)
    x, y = torch.rand(2, 4, 1, 8, 8)
    model.train()
    assert torch.equal(model.perceptual(x, y), model.perceptual(x, y)) and model.perceptual(x, y).gt(0).all()
    assert model.state_dict().keys() == plain.state_dict().keys()
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert EMA(model).module.perceptual is model.perceptual  # 14 million numbers of VGG, once
    y.requires_grad_()
    model.perceptual(x, y).sum().backward()
    assert y.grad.abs().sum() > 0
    model.double()
    assert model.perceptual(x.double(), y.double()).dtype == torch.float64


def test_a_run_with_lpips_goes_on_and_samples_where_the_package_is_absent(tmp_path, monkeypatch, lpips):
    changes = ["model=autoencoder", f"run_dir={tmp_path / 'run'}", *SMALL]
    run(compose_config("train", [*changes, "model.perceptual={_target_: genai.losses.perceptual.LPIPS, net: vgg}"]))
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = checkpoint.read(path)
    assert not [k for part in ("model", "ema") for k in content[part] if "perceptual" in k]
    sampled = genai.sample(genai.load(path), n=2, seed=1)["image"]
    content["model"]["perceptual.distance.features.weight"] = torch.ones(8, 3, 3, 3)  # as older files have them
    checkpoint.save(content, path)
    run(compose_config("train", [f"resume={tmp_path / 'run'}", "max_steps=6"], prepare_training))
    monkeypatch.delitem(sys.modules, "lpips")
    checkpoint.save(content, tmp_path / "old.ckpt")
    assert torch.equal(genai.sample(genai.load(tmp_path / "old.ckpt"), n=2, seed=1)["image"], sampled)
    with pytest.raises(UserError, match="needs the package lpips"):
        LPIPS()


def test_random_features_are_a_distance_that_is_always_the_same():
    one, other, x = RandomFeatures([1, 8, 8]), RandomFeatures([1, 8, 8]), images()
    assert torch.equal(one(x, x.flip(0)), other(x, x.flip(0)))
    assert one(x, x).abs().max() == 0
    assert torch.allclose(one(x, x.flip(0)), one(x.flip(0), x))
    assert not one.state_dict()
    near, far = x + 0.05 * images().flip(0), x + 0.5 * images().flip(0)
    assert (one(x, near) < one(x, far)).all()


def test_nets_of_a_first_stage_say_which_latents_they_make():
    with pytest.raises(UserError, match=r"latents of shape \[4, 3, 3\] were asked for, but .* is \[channels, 2, 2\]"):
        MapEncoder([1, 8, 8], [4, 3, 3], 4, 8, [1, 2])
    shape = [1, 13, 9]
    encoder, decoder = MapEncoder(shape, [4, 4, 3], 4, 8, [1, 2]), MapDecoder(shape, [4, 4, 3], 8, [1, 2])
    assert decoder(encoder(torch.zeros(2, *shape))).shape == (2, *shape)


def latent_flow(net=None, text=True):
    torch.manual_seed(0)
    encoder = TextEncoder(8, 16, 1, 2) if text else None
    net = net or UNet([4, 4, 4], 8, [1], 1, [4], text=encoder)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.2)  # branches that begin at zero
    return Flow(net, [4, 4, 4], latent=Latent(SpaceToDepth("image", [1, 8, 8], 2)), guidance=2.0).eval()


def test_latents_are_scaled_to_mean_0_and_deviation_1_and_back():
    latent, x = Latent(autoencoder()), images(64)
    latent.measure([{"image": x[:40]}, {"image": x[40:]}])
    z = latent.encode({"image": x})
    std, mean = torch.std_mean(z, (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(4), atol=1e-5) and torch.allclose(std, torch.ones(4), atol=1e-4)
    assert torch.allclose(latent.decode(z), latent.codec.decode(latent.codec.encode(x)), atol=1e-5)
    assert torch.equal(latent.encode({"latent": latent.codec.encode(x)}), z)
    other = Latent(autoencoder())
    other.load_state_dict(latent.state_dict())
    assert torch.equal(other.mean, latent.mean) and torch.equal(other.std, latent.std)
    assert not any(p.requires_grad for p in latent.parameters())
    assert not latent.train().codec.training


def test_a_first_stage_without_continuous_latents_is_refused():
    with pytest.raises(UserError, match="a VQVAE, which has no continuous latents"):
        Latent(vqvae())
    with pytest.raises(UserError, match=r"model.shape=\[1, 8, 8\], but the first stage's latents are \[4, 4, 4\]"):
        Flow(nn.Identity(), [1, 8, 8], latent=Latent(SpaceToDepth("image", [1, 8, 8], 2)))
    constant = Latent(autoencoder())
    with pytest.raises(UserError, match=r"channel 0 .* the same for all data"):
        constant.measure([{"latent": torch.ones(3, 4, 2, 2)}])


def test_the_loss_in_latents_is_that_of_the_latents():
    model, x = latent_flow(text=False), images()
    plain = Flow(model.net, [4, 4, 4], field="latent").eval()
    torch.manual_seed(2)
    a = model({"image": x}, 0).total
    torch.manual_seed(2)
    assert torch.equal(a, plain({"latent": model.encode_data({"image": x})}, 0).total)
    seeds = torch.arange(3)
    out = ddim(plain, seeds, steps=3)["latent"]
    assert torch.allclose(ddim(model, seeds, steps=3)["image"], model.decode_data(out), atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_networks_see_the_caption_and_not_its_padding(kind):
    torch.manual_seed(0)
    text = TextEncoder(8, 16, 1, 2).eval()
    net = UNet([4, 4, 4], 8, [1], 1, [4], text=text) if kind == "unet" else DiT([4, 4, 4], 2, 16, 2, 2, text=text)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.2)
    net.eval()
    x, time = torch.randn(3, 4, 4, 4), torch.full((3,), 500.0)
    ids = captions.encode(["one", "two", ""], 8, "length")
    context = text(ids)
    assert context.real.sum(1).tolist() == [4, 4, 1]
    out = net(x, time, **context._asdict())
    assert out.shape == x.shape
    elsewhere = context.states + 9 * ~context.real[..., None]
    assert torch.allclose(net(x, time, states=elsewhere, real=context.real), out, atol=1e-5)
    within = context.states.clone()
    within[0, 2] += 1
    changed = net(x, time, states=within, real=context.real)
    change = (changed - out).abs().flatten(1).amax(1)
    assert change[0] > 1e-3 and change[1:].max() < 1e-5
    assert torch.equal(net(x, time, **context._asdict(), projected=net.project(context)), out)
    elsewhere = net(x, time, **context._asdict(), projected=net.project(context._replace(states=within)))
    assert torch.allclose(elsewhere, changed, atol=1e-5)  # no first state changed, which is the network's other input
    with torch.no_grad():
        text.embed.weight[255] += 5  # what padding looks up
        text.transformer.position.table.weight[5:] += 5
    again = text(ids).states
    assert torch.allclose(again[context.real], context.states[context.real], atol=1e-5)


def test_a_dit_begins_at_zero_and_its_blocks_as_identities():
    net = DiT([4, 6, 4], 2, 16, 2, 2, classes=3)
    x = torch.randn(2, 4, 6, 4)
    assert not net(x, torch.zeros(2), torch.tensor([0, 1])).any()
    h, emb = torch.randn(2, 6, 16), torch.randn(2, 16)
    assert torch.equal(net.blocks[0](h, emb), h)
    assert len(net.positions.unique(dim=0)) == 6
    for given, message in [({"shape": [4, 5, 4]}, "sides model.net.patch=2 divides"), ({"shape": [2]}, "takes")]:
        with pytest.raises(UserError, match=message):
            DiT(**given, patch=2)


def test_recomputed_activations_change_no_gradient():
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        net = DiT([4, 4, 4], 2, 16, 2, 2, gradient_checkpointing=again)
        nn.init.normal_(net.head.weight)
        net(torch.ones(2, 4, 4, 4), torch.ones(2)).sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_guidance_leads_from_the_negative_prompt_to_the_prompt():
    model, seeds = latent_flow(), torch.arange(2)
    ids = {name: captions.encode([name] * 2, 8, "length") for name in ("one", "two")}
    sample = lambda cond, w: ddim(model, seeds, cond, steps=2, guidance=w)["image"]  # noqa: E731
    one = sample({"caption": ids["one"]}, 1.0)
    assert torch.allclose(sample({"caption": ids["one"], "negative": ids["one"]}, 3.0), one, atol=1e-4)
    away = sample({"caption": ids["one"], "negative": ids["two"]}, 3.0)
    assert (away - sample({"caption": ids["one"]}, 3.0)).abs().max() > 1e-3
    assert torch.allclose(sample({"caption": ids["two"], "negative": ids["one"]}, 0.0), one, atol=1e-4)
    none = model.null_conditions(2)
    assert torch.allclose(ddim(model, seeds, None, steps=2)["image"], sample(none, 1.0), atol=1e-5)
    alone = ddim(model, seeds[1:], {"caption": ids["one"][1:]}, steps=2, guidance=3.0)["image"]
    assert torch.allclose(alone[0], sample({"caption": ids["one"]}, 3.0)[1], atol=1e-4)


def test_training_leaves_captions_out_as_often_as_it_says():
    model = latent_flow().train()
    model.label_dropout = 0.3
    batch = {"caption": captions.encode(["seven"] * 4000, 8, "length"), "image": torch.zeros(4000, 1, 8, 8)}
    real = model.training_conditions(batch)["real"]
    assert (real.sum(1) == 1).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert set(real.sum(1).tolist()) == {1, 6}


# Captions


def digits(**arguments):
    given = {"root": None, "templates": ["a {}", "the {}"], "names": None, "file": None, "length": 16, **arguments}
    facts = {"field": "image", "shape": [1, 8, 8], "classes": 10, "levels": 17, "batch_size": 4}
    return captions.Captioned(Digits(**facts), **given, **facts)


def said(ids):
    return [bytes(i for i in row if i < 256).decode() for row in ids.tolist()]


def test_templates_speak_of_the_class():
    data = digits()
    index = torch.arange(5)
    batch = data.splits["val"].batch(index, None)
    assert said(batch["caption"]) == [f"a {y}" for y in batch["label"].tolist()]
    draws = torch.tensor([[0.0] * 3 + [u] for u in (0.0, 0.49, 0.5, 0.99, 0.2)])
    batch = data.splits["train"].batch(index, draws)
    words = ["a", "a", "the", "the", "a"]
    assert said(batch["caption"]) == [f"{w} {y}" for w, y in zip(words, batch["label"].tolist(), strict=True)]
    assert data.splits["train"].augments
    assert said(data.cond(12)["caption"])[9:11] == ["a 9", "a 0"]
    assert said(digits(names=list("abcdefghij")).cond(2)["caption"]) == ["a a", "a b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"templates": None}, "set one of them"),
        ({"file": "x"}, "set one of them"),
        ({"templates": ["no place"]}, "with a place {} for the class name"),
        ({"names": ["one"]}, "are 1, but this data has 10 classes"),
        ({"length": 4}, "'the 0' is 5 bytes long, but data.length is 4"),
        ({"templates": None, "file": "captions.jsonl"}, "with data.images of an image folder"),
    ],
)
def test_wrong_captions(arguments, message):
    with pytest.raises(UserError, match=message):
        digits(**arguments)


def folder(path: Path, lines: list[str] | None, n=24):
    path.mkdir()
    for i in range(n):
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(path / f"{i:02d}.png")
    if lines is not None:
        (path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    plain: dict = {"field": "image", "shape": None, "classes": None, "levels": None, "batch_size": 4}
    inner = ImageFolder(str(path), None, None, "center", False, **plain)
    return captions.Captioned(
        inner, root=str(path), templates=None, names=None, file="captions.jsonl", length=32, **plain
    )


def test_captions_of_files_go_with_them(tmp_path):
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": f"grey {10 * i}"}) for i in range(24)]
    data = folder(tmp_path / "a", [*lines, json.dumps({"file_name": "03.png", "text": "again"})])
    seen = {}
    for split in data.splits.values():
        batch = split.batch(torch.arange(len(split)), None)
        for image, text in zip(batch["image"], said(batch["caption"]), strict=True):
            seen[round((image.mean().item() + 1) * 127.5)] = text
    assert seen == {10 * i: f"grey {10 * i}" for i in range(24)}


def test_captions_may_be_in_the_zip_of_their_images(tmp_path):
    lines = [json.dumps({"file_name": f"./{i:02d}.png", "text": f"grey \\ud800 {10 * i}"}) for i in range(24)]
    folder(tmp_path / "a", [*lines, ""])
    shutil.make_archive(str(tmp_path / "pictures"), "zip", tmp_path, "a")
    plain: dict = {"field": "image", "shape": None, "classes": None, "levels": None, "batch_size": 4}
    root = str(tmp_path / "pictures.zip")
    inner = ImageFolder(root, None, None, "center", False, **plain)
    data = captions.Captioned(inner, root=root, templates=None, names=None, file="captions.jsonl", length=32, **plain)
    assert data.splits["train"].batch(torch.arange(2), None)["caption"].shape == (2, 32)
    assert set(data.cond(3)) == {"caption"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "there is no captions.jsonl"),
        (
            ['{"file_name": "00.png", "text": "a"}'],
            r"of .* images in .* have no caption in captions.jsonl \(\d\d.png, ",
        ),
        (["{"], "line 1, is not JSON with file_name and text"),
        (['{"file_name": "00.png"}'], "line 1, is not JSON .*'text'"),
        (["", '{"file_name": "00.png", "text": null}'], "line 2, is not JSON .*text is None"),
    ],
)
def test_wrong_caption_files(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        folder(tmp_path / "a", lines)


# From the command line


def train(*arguments):
    return run(compose_config("train", list(arguments), prepare_training))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """An autoencoder of digits, and a latent model over it that reads captions."""
    root = tmp_path_factory.mktemp("stages")
    first = train("model=autoencoder", "data=digits", f"run_dir={root / 'first'}", "model.kl_weight=0", *SMALL)
    second = train(
        "model=latent",
        "data=digits_text",
        f"codec.ckpt={first}",
        "model.net.multipliers=[1]",
        f"run_dir={root / 'second'}",
        "sampler.steps=2",
        *TEXT,
        *SMALL,
    )
    return first, second


def test_the_latent_checkpoint_samples_alone(stages, tmp_path):
    first, second = stages
    stored = genai.load(second)
    shutil.copy(second / "checkpoints" / "last.ckpt", tmp_path / "alone.ckpt")
    hidden = first.rename(first.with_name("hidden"))
    try:
        alone = genai.load(tmp_path / "alone.ckpt")
        x = genai.sample(alone, n=3, prompt="a handwritten seven", negative_prompt=["one", "two"], guidance=2.0)[
            "image"
        ]
        assert x.shape == (3, 1, 8, 8)
        again = genai.sample(stored, n=1, seed=1, prompt="a handwritten seven", negative_prompt="two", guidance=2.0)[
            "image"
        ]
        assert torch.allclose(x[1], again[0], atol=1e-4)
    finally:
        hidden.rename(first)
    codec, own = genai.load(first).model.state_dict(), alone.model.codec.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in codec.items())
    content = checkpoint.read(second / "checkpoints" / "last.ckpt")
    assert not any(".codec." in name for name in content["ema"])  # a frozen part is stored once
    assert (alone.model.latent.std != 1).all()


@pytest.mark.gpu
def test_latents_keep_their_scale_on_another_device(stages):
    _, second = stages
    given = {"n": 4, "prompt": "a handwritten seven", "guidance": 2.0}
    here, there = (genai.load(second, device=device) for device in ("cpu", "cuda"))
    assert torch.equal(here.model.latent.std, there.model.latent.std.cpu())
    difference = genai.sample(here, **given)["image"] - genai.sample(there, **given)["image"]
    assert difference.abs().max() < 1e-3


def test_a_changed_first_stage_is_refused(stages, tmp_path):
    first, _ = stages
    for source in stages:
        shutil.copytree(source, tmp_path / source.name)
    config = (tmp_path / "second" / "config.yaml").read_text().replace(str(first), str(tmp_path / "first"))
    (tmp_path / "second" / "config.yaml").write_text(config)
    train(f"resume={tmp_path / 'second'}", "max_steps=5")
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        path = tmp_path / "first" / "checkpoints" / name
        if path.exists():
            content = checkpoint.read(path)
            next(iter(content["ema"].values())).add_(1e-3)
            checkpoint.save({k: v for k, v in content.items() if k not in ("format", "rng_version")}, path)
    with pytest.raises(UserError, match=r"has changed: its SHA-256 is \w{16}\.\.\., and codec.sha256 says"):
        train(f"resume={tmp_path / 'second'}", "max_steps=6")
    shutil.rmtree(tmp_path / "first")  # what is in the checkpoint is enough
    train(f"resume={tmp_path / 'second'}", "max_steps=6")


def test_latents_from_disk_are_those_of_the_first_stage(stages, tmp_path):
    first, second = stages
    arguments = [
        "model=latent",
        "data=digits_text",
        f"codec.ckpt={first}",
        "model.net.multipliers=[1]",
        "sampler.steps=2",
        f"codec.cache={tmp_path / 'cache'}",
        *TEXT,
        *SMALL,
    ]
    for name in ("a", "b"):  # the second reads what the first wrote
        one = train(*arguments, f"run_dir={tmp_path / name}")
        a, b = (checkpoint.read(f / "checkpoints" / "last.ckpt")["model"] for f in (one, second))
        assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in b)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3
    for source, name in ((second, "plain"), (tmp_path / "a", "cached")):  # resumed, and the one without a cache too
        shutil.copytree(source, tmp_path / name)
        train(f"resume={tmp_path / name}", "max_steps=6")
    a, b = (checkpoint.read(tmp_path / f / "checkpoints" / "last.ckpt")["model"] for f in ("plain", "cached"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in b)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


def test_a_run_killed_before_its_first_checkpoint_keeps_its_first_stage(stages, tmp_path):
    _, second = stages
    shutil.copytree(second, tmp_path / "run", ignore=shutil.ignore_patterns("*.ckpt"))
    train(f"resume={tmp_path / 'run'}")
    a, b = (checkpoint.read(f / "checkpoints" / "last.ckpt")["model"] for f in (second, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_old_weights_do_not_bring_their_first_stage_along(stages, tmp_path):
    _, second = stages
    other = train("model=autoencoder", "data=digits", "seed=5", f"run_dir={tmp_path / 'other'}", *SMALL)
    run = train(
        "model=latent",
        "data=digits_text",
        f"codec.ckpt={other}",
        "model.net.multipliers=[1]",
        "sampler.steps=2",
        f"init_from={second}",
        f"run_dir={tmp_path / 'run'}",
        *TEXT,
        *SMALL,
    )
    codec, own = genai.load(other).model.state_dict(), genai.load(run).model.codec.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in codec.items())


def test_a_checksum_does_not_depend_on_the_layout_in_memory():
    weight = torch.randn(6, 4, 1, 1)
    contents = [
        {"config": {"model": {}}, "model": {"w": w}, "ema": {}}
        for w in (weight, weight.to(memory_format=torch.channels_last))
    ]
    assert checkpoint.digest(contents[0]) == checkpoint.digest(contents[1])


def test_a_caption_alone_leaves_the_label_out():
    torch.manual_seed(0)
    text = TextEncoder(8, 16, 1, 2)
    net = DiT([4, 4, 4], 2, 16, 2, 2, classes=10, text=text)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.2)
    model = Flow(net, [4, 4, 4], classes=10, latent=Latent(SpaceToDepth("image", [1, 8, 8], 2))).eval()
    caption, seeds = captions.encode(["one"] * 3, 8, "length"), torch.arange(3)
    alone = ddim(model, seeds, {"caption": caption}, steps=2)["image"]
    null = ddim(model, seeds, {"caption": caption, "label": torch.full((3,), 10)}, steps=2)["image"]
    assert torch.allclose(alone, null, atol=1e-5)
    conditions = {"caption": Caption(8), "label": Label(10)}
    loaded = checkpoint.Loaded(
        model, {"model": {"classes": 10}, "sampler": DDIM}, Vector("image"), conditions, 0, Path("x")
    )
    assert "label" not in genai.sample(loaded, n=3, prompt="one")
    assert genai.sample(loaded, n=3, prompt="one", label=4)["label"].tolist() == [4, 4, 4]
    assert genai.sample(loaded, n=3)["label"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"sampler='ddim' must be a config node"):
        genai.sample(loaded, n=1, sampler="ddim")


def test_captions_are_as_long_as_the_network_reads():
    model = latent_flow()
    with pytest.raises(UserError, match=r"model.net.text.length=8, but captions have data.length=9"):
        model.prepare([{"caption": captions.encode(["a"], 9, "x"), "image": images(1)}])


def test_what_cannot_be_steered_or_decoded_is_refused_in_a_sentence(stages, tmp_path):
    first, second = stages
    vq = train("model=vqvae", "data=digits", f"run_dir={tmp_path / 'vq'}", *SMALL)
    latent = ["model=latent", "data=digits", "model.net.multipliers=[1]", f"run_dir={tmp_path / 'x'}", *SMALL]
    cases = {
        (f"codec.ckpt={vq}",): "is a VQVAE, which has no continuous latents",
        (f"codec.ckpt={first}", "data=toy2d"): r"takes image of shape \[1, 8, 8\], but this data is vector",
        (f"codec.ckpt={first}", "codec.sha256=" + 64 * "0"): "has changed",
        (f"codec.ckpt={tmp_path / 'none'}",): "there is no checkpoint",
        ("model.net.multipliers=[1,2,2,2]",): "multiples of 8, got 4x4",
        ("codec.model.factor=3",): "codec.model.factor=3 must divide 8 and 8",
    }
    for arguments, message in cases.items():
        with pytest.raises(UserError, match=message):
            train(*latent, *arguments)
        assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="this model takes no text"):
        genai.sample(genai.load(first), n=1, prompt="a seven")
    with pytest.raises(UserError, match="there is no prompt= to guide towards"):
        genai.sample(genai.load(second), n=1, negative_prompt="a seven")
    with pytest.raises(UserError, match=r"is 40 bytes long, but data.length of this model is 32"):
        genai.sample(genai.load(second), n=1, prompt=40 * "x")


def test_a_vqvae_shows_its_reconstructions_in_training(tmp_path):
    folder = train("model=vqvae", "data=digits", f"run_dir={tmp_path / 'vq'}", *SMALL, "callbacks.samples.n=20")
    loaded = genai.load(folder)
    x = genai.sample(loaded, n=20, sampler={**loaded.config["preview"], "split": "test"})["image"]
    real = build_typed(loaded.config["data"]).splits["test"].batch(torch.arange(10), None)["image"]
    assert torch.equal(x[:10], real)
    assert torch.allclose(x[10:], loaded.model.reconstruct({"image": real}), atol=1e-5)
    assert (folder / "samples" / "samples_0000004.png").exists()


# The sampler's keys, with captions and in latents


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_each_model_encodes_its_own_captions_once_a_call(kind):
    """Of a worse model too, and within an interval of guidance, where a caption of padding is the other; keys and values of the
    captions are computed once for each batch that the network is called with."""
    nets = [DiT([4, 4, 4], 2, 16, 2, 2, text=TextEncoder(8, 16, 1, 2)) if kind == "dit" else None for _ in range(2)]
    model, worse = map(latent_flow, nets)
    with torch.no_grad():
        for p in worse.parameters():
            p.mul_(0.8)
    caption, seeds, read = captions.encode(["one", "two"], 8, "length"), torch.arange(2), []
    seen: list = []
    for m in (model, worse):
        m.text.register_forward_hook(lambda module, inputs, output: read.append((module, len(inputs[0]))))
        for attention in (module for module in m.modules() if isinstance(module, CrossAttention)):
            attention.kv.register_forward_hook(lambda module, inputs, output: seen.append((module, len(inputs[0]))))
    cond = {"caption": caption}
    guided = ddim(model, seeds, cond, steps=1, guidance=3.0, autoguidance=worse)["image"]
    assert read.count((model.text, 2)) == read.count((worse.text, 2)) == 1
    x = rng.normal(seeds, (4, 4, 4), stream=rng.INITIAL)
    ours, theirs = (m.denoise(x, 1.0, m.net_inputs(cond, 2)).out for m in (model, worse))
    assert torch.allclose(guided, model.decode_data(x - (theirs + 3 * (ours - theirs))), atol=1e-4)

    read.clear(), seen.clear()
    limited = ddim(model, seeds, cond, steps=4, guidance=3.0, guidance_interval=[0.5, 2.0])["image"]
    assert read == [(model.text, 2), (model.text, 1)]
    assert sorted(n for _, n in seen) == sorted([2, 4] * len({module for module, _ in seen}))
    assert not torch.equal(limited, ddim(model, seeds, cond, steps=4, guidance=3.0)["image"])
    assert torch.allclose(
        ddim(model, seeds, cond, steps=4, guidance=0)["image"], ddim(model, seeds, None, steps=4)["image"], atol=1e-5
    )
    with pytest.raises(
        UserError, match="autoguidance= guides away from a worse model, negative_prompt= away from a caption"
    ):
        ddim(model, seeds, {**cond, "negative": caption}, steps=1, autoguidance=worse)


def test_images_go_through_the_first_stage_and_what_is_kept_comes_back_as_it_was():
    model, seeds, x = latent_flow(text=False), torch.arange(3), images(3)
    states = []
    ddim(model, seeds, None, lambda i, n, state: states.append(state["x"]), image=x, strength=0.001, steps=4)
    assert torch.allclose(states[-1], model.encode_data({"image": x}), atol=0.05)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :5, :] = 1  # the third row of latents stands for kept and lost pixels
    out = ddim(model, seeds, None, image=x, mask=mask, steps=4)["image"]
    assert torch.equal(out[:, :, :5], x[:, :, :5]) and (out[:, :, 6:] - x[:, :, 6:]).abs().max() > 0.1
    assert torch.equal(model.latent.downsample_mask(mask)[0, :, :, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4))
    assert ddim(model, seeds, None, steps=4, frames=True)["frames"].shape == (3, 5, 1, 8, 8)
