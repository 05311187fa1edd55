"""Models of captions and images from a new user's chair: they train, sample and complete, and wrong commands say what to do."""

import json

import numpy as np
import pytest
from PIL import Image

from genai.cli import compose_config, prepare_sampling
from tests.test_melodies import refusal

SMALL = ["debug=true", "logger=none", "model.transformer.width=16", "model.transformer.layers=1"]
NEW = {"dalle": ["sampler=dalle"], "maskgit": ["sampler=maskgit", "sampler.steps=2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of each model, of a model without captions, and pictures, made in this process."""
    from genai.train.run import run

    root = tmp_path_factory.mktemp("text_image")
    for name in NEW:
        run(compose_config("train", [f"model={name}", *SMALL, f"run_dir={root / name}"]))
    run(compose_config("train", ["model=autoencoder", "debug=true", "logger=none", f"run_dir={root / 'first'}"]))
    pairs = ["model=contrastive", "data=digits_text", "model.encoders.audio=null", "debug=true", "logger=none"]
    run(compose_config("train", [*pairs, f"run_dir={root / 'pairs'}"]))
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(root / "grey.png")
    for name, rows in (("lower", slice(4, 8)), ("middle", slice(3, 5)), ("nothing", slice(0))):
        white = np.zeros((8, 8), np.uint8)
        white[rows] = 255
        Image.fromarray(white).save(root / f"{name}.png")
    (root / "text.png").write_text("no picture")
    return root


@pytest.mark.parametrize("name", NEW)
def test_pictures_are_made_and_completed(folder, tmp_path, name):
    from genai.sampling import run as sample

    given = [f"ckpt={folder / name}", "n=2", *NEW[name], "prompt=a handwritten seven"]
    for i, more in enumerate(
        ([], [f"image={folder / 'grey.png'}"], [f"image={folder / 'grey.png'}", f"mask={folder / 'lower.png'}"])
    ):
        out = sample(compose_config("sample", [*given, *more, f"out={tmp_path / str(i)}"], prepare_sampling))
        x = np.load(out / "samples.npz")["samples"]
        assert x.shape[0] == 2 and x.dtype == np.uint8 and (out / "captions.jsonl").exists()
        assert not more or (x.reshape(2, 8, 8)[:, :4] == 128).all()


def test_of_several_candidates_the_one_that_suits_the_caption_is_kept_and_noted(folder, tmp_path):
    from genai.sampling import run as sample

    given = [f"ckpt={folder / 'dalle'}", "sampler=dalle", "prompt=[a handwritten seven,the digit one]"]
    found = {}
    for k, n in (1, 4), (3, 4), (3, 2):
        out = tmp_path / f"{k}_{n}"
        chosen = [f"rerank={k}", f"scorer={folder / 'pairs'}", f"n={n}", f"out={out}"]
        sample(compose_config("sample", [*given, *chosen], prepare_sampling))
        note = json.loads((out / "rerank.json").read_text())
        assert (note["candidates"], note["scorer"]) == (k, str(folder / "pairs"))
        found[k, n] = np.load(out / "samples.npz")["samples"], list(note["kept"].values())
    assert all(one["candidate"] == 0 for one in found[1, 4][1])
    assert all(b["similarity"] >= a["similarity"] for a, b in zip(found[1, 4][1], found[3, 4][1], strict=True))
    assert any(one["candidate"] > 0 for one in found[3, 4][1])
    assert np.array_equal(found[3, 4][0][:2], found[3, 2][0])
    plain = sample(compose_config("sample", [*given, "n=4", f"out={tmp_path / 'plain'}"], prepare_sampling))
    assert np.array_equal(np.load(plain / "samples.npz")["samples"], found[1, 4][0])
    assert not (plain / "rerank.json").exists()


TRAIN = {
    "data=digits": "this model takes images with captions, and this data has none",
    "data=toy2d": "codec.model=GreyLevels takes images on grey levels, got vector",
    "model.guidance=-1": "model.guidance=-1 must be a number at least 0",
    "model.label_dropout=0": "model.guidance=2.0 needs a model that was trained with and without captions",
    "model.text_weight=2": "model.text_weight=2 must be a number at least 0 and at most 1",
    "model.transformer.position.grid=[4,4]": "with a grid of 64 codes, got TextImagePositions of grid=[4, 4]",
    "model.transformer.position.grid=[8]": "model.transformer.position.grid=[8] must be a list like [a,b] of 2 values",
    "model.transformer.position.length=5": "model.transformer.position.length=5 must be what model.length is, 32",
    "model.transformer.attention.causal=false": "a DALLE needs model.transformer.attention.causal=true",
    "model.length=5": "model.length=5 must be what data.length is, 32",
    "data.length=4": "'a handwritten zero' is 18 bytes long, but data.length is 4",
    "codec.model.factor=3": "codec.model.factor=3 must divide 8 and 8",
    "codec.ckpt=nowhere": "there is no checkpoint nowhere",
    "codec.ckpt=first": "has no token ids: choose a codec such as model=vqvae trains",
    "codec.model._target_=genai.nn.latent_space.SpaceToDepth": "has no token ids",
    "model=maskgit model.label_smoothing=2": "model.label_smoothing=2 must be a number at least 0 and at most 1",
    "model=maskgit model.transformer.attention.causal=true": "a MaskGIT needs model.transformer.attention.causal=false",
}
SAMPLE = {
    "ckpt=dalle prompt=" + "a" * 33: "is 33 bytes long, but data.length of this model is 32",
    "ckpt=dalle negative_prompt=one": "there is no prompt= to guide towards",
    "ckpt=dalle guidance=-1": "guidance=-1 must be",
    "ckpt=dalle sampler=maskgit": "the sampler sample is for a MaskGIT, and this model is a DALLE",
    "ckpt=maskgit sampler=dalle": "the sampler sample is for a DALLE, and this model is a MaskGIT",
    "ckpt=dalle sampler=heun": "is for a Diffusion, and this model is a DALLE",
    "ckpt=dalle image=missing.png": "image=missing.png cannot be read as an image (No such file or directory)",
    "ckpt=dalle image=text.png": "image=text.png cannot be read as an image",
    "ckpt=dalle image=grey.png mask=middle.png": "only fill in the end of an image",
    "ckpt=dalle image=grey.png mask=nothing.png": "only fill in the end of an image",
    "ckpt=dalle mask=lower.png": "mask= was given, but there is no image= to complete",
    "ckpt=maskgit sampler=maskgit mask=lower.png": "mask= was given, but there is no image= to complete",
    "ckpt=dalle image=grey.png strength=0.5": "has no strength",
    "ckpt=dalle sampler.top_k=0": "sampler.top_k=0 must be",
    "ckpt=maskgit sampler=maskgit sampler.steps=0": "sampler.steps=0 must be",
    "ckpt=maskgit sampler=maskgit sampler.choice_temperature=-1": "sampler.choice_temperature=-1 must be",
    "ckpt=dalle prompt=one rerank=0 scorer=pairs": "rerank=0 must be",
    "ckpt=dalle prompt=one rerank=2": "rerank=2 and scorer=None: a number of candidates and the model that chooses",
    "ckpt=dalle prompt=one scorer=pairs": "rerank=None and scorer='pairs'",
    "ckpt=dalle prompt=one rerank=2 scorer=nowhere": "there is no checkpoint nowhere",
    "ckpt=dalle prompt=one rerank=2 scorer=first": "is an Autoencoder, and must be an Embedder",
    "ckpt=dalle prompt=one rerank=2 scorer=dalle": "is a DALLE, and must be an Embedder",
    "ckpt=dalle rerank=2 scorer=pairs": "scorer= embeds nothing of it: give prompt=",
    "ckpt=dalle stop=x": "stop='x' was given, but this model takes no text",
}


@pytest.mark.parametrize("argument", TRAIN)
def test_wrong_training_commands(folder, monkeypatch, argument):
    given = [] if argument.startswith("model=") else ["model=dalle"]
    assert TRAIN[argument] in refusal("train", [*given, *SMALL, *argument.split()], folder, monkeypatch)


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(folder, monkeypatch, argument):
    sampler = [] if "sampler=" in argument else ["sampler=dalle"]
    assert SAMPLE[argument] in refusal("sample", ["n=2", *sampler, *argument.split()], folder, monkeypatch)
