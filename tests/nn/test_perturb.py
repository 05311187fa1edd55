"""Random changes of sound: only in training, by the amounts that were asked for."""

import math

import pytest
import torch

from genai.core.errors import UserError
from genai.nn.mel_levels import MelLevels
from genai.nn.perturb import Perturb, Warp, uncovered
from genai.nn.vocoder import LogMelCodec


def tone(hz, n=2, length=8000, seconds=0.4):
    t = torch.arange(length) / 8000
    return (0.3 * torch.sin(2 * math.pi * hz * t) * (t < seconds) + 1e-6 * (t < seconds)).expand(n, 1, -1)


def test_in_evaluation_mode_nothing_changes():
    x, maps = tone(440), torch.rand(2, 1, 40, 16)
    assert torch.equal(Perturb().eval()(x), x) and torch.equal(Warp().eval()(maps), maps)


def test_speed_changes_pitch_and_length_alike():
    torch.manual_seed(0)
    y = Perturb(speed=0.5, tilt=0, gain=0, noise=0)(tone(440, n=20))[:, 0]
    size = (y != 0).sum(1)
    peak = torch.fft.rfft(y, 8 * 8000).abs().argmax(1) / 8  # Hz
    torch.testing.assert_close(peak * size / 8000, torch.full((20,), 440 * 0.4), atol=3.0, rtol=0)
    assert peak.min() < 350 and peak.max() > 550
    begin = (y != 0).float().argmax(1)
    assert len(begin.unique()) > 15 and (begin + size <= 8000).all()


def test_without_amounts_a_clip_is_only_moved():
    torch.manual_seed(0)
    x = tone(440, n=8)
    y = Perturb(speed=0, tilt=0, gain=0, noise=0)(x)
    for moved, whole in zip(y[:, 0], x[:, 0], strict=True):
        begin = int((moved != 0).float().argmax())
        assert torch.equal(moved[begin : begin + 3200], whole[:3200]) and (moved != 0).sum() == (whole != 0).sum()


def test_each_clip_has_a_filter_of_its_own():
    torch.manual_seed(0)
    impulse = torch.zeros(3, 1, 64)
    impulse[..., 0] = 1  # a clip of one sample
    part = Perturb(speed=0, tilt=0.3, gain=0, noise=0)
    y = part.filter(impulse[:, 0])
    assert (y[:, 0] == 1).all() and (y[:, 8:] == 0).all() and len(y[:, 1].unique()) == 3
    many = part.filter(impulse[:1, 0].expand(4000, -1))[:, 1:8].std(0)
    torch.testing.assert_close(many, 0.3 / torch.arange(1, 8), atol=0.02, rtol=0)


def test_noise_and_level_stay_in_range():
    torch.manual_seed(0)
    y = Perturb(noise=0.1, gain=2.0)(tone(440, n=64))
    assert y.abs().max() == 1 and 16 < (y[:, 0, -1] != 0).sum() < 64


def test_a_warped_spectrogram_keeps_its_silence():
    torch.manual_seed(0)
    maps = torch.full((200, 1, 40, 16), -1.0)
    maps[:, :, 10:14] = 0.5
    y = Warp(time=0.2, bands=0.2, level=0.0, mask=0.0)(maps)
    quiet = y.amax((1, 2, 3)) < 0.6
    band = (y + 1).sum(3).squeeze(1).argmax(1).float()
    assert quiet.all() and len(band.unique()) > 3  # bands move, and with level=0 no louder ones come
    silent = y[:, :, 30:].amax((1, 2, 3)) <= -1 + 1e-6
    assert 60 < silent.sum() < 140  # noise covers the silence of half of them
    kept = uncovered(2000, 40, 0.25, torch.device("cpu"))
    assert (~kept).sum(1).max() <= 11 and kept.float().mean() == pytest.approx(1 - 0.11, abs=0.02)


@pytest.mark.parametrize("options", [{"speed": -1}, {"tilt": 2}, {"gain": -1}, {"noise": 2}])
def test_amounts_out_of_range(options):
    with pytest.raises(UserError, match="perturb"):
        Perturb(**options)


def test_levels_of_spectrograms_are_tokens():
    codec = MelLevels("audio", [1, 2000], 8000, mels=10, factor=4, levels=16)
    x = tone(440, length=2000)
    z = codec.encode(x)
    frames = LogMelCodec("audio", [1, 2000], 8000, 10).frames
    assert z.shape == (2, *codec.latent_shape) == (2, 10 * frames // 4) and z.min() >= 0 and z.max() < 16
    assert z.view(2, -1, 10).argmax(2).mode(1).values[0] == z.view(2, -1, 10).float().mean(1).argmax(1)[0]
    assert codec.decode(z).shape == x.shape
    silence = torch.zeros(1, 1, 2000)
    assert (codec.encode(silence) == 0).all() and codec.reconstruct({"audio": silence}).abs().max() == 0
    with pytest.raises(UserError, match=r"codec\.model\.factor=3 must divide 8"):
        MelLevels("audio", [1, 2000], 8000, factor=3)
