"""Models of several media from a new user's chair: any medium from any, retrieval, and wrong commands."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from genai.cli import compose_config, prepare_sampling
from genai.core.errors import UserError
from tests.test_melodies import refusal

pytest.importorskip("espeakng_loader", reason="the embedded recordings need the extra audio")
DEBUG = ["debug=true", "logger=none", "data.audio.takes=3", "data.audio.max_seconds=0.25", "data.audio.shape=[1,2000]"]
SMALL = [*DEBUG, "model.transformer.width=16", "model.transformer.layers=1", "codecs.audio.model.factor=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of each model, one of captions and images, one of a first stage of sound, and files to prompt with."""
    from genai.train.run import run

    root = tmp_path_factory.mktemp("media")
    contrastive = ["model=contrastive", "model.encoders.audio.width=4", "model.encoders.image.width=4"]
    run(compose_config("train", ["model=media", *SMALL, f"run_dir={root / 'media'}"]))
    run(compose_config("train", [*contrastive, *DEBUG, f"run_dir={root / 'contrastive'}"]))
    captions = ["data=digits_text", "model.encoders.audio=null", "debug=true", "logger=none"]
    run(compose_config("train", ["model=contrastive", *captions, f"run_dir={root / 'pairs'}"]))
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(root / "grey.png")
    for name, rate in (("tone", 8000), ("fast", 16000)):
        soundfile.write(root / f"{name}.wav", 0.3 * np.sin(np.arange(1000) / 3), rate)
    (root / "text.wav").write_text("no sound")
    return root


def sample(folder, out, *arguments):
    from genai.sampling import run

    return run(compose_config("sample", [*arguments, f"out={out}"], prepare_sampling))


@pytest.mark.parametrize(("to", "file"), [("text", "grid.txt"), ("image", "grid.png"), ("audio", "grid.wav")])
def test_any_medium_is_drawn_from_any_other(folder, tmp_path, to, file):
    prompts = {"text": "seven", "image": folder / "grey.png", "audio": folder / "tone.wav"}
    for source in {*prompts} - {to}:
        out = sample(
            folder, tmp_path / source, f"ckpt={folder / 'media'}", f"prompt={prompts[source]}", f"to={to}", "n=2"
        )
        assert (out / file).exists()
        shape = {"text": (2, 5), "image": (2, 1, 8, 8), "audio": (2, 1, 2000)}[to]
        assert np.load(out / "samples.npz")["samples"].shape == shape


def test_images_are_retrieved_for_words_and_sounds(folder, tmp_path):
    from genai.data.images import Digits

    data = Digits("image", [1, 8, 8], 10, 17, 4)
    real = {((x + 1) * 127.5).round().byte().numpy().tobytes() for x in data.items("val", slice_of(144))}
    for i, prompt in enumerate(("seven", folder / "tone.wav")):
        out = sample(
            folder, tmp_path / str(i), f"ckpt={folder / 'contrastive'}", f"prompt={prompt}", "n=3", "batch_size=2"
        )
        found = [x.tobytes() for x in np.load(out / "samples.npz")["samples"]]
        assert real.issuperset(found) and len({*found}) == 3, "no image twice, though the split has fewer than 500"


def test_captions_of_images_are_two_media(tmp_path):
    """A model of data=digits_text takes its captions as prompts, as one of words does."""
    import torch

    import genai
    from genai.train.run import run

    none = ["model.media.audio=null", "model.perturb.audio=null", "model.weights.audio=null"]
    small = ["model.transformer.width=16", "model.transformer.layers=1", "debug=true", "logger=none"]
    run(compose_config("train", ["model=media", "data=digits_text", *none, *small, f"run_dir={tmp_path / 'run'}"]))
    loaded = genai.load(tmp_path / "run")
    drawn = [genai.sample(loaded, n=1, prompt=p)["log_prob"] for p in ("the digit seven", "the digit two")]
    assert not torch.equal(*drawn), "the caption is read"
    with pytest.raises(UserError, match=r"bytes long, but data\.length of this model is"):
        genai.sample(loaded, n=1, prompt="seven " * 20)


