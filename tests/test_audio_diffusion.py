"""Sound by its spectrograms: the codec, networks of sequences, speakers, starts from sound, baselines and distances."""

import numpy as np
import pytest
import torch

from genai import sampling
from genai.core import rng
from genai.core.errors import UserError
from genai.evaluation.baselines.audio import GriffinLim, LinearPrediction, LogMelGaussian
from genai.evaluation.baselines.base import TrainingData
from genai.evaluation.classifier import SpectrogramClassifier
from genai.metrics.audio import si_sdr, stft_distance
from genai.modalities.audio import Audio, QuantizedAudio
from genai.models.diffusion.flow import Flow
from genai.models.diffusion.nets.dit import DiT, shuffle, unshuffle
from genai.models.diffusion.nets.unet import UNet
from genai.models.diffusion.sampling import tables
from genai.models.diffusion.sampling.samplers import sample
from genai.nn.latent_space import Latent
from genai.nn.mel import LOW, LogMel
from genai.nn.vocoder import LogMelCodec

SR = 8000


def sine(hz, amplitude=0.5, length=4000):
    return amplitude * torch.sin(2 * torch.pi * hz * torch.arange(length) / SR)[None, None]


def test_a_sine_lies_in_its_band_at_its_level():
    part = LogMel(SR)
    loud, quiet = part(sine(1000)), part(sine(1000, 0.05))
    band = int(part.bank[32].argmax())  # 1000 Hz is bin 32 of 256 at 8 kHz
    assert loud[0, 0, :, 10].argmax() == band
    assert torch.allclose((loud - quiet)[0, 0, band, 5:20], torch.tensor(2 * np.log(10) * -2 / LOW).float(), atol=1e-3)
    assert (part(torch.zeros(1, 1, 512)) == -1).all() and (part.power(torch.full((1, 40, 3), -1.0)) == 0).all()


@pytest.mark.parametrize("layout", ["map", "sequence"])
def test_a_sine_survives_the_vocoder(layout):
    codec = LogMelCodec("audio", [1, 4000], SR, layout=layout)
    x = torch.cat([sine(440), torch.zeros(1, 1, 4000)])
    z = codec.encode(x)
    assert tuple(z.shape[1:]) == codec.latent_shape == ((1, 40, 40) if layout == "map" else (40, 40))
    y = codec.decode(z)
    assert y.shape == x.shape and (y[1] == 0).all()  # what is at the floor is silent
    assert torch.equal(y, codec.decode(z))
    assert (codec.log_mel(y[:1]) - codec.log_mel(x[:1])).abs().mean() < 0.12
    assert y[0].square().mean().sqrt().item() == pytest.approx(x[0].square().mean().sqrt().item(), rel=0.1)


def test_the_bins_found_for_bands_fit_them():
    part = LogMel(SR)
    power = torch.rand(2, 129, 7)
    mel = (power.mT @ part.bank).mT
    assert torch.allclose((part.bins(mel, 300).mT @ part.bank).mT, mel, rtol=0.05, atol=1e-3)
    assert (part.bins(mel) >= 0).all()


def test_a_frame_is_kept_if_its_whole_window_is():
    codec = LogMelCodec("audio", [1, 4000], SR, layout="sequence")
    mask = torch.ones(1, 1, 4000)
    mask[..., 1000:] = 0
    kept = codec.downsample_mask(mask)[0]
    assert kept.shape == (40, 40) and (kept == kept[:1]).all()
    other = torch.cat([torch.ones(1000), torch.zeros(3000)]) * sine(440) + (mask == 0) * 0.3
    same = (codec.encode(sine(440)) == codec.encode(other))[0].all(0)
    assert (same[kept[0] == 1]).all()
    assert int(kept[0].sum()) == 7  # windows of 256 around 0, 128, ..., 768 end at 896 at most; that around 896 at 1024


@pytest.mark.parametrize(
    ("given", "message"), [({"shape": [2, 800]}, "one channel"), ({"layout": "x"}, "map or sequence")]
)
def test_what_the_vocoder_cannot_take_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        LogMelCodec(**{"field": "audio", "shape": [1, 800], "sr_hz": SR, **given})


