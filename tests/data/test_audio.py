"""Recordings: clips are what was recorded, codes are exact, and the tones have the entropy that is said."""

import numpy as np
import pytest
import torch

from genai.core.errors import UserError
from genai.data.audio import INNOVATION, NOTES, PLUCKS, QuantizedAudio, SpokenDigits, Tones, entropy_bits, pluck
from genai.data.base import Data
from genai.data.fingerprint import split_checksum
from genai.data.recordings import Recordings
from genai.data.stream import train_loader
from genai.modalities.audio import Audio
from genai.modalities.image import Image
from genai.modalities.label import Label
from genai.nn.companding import Linear, MuLaw


def tones(**given):
    facts = {"field": "audio", "shape": None, "classes": 8, "levels": None, "batch_size": 4}
    return Tones(**{"n": 40, "sr_hz": 8000, "max_seconds": 0.025, **facts, **given})


def codes(audio, companding="mu_law", levels=256, **given):
    facts = {"field": "tokens", "shape": None, "classes": audio.classes, "batch_size": 4, "speakers": audio.speakers}
    return QuantizedAudio(**{"audio": audio, "companding": companding, "levels": levels, **facts, **given})


def recordings(crop=None, channels=1):
    """Recordings of 1 to 9 samples, each sample a value of its own, in clips of 6."""
    at = np.arange(1, 10)
    waves = [(100 * n + np.arange(n * channels).reshape(n, channels)).astype(np.int16) for n in at]
    return waves, Recordings("audio", waves, np.arange(9), 6, crop, {"label": at})


@pytest.mark.parametrize("channels", [1, 2])
def test_a_clip_is_the_beginning_of_its_recording_and_a_mask_of_what_is_recorded(channels):
    waves, part = recordings(channels=channels)
    batch = part.batch(torch.tensor([8, 0, 4]), None)
    assert batch["audio"].shape == (3, channels, 6) and batch["label"].tolist() == [9, 1, 5]
    for x, mask, i in zip(batch["audio"], batch["mask"], (8, 0, 4), strict=True):
        n = min(i + 1, 6)
        assert mask.tolist() == [t < n for t in range(6)]
        assert (x[:, :n] * 32768).T.tolist() == waves[i][:n].tolist() and not x[:, n:].any()


@pytest.mark.parametrize(("crop", "most"), [(None, 6), (3, 3), (99, 6)])
def test_only_the_first_draw_moves_the_cut_and_every_place_is_reached(crop, most):
    waves, part = recordings(crop)
    assert part.augments
    index = torch.full((4000,), 8)
    draws = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    batch = part.batch(index, draws)
    first = (batch["audio"][:, 0, 0] * 32768).long() - 900
    assert batch["mask"].sum(1).unique().tolist() == [most]
    counts = first.bincount(minlength=10 - most)
    assert len(counts) == 10 - most and (counts - 4000 / len(counts)).abs().max() < 5 * (4000 / len(counts)) ** 0.5
    other = torch.cat([draws[:, :1], torch.rand(4000, 3)], 1)
    assert torch.equal(part.batch(index, other)["audio"], batch["audio"])
    last = part.batch(torch.tensor([8]), torch.ones(1, 4))
    assert int(last["audio"][0, 0, most - 1] * 32768) == waves[8][-1]
    for i in torch.randperm(9)[:5].tolist():  # an item does not depend on the batch
        one = part.batch(torch.tensor([i]), draws[:1])
        among = part.batch(torch.tensor([3, i]), torch.stack([draws[7], draws[0]]))
        assert all(torch.equal(among[name][1], one[name][0]) for name in one)


def test_short_recordings_need_no_draws():
    waves, _ = recordings()
    part = Recordings("audio", waves, np.arange(3), 6)
    assert not part.augments
    batch, drawn = part.batch(torch.arange(3), None), part.batch(torch.arange(3), torch.rand(3, 4))
    assert all(torch.equal(batch[name], drawn[name]) for name in batch)


def test_a_checksum_is_of_the_samples_the_items_and_the_clips():
    waves, part = recordings()
    prints = [part.fingerprint(quick) for quick in (True, False)]
    assert prints == [recordings()[1].fingerprint(quick) for quick in (True, False)]
    louder = [wave + 1 for wave in waves]
    labels = {"label": np.arange(1, 10)}
    others = [
        Recordings("audio", louder, np.arange(9), 6, None, labels),
        Recordings("audio", waves, np.arange(8), 6, None, labels),
        Recordings("audio", waves, np.arange(9), 5, None, labels),
        Recordings("audio", waves, np.arange(9), 6, 2, labels),
        Recordings("audio", waves, np.arange(9), 6, None, {"label": np.ones(9)}),
    ]
    assert len({part.fingerprint(True), *(other.fingerprint(True) for other in others)}) == 6