def slice_of(n):
    import torch

    return torch.arange(n)


def test_retrieval_is_a_metric(folder, capsys):
    from genai.evaluation.run import run as evaluate

    facts = evaluate(compose_config("evaluate", [f"ckpt={folder / 'contrastive'}", "n=60"]))
    pairs = facts["retrieval"]
    assert len(pairs) == 6 and facts["retrieval_at_1"] == pytest.approx(sum(pairs.values()) / 6, abs=1e-3)
    node = "{_target_: genai.evaluation.metrics.Retrieval, k: 60, query: audio, gallery: text}"
    facts = evaluate(
        compose_config("evaluate", [f"ckpt={folder / 'contrastive'}", "n=60", f"metrics=[{{all: {node}}}]"])
    )
    assert facts["cards"][0]["value"] == 1.0


def test_an_encoder_of_captions_conditions_diffusion(folder, tmp_path):
    """The trained text encoder of a pair model is a frozen part of a diffusion model."""
    import torch

    import genai
    from genai.train.run import run

    node = f"{{_target_: genai.checkpoint.pretrained, ckpt: {folder / 'pairs'}, part: encoders.text.text}}"
    small = ["model.net.channels=8", "debug=true", "logger=none"]
    run(
        compose_config(
            "train", ["experiment=latent_digits_text", f"model.net.text={node}", *small, f"run_dir={tmp_path / 'd'}"]
        )
    )
    loaded, pairs = genai.load(tmp_path / "d"), genai.load(folder / "pairs")
    theirs = pairs.model.encoders["text"].text.state_dict()
    ours = loaded.model.net.text.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert genai.sample(loaded, n=2, prompt="the digit seven")["image"].shape == (2, 1, 8, 8)