def test_a_u_net_of_sequences_is_one_of_images_of_height_1():
    torch.manual_seed(0)
    net = UNet([2, 8], 8, [1, 2], 1, attention_depths=[-1], classes=3, speakers=2).double()
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.2
    wide = UNet([2, 2, 8], 8, [1, 2], 1, attention_depths=[-1], classes=3, speakers=2).double()
    state = {}
    for name, value in net.state_dict().items():
        mine = wide.state_dict()[name]
        state[name] = value.expand_as(mine) * (torch.tensor([0.0, 1, 0])[:, None] if mine.shape[2:] == (3, 3) else 1)
    wide.load_state_dict(state)
    wide.is_sequence = True  # a map of height 1, halved in width alone
    for module in wide.modules():
        if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 2)
        if hasattr(module, "scale"):
            module.scale = (1.0, 2.0)
    x, t, y = torch.randn(3, 2, 8).double(), torch.rand(3).double() * 1000, torch.tensor([0, 1, 3])
    out = net(x, t, label=y, speaker=y % 3)
    assert out.shape == x.shape and torch.allclose(out, wide(x, t, label=y, speaker=y % 3))
    with pytest.raises(UserError, match="length must be multiples of 2, got 9"):
        UNet([2, 9], 8, [1, 2])


def test_pieces_of_sequences_and_back():
    x = torch.arange(24).view(1, 2, 12)
    pieces = unshuffle(x, 3)
    assert pieces.shape == (1, 6, 4) and pieces[0, :, 0].tolist() == [0, 1, 2, 12, 13, 14]
    assert torch.equal(shuffle(pieces, 3), x)
    net = DiT([2, 12], 3, 16, 1, 2, classes=3, speakers=2)
    assert net(x.float(), torch.zeros(1), label=torch.tensor([0]), speaker=torch.tensor([1])).shape == x.shape


def flow(speakers=2, latent=None, shape=(1, 64)):
    torch.manual_seed(0)
    net = UNet(shape, 8, [1, 2], 1, attention_depths=[-1], classes=3, speakers=speakers)
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.1
    return Flow(net, shape, "audio", classes=3, speakers=speakers, guidance=1.0, latent=latent).eval()


def test_a_speaker_is_a_condition_with_its_null():
    model = flow()
    assert {name: int(null) for name, null in model.null().items()} == {"label": 3, "speaker": 2}
    seeds, solver = rng.seed_range(0, 2), tables.ddim

    def draw(**cond):
        return sample(model, seeds, {k: torch.tensor(v) for k, v in cond.items()}, solver=solver, steps=2)["audio"]

    one, other = draw(label=[1, 1], speaker=[0, 0]), draw(label=[1, 1], speaker=[0, 1])
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])
    assert torch.equal(draw(label=[1, 1]), draw(label=[1, 1], speaker=[2, 2]))  # no speaker is the null


def test_labels_and_speakers_are_dropped_together():
    model = flow().train()
    model.label_dropout = 0.5
    batch = {"audio": torch.zeros(400, 1, 64), "label": torch.zeros(400).long(), "speaker": torch.zeros(400).long()}
    cond = model.training_conditions(batch)
    assert torch.equal(cond["label"] == 3, cond["speaker"] == 2) and 100 < (cond["label"] == 3).sum() < 300


@pytest.mark.parametrize("latent", [False, True])
def test_what_is_kept_of_a_sound_stays(latent):
    shape = (1, 1024)
    codec = LogMelCodec("audio", shape, SR, layout="sequence", iterations=2)
    model = flow(latent=Latent(codec), shape=codec.latent_shape) if latent else flow(shape=shape)
    x = sine(300, length=1024)
    mask = 1 - Audio(SR).read_mask([0.05, None], shape)
    found = sample(model, rng.seed_range(0, 1), {}, solver=tables.ddim, steps=2, image=x, mask=mask)["audio"]
    assert torch.equal(found[..., :400], x[..., :400]) and not torch.allclose(found[..., 400:], x[..., 400:])


@pytest.mark.parametrize("mask", [[0.3, 0.2], [0, 2], [-1, 0.1], "x.png", [0.1], ["a", 1], [True, None]])
def test_a_mask_of_sound_is_two_times(mask):
    with pytest.raises(UserError, match=r"must be \[from,to\], two times in seconds from 0 to 1"):
        Audio(SR).read_mask(mask, [1, SR])


def test_a_sample_to_start_from_is_given_by_the_key_of_its_modality():
    class Loaded:
        modality, model = Audio(SR), flow()

    x = torch.zeros(1, 1, 64)
    assert sampling.resolve_start({"image": None, "audio": x}, [0, None], 3, Loaded)["image"].shape == (3, 1, 64)
    with pytest.raises(UserError, match="image= was given, but samples of this model are audio: give audio="):
        sampling.resolve_start({"image": x}, None, 1, Loaded)


def recordings(n=60):
    """Two tones by two speakers, the second an octave higher, with a little noise."""
    label, speaker = torch.arange(n) % 2, torch.arange(n) // 2 % 2
    level = 0.3 + 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    x = torch.cat([sine(400 + 600 * y, a, 1024) * 2.0**-s for y, s, a in zip(label, speaker, level, strict=True)])
    return TrainingData(x, label, "audio", [1, 1024], None, 2, speaker=speaker, modality=Audio(SR))