def test_the_stream_of_clips_is_the_same_for_any_number_of_workers(shared):
    def first(workers):
        data = SpokenDigits(shared("fsdd"), "theo", 0.2, 0.1, "audio", None, 10, None, None, 4, workers)
        return next(iter(train_loader(data, 1, 0, 0, 0, 1)))[0]

    alone, other = first(0), first(1)
    assert all(torch.equal(alone[name], other[name]) for name in alone)


# Tones


def test_tones_are_the_process_that_is_said_and_never_clipped():
    """Innovations, worked out from the samples alone, are in {-1, 0, 1}, so that no sample was clipped."""
    frequencies = np.repeat([*NOTES.values()], 250)
    values = pluck(frequencies, 8000, 2000, np.random.default_rng(5)).astype(np.float64) / 256
    assert np.abs(values).max() < 100
    r = np.exp(-1 / (0.25 * 8000))
    a = 2 * r * np.cos(2 * np.pi * frequencies / 8000)
    before = np.concatenate([np.zeros((len(values), 1)), values], 1)
    innovations = values[:, 1:] - np.round(a[:, None] * before[:, 1:-1] - r**2 * before[:, :-2])
    assert set(np.unique(innovations)) == {-1.0, 0.0, 1.0}
    assert set(values[:, 0]) == {*map(float, PLUCKS)}
    # the empirical entropy of the innovations, and whether they are independent of the ones before
    p = np.bincount((innovations + 1).astype(int).ravel()) / innovations.size
    assert np.abs(p - [INNOVATION, 1 - 2 * INNOVATION, INNOVATION]).max() < 1e-3
    bits = -(p * np.log2(p)).sum()
    said = (entropy_bits(2001) - entropy_bits(1)) / 2000
    assert entropy_bits(1) == 2 and abs(bits - said) < 5e-3
    now, last = innovations[:, 1:].ravel().astype(int) + 1, innovations[:, :-1].ravel().astype(int) + 1
    joint = np.bincount(3 * last + now, minlength=9).reshape(3, 3) / now.size
    conditional = -np.nansum(joint * np.log2(joint / joint.sum(1, keepdims=True)))
    assert abs(conditional - said) < 5e-3


def test_the_codes_of_tones_lose_nothing_and_their_entropy_is_that_of_the_process():
    data = tones()
    tokens = codes(data, "linear").splits["train"].batch(torch.arange(40), None)["tokens"]
    audio = data.splits["train"].batch(torch.arange(40), None)["audio"]
    assert torch.equal(Linear(256).decode(tokens[:, 1:]), audio[:, 0])
    assert tokens[:, 1].unique().tolist() == [128 + value for value in PLUCKS]
    assert (tokens[:, 0] == 128).all()


# Codes


def test_mu_law_is_exact_on_every_code_and_that_of_torchaudio():
    functional = pytest.importorskip("torchaudio.functional")
    own, every = MuLaw(256), torch.arange(256)
    values = own.decode(every)
    assert torch.equal(own.encode(values), every)
    assert values[0] == -1 and values[-1] == 1 and torch.allclose(values, -values.flip(0), atol=1e-7)
    assert torch.allclose(values, functional.mu_law_decoding(every, 256), atol=1e-6)
    x = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    theirs = functional.mu_law_encoding(x, 256)
    differ = own.encode(x) != theirs
    # torchaudio rounds halves up and this to even: they may differ only where a value lies halfway between codes
    y = x.sign() * torch.log1p(255 * x.abs()) / np.log(256)
    halfway = (((y + 1) * 127.5) % 1 - 0.5).abs() < 1e-9
    assert not (differ & ~halfway).any() and differ.sum() <= 2
    nearest = (values[None].double() - x[::400, None]).abs().amin(1)
    assert ((own.decode(own.encode(x[::400])).double() - x[::400]).abs() <= nearest * 1.2 + 1e-6).all()