TRAIN = {
    "data=digits": "this model learns text, and this data has no caption: choose data of all media, such as data=digits_trio",
    "data.length=4": "'three' is 5 bytes long, but data.length is 4",
    "data.names=[a,b]": "data.names are 2 words, but this data has 10 classes",
    "data.audio.speakers=3": "data.speakers=3, but this data has 8",
    "model.media.audio=null model.media.image=null": "model.media has text: give at least two media",
    "model.weights.text=-1": "model.weights.text=-1 must be a number at least 0",
    "model.weights.text=0 model.weights.image=0 model.weights.audio=0": "model.weights are all 0",
    "model.label_dropout=0 model.guidance=2": "needs a model that was trained with and without the given medium",
    "model.label_dropout=1": "model.label_dropout=1 hides all media, so that nothing is learned: give less than 1",
    "model.label_dropout=2": "model.label_dropout=2 must be a number at least 0 and at most 1",
    "model.transformer.attention.causal=false": "a MediaTransformer needs model.transformer.attention.causal=true",
    "codecs.audio.model.factor=3": "codec.model.factor=3 must divide 8",
    "codecs.image.model.factor=3": "must divide 8 and 8",
    "codecs.audio.ckpt=nowhere": "there is no checkpoint nowhere",
    "codecs.image.ckpt=contrastive": "has no token ids",
    "model.perturb.audio.speed=-1": "model.perturb.audio.speed=-1 must be a number",
    "model.perturb.audio.tilt=2": "model.perturb.audio.tilt=2 must be a number at least 0 and at most 1",
    "model=contrastive model.temperature=0": "model.temperature=0 must be a number at least 0.01",
    "model=contrastive model.encoders.text=null model.encoders.image=null": "model.encoders has audio: give at least two",
    "model=contrastive data=toy2d": "this model embeds text, and this data has no caption: set model.encoders.text=null, or",
    "model=contrastive data=digits_text": "this model embeds audio, and this data has no audio: set model.encoders.audio=null",
    "model=contrastive model.encoders.image=null": "sampler=retrieve shows images, and this model embeds text and audio: leave",
    "model=contrastive data.batch_size=1 debug=false": "data.batch_size=1 leaves no other item to tell one from: give at least 2",
    "model=contrastive model.encoders.text.length=4": "model.encoders.text.length=4, but captions of this data have",
    "model=contrastive model.encoders.image.in_channels=3": "model.encoders.image.in_channels=3, but this data has 1 channels",
    "model=contrastive debug=false max_steps=1 data.batch_size=2 callbacks.samples.n=200": "seed=199 is a rank past the 144",
    "model=contrastive sampler=media": "the sampler sample is for a MediaTransformer, and this model is a Contrastive",
    "sampler=retrieve": "the sampler retrieve is for a Contrastive, and this model is a MediaTransformer",
    "data=fsdd data.held_out=joe data.root=speech model=vqvae_audio": "data.root=speech holds no recordings",
    "model=vqvae_audio data=digits": "codec.model=LogMelCodec takes sound of one channel",
    "model=latent data=digits_text model.net.text={_target_:genai.checkpoint.pretrained,ckpt:pairs,part:nothing}": (
        "part=nothing must be a module of the Contrastive"
    ),
    "model=latent data=digits_text model.net.text={_target_:genai.checkpoint.pretrained,ckpt:pairs,part:encoders.text}": (
        "model.net.text is a CaptionEncoder, and a TextEncoder is needed"
    ),
}
SAMPLE = {
    "ckpt=media prompt=seven to=text": "prompt= gives text, and to=text asks for the same: give to=image or audio",
    "ckpt=media prompt=seven to=film": "to=film must be one of text, image, audio",
    "ckpt=media prompt=eleven": "'eleven' is 6 bytes long, but data.length of this model is 5",
    "ckpt=media prompt=[seven,grey.png]": "are of several media",
    "ckpt=media prompt=missing.wav": "prompt=missing.wav cannot be read",
    "ckpt=media prompt=missing.png": "prompt=missing.png cannot be read",
    "ckpt=media prompt=text.wav": "prompt=text.wav cannot be read as sound",
    "ckpt=media prompt=fast.wav": "prompt=fast.wav has 16000 Hz, and this model 8000 Hz",
    "ckpt=media guidance=-1": "guidance=-1 must be",
    "ckpt=media label=3": "label=3 was given, but this model is unconditional",
    "ckpt=media image=grey.png": "has no image",
    "ckpt=media sampler.top_k=0": "sampler.top_k=0 must be",
    "ckpt=contrastive seed=143": "seed=144 is a rank past the 144 candidates of split=val: give a smaller seed or n",
    "ckpt=contrastive candidates=1": "seed=1 is a rank past the 1 candidates of split=val",
    "ckpt=contrastive to=audio": "there is no key to",
    "ckpt=contrastive prompt=grey.png": "this model retrieves images by text or audio",
    "ckpt=contrastive split=nowhere": "sampler.split=nowhere must be one of train, val, test",
}
EVALUATE = {
    "ckpt=media": "has no likelihood of its own: MediaTransformer has no log_prob; there is no metric for it",
    "ckpt=media metrics=[frechet]": "frechet is not available for this model; it can have none",
    "ckpt=media metrics=[retrieval_at_1]": "retrieval_at_1 is not available for this model",
    "ckpt=contrastive metrics=[frechet]": "frechet is not available for this model; it can have retrieval_at_1",
}


@pytest.mark.parametrize("argument", TRAIN)
def test_wrong_training_commands(folder, monkeypatch, argument):
    words, typed = argument.split(), {word.split("=")[0] for word in argument.split()}
    base = ["model=media", *(SMALL if "model" not in typed else ["debug=true", "logger=none"])]
    given = [word for word in base if word.split("=")[0] not in typed]
    if "data" in typed:
        given = [word for word in given if not word.startswith("data.")]
    assert TRAIN[argument] in refusal("train", [*given, *words], folder, monkeypatch)


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(folder, monkeypatch, argument):
    assert SAMPLE[argument] in refusal("sample", [*argument.split(), "n=2"], folder, monkeypatch)


@pytest.mark.parametrize("argument", EVALUATE)
def test_wrong_evaluation_commands(folder, monkeypatch, argument):
    assert EVALUATE[argument] in refusal("evaluate", [*argument.split(), "n=2"], folder, monkeypatch)