def test_gaussians_of_spectrograms_have_the_moments_of_each_class():
    data = recordings()
    model = LogMelGaussian(3).fit(data, 0)
    one = torch.ones(400, dtype=torch.int64)
    drawn = model.draw(400, 0, one, 0 * one).flatten(1).double()
    mine = model.codec.encode(data.x[(data.label == 1) & (data.speaker == 0)]).flatten(1).double()
    assert (drawn.mean(0) - mine.mean(0)).abs().max() < 0.02
    assert drawn.var(0).sum().item() == pytest.approx(mine.var(0).sum().item(), rel=0.2)
    assert torch.equal(model.draw(2, 5, one[:2], one[:2])[1], model.draw(1, 6, one[:1], one[:1])[0])
    copies = GriffinLim().fit(data, 0).sample(4, 0, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    found = copies[:, 0].view(4, -1)
    bins = torch.tensor([51, 128, 51, 128])  # 400 and 1000 Hz
    assert (torch.fft.rfft(found).abs().argmax(1) - bins).abs().max() <= 1
    assert found.square().mean(1)[0] > 2 * found.square().mean(1)[2]  # the second speaker is quieter


def codes(x, levels=256, companding="linear"):
    kind = QuantizedAudio(SR, levels, companding)
    tokens = kind.encode(x)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return TrainingData(tokens, None, "tokens", [x.shape[-1]], levels, None, mask, modality=kind)


@pytest.mark.parametrize("companding", ["linear", "mu_law"])
def test_the_probabilities_of_linear_prediction_add_up_to_one(companding):
    data = codes(0.2 * torch.randn(4, 1, 40, generator=torch.Generator().manual_seed(0)), companding=companding)
    model = LinearPrediction(4).fit(data, 0)
    predicted, sizes = model.predictions(data.x.numpy())
    every = np.broadcast_to(np.arange(256), (*predicted.shape, 256))
    each = model.mix(model.mass(every, predicted[..., None], sizes[..., None]))
    assert np.allclose(each.sum(-1), 1) and (each > 0).all()
    own = np.take_along_axis(each, data.x.numpy()[:, 1:, None], -1)[..., 0]
    assert np.allclose(model.log_prob({"tokens": data.x}, 0), np.log(own).sum(1))


def test_linear_prediction_knows_nothing_of_what_comes():
    data = codes(0.2 * torch.randn(2, 1, 40, generator=torch.Generator().manual_seed(0)))
    model, other = LinearPrediction(4).fit(data, 0), data.x.clone()
    other[:, 30] = 0
    one, two = (model.predictions(tokens.numpy())[0] for tokens in (data.x, other))
    assert np.array_equal(one[:, :30], two[:, :30]) and not np.allclose(one[:, 30:], two[:, 30:])


def test_linear_prediction_nearly_finds_the_entropy_of_tones_and_never_less():
    from genai.data.audio import NOTES, entropy_bits, pluck

    length, generator = 1500, np.random.default_rng(0)
    waves = pluck(np.array([*NOTES.values()]), SR, length, generator)
    data = codes(torch.from_numpy(waves[:, None] / 32768).float())
    model = LinearPrediction(4).fit(data, 0)
    bits = -model.log_prob({"tokens": data.x, "mask": data.mask}, 0).mean().item() / np.log(2) / length
    assert entropy_bits(length) / length < bits < entropy_bits(length) / length + 2.5


def test_distances_of_sounds():
    x = torch.cat([sine(440), sine(880)])
    assert (stft_distance(x, x) == 0).all() and stft_distance(x, x * 0.5).min() > 0.01
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noise -= (noise * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x
    noise *= x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True) / 10
    assert torch.allclose(si_sdr(3 * (x + noise), x), torch.tensor(20.0), atol=0.01)
    with pytest.raises(UserError, match="to be compared one by one"):
        si_sdr(x, x[:, :, :10])


def test_the_classifier_of_spectrograms_trains_on_shifted_ones():
    torch.manual_seed(0)
    net, x = SpectrogramClassifier([1, 40, 63], 3), torch.full((64, 1, 40, 63), -1.0)
    assert (net.augment(x) == -1).all()  # silence stays
    x[:, :, 20, 30] = 0.5
    where = (net.augment(x) > -1).nonzero()
    assert set((where[:, 3] - 30).tolist()) == set(range(-5, 6)) and (where[:, 2] == 20).all()
    assert net(x).shape == (64, 3)