@pytest.mark.parametrize("levels", [2, 3, 17, 256, 1000, 65536])
def test_every_code_is_its_own_value(levels):
    every = torch.arange(levels)
    assert torch.equal(Linear(levels).encode(Linear(levels).decode(every)), every)
    if levels < 65536:  # the finest steps of mu-law around 0 are below those of float32 near 1
        assert torch.equal(MuLaw(levels).encode(MuLaw(levels).decode(every)), every)
    assert Linear(levels).encode(torch.tensor([-9.0, 9.0])).tolist() == [0, levels - 1]
    assert MuLaw(levels).encode(torch.tensor([-9.0, 9.0])).tolist() == [0, levels - 1]


def test_sixteen_bits_are_codes_without_loss():
    every = torch.arange(-32768, 32768)
    code = Linear(65536).encode(every.float() / 32768)
    assert torch.equal(code, every + 32768)
    assert torch.equal(Linear(65536).decode(code) * 32768, every.float())


def test_codes_keep_labels_masks_and_draws_and_come_back_as_sound(shared):
    audio = SpokenDigits(shared("fsdd"), None, 0.2, None, "audio", None, 10, None, 6, 4)
    data = codes(audio)
    assert data.shape == [1600] and data.levels == 256 and data.class_names == audio.class_names
    assert data.speakers == 6 and list(data.conditions) == ["label", "speaker"]
    index, draws = torch.arange(30), torch.rand(30, 4)
    for part, own in ((audio.splits["train"], data.splits["train"]), (audio.splits["test"], data.splits["test"])):
        heard, batch = part.batch(index, draws), own.batch(index, draws)
        assert batch["tokens"].shape == batch["mask"].shape == (30, 1601)
        assert (batch["tokens"][:, 0] == data.modality.silence).all() and not batch["mask"][:, 0].any()
        assert torch.equal(batch["mask"][:, 1:], heard["mask"])
        assert all(torch.equal(batch[name], heard[name]) for name in ("label", "speaker"))
        back = data.modality.decode({"tokens": batch["tokens"][:, 1:]})["audio"]
        half = 256 ** (1 / 255) - 1  # a step of mu-law, of which a code is at most a half away, in |x| + 1 / 255
        assert ((back - heard["audio"]).abs() <= (heard["audio"].abs() + 1 / 255) * half + 1e-6).all()
        assert split_checksum(own) != split_checksum(part)
    linear = codes(audio, "linear").splits["test"]
    assert split_checksum(linear) != split_checksum(data.splits["test"])


def test_codes_are_of_one_channel_of_sound():
    image = Data(
        field="image",
        shape=[1, 2, 2],
        classes=None,
        levels=None,
        batch_size=1,
        num_workers=0,
        splits={},
        found_shape=[1, 2, 2],
        class_names=None,
        found_levels=None,
        modality=Image("image"),
    )
    with pytest.raises(UserError, match=r"data\.audio is image of shape \[1, 2, 2\]: give audio of one channel"):
        codes(image)
    image.modality = Audio(8000, 2)
    with pytest.raises(UserError, match=r"give audio of one channel"):
        codes(image)


# The facts around clips


def test_bits_are_counted_per_sample_that_is_recorded():
    """A uniform model of 256 levels has 8 bits for each sample, however many a mask leaves."""
    kind = Audio(8000)
    mask = torch.arange(10) < torch.tensor([[3], [10], [1]])
    nats = mask.sum(1) * np.log(256)
    facts = kind.units(nats, int(mask.sum()), None, [1, 10], 256)
    assert facts["bits_per_sample"] == 8 and facts["samples"] == 14 and facts["levels"] == 256
    whole = kind.units(torch.full((3,), 20 * np.log(256)), None, None, [2, 10], 256)
    assert whole["bits_per_sample"] == 8 and whole["samples"] == 60


def test_digits_and_speakers_in_turn_are_all_their_pairs():
    digit, speaker = Label(10), Label(6, field="speaker", turn=10)
    label, who = digit.condition({}, 60)["label"].tolist(), speaker.condition({}, 60)["speaker"].tolist()
    assert len({*zip(label, who, strict=True)}) == 60
    assert digit.in_turn(0, 60) == [str(one) for one in label] and speaker.in_turn(0, 60) == [str(one) for one in who]


def test_takes_are_in_the_splits_of_the_authors(shared):
    data = SpokenDigits(shared("fsdd"), "jackson", 1.0, None, "audio", None, 10, None, None, 4)
    assert data.speakers is None and "speaker" not in data.conditions
    assert {name: len(part) for name, part in data.splits.items()}["test"] == 50
    with pytest.raises(UserError, match=r"data\.speaker='?bob'? must be one of george, jackson"):
        SpokenDigits(shared("fsdd"), "bob", 1.0, None, "audio", None, 10, None, None, 4)
