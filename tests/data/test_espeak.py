"""Digits that a synthesiser speaks: the same each time, by every speaker, in splits that share no take."""

import sys
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from genai.checkpoint.build import build_typed
from genai.core.errors import UserError
from genai.data import espeak
from tests.conftest import ROOT


def data_of(name="spoken_digits", **given):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml"))
    return build_typed({**node, "takes": 3, **given})


@pytest.fixture
def loader():
    return pytest.importorskip("espeakng_loader", reason="speech is an extra")


def test_the_same_is_spoken_whatever_the_time_of_day(loader):
    asked = espeak.requests(1)
    first, sr_hz = espeak.speak(loader, asked)
    time.sleep(1.01)  # espeak-ng begins its noise with the second
    again, _ = espeak.speak(loader, asked)
    assert sr_hz == 22050
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({one.tobytes() for one in first}) == len(first) == 80
    assert all(0.15 < len(one) / sr_hz < 1.2 and np.abs(one).max() > 0.1 for one in first)


def test_more_takes_begin_with_the_same():
    assert espeak.requests(4)[:80] == espeak.requests(1)
    assert {request[4] for request in espeak.requests(1)} == set(espeak.DIGITS)


def test_every_speaker_says_every_digit_in_every_split(loader):
    data = data_of()
    assert data.shape == [1, 6000] and data.classes == 10 and data.speakers == 8
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 80, "val": 80, "test": 80}
    items = []
    for part in data.splits.values():
        batch = part.batch(torch.arange(80), None)
        assert len({*zip(batch["label"].tolist(), batch["speaker"].tolist(), strict=True)}) == 80
        assert (batch["audio"].abs().amax((1, 2)) > 0.05).all()
        assert not batch["audio"][:, 0][~batch["mask"]].any()
        items += getattr(part, "split", part).items.tolist()
    assert sorted(items) == [*range(240)]
    assert data.modality.sr_hz == 8000 and list(data.conditions) == ["label", "speaker"]


def test_it_is_spoken_once(loader, waits):
    data_of(takes=3), data_of(takes=3)
    assert waits.count("speaking digits, once") <= 1


def test_what_lacks_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(
        UserError, match=r'^data=spoken_digits needs the package espeakng_loader: pip install "genai-lab\[au'
    ):
        data_of()


def test_a_voice_that_is_refused_is_named(loader):
    with pytest.raises(UserError, match=r"espeak-ng failed, the voice en-gb failed to say 'one' \(error 2\): install"):
        espeak.speak(loader, [("en-gb", 175, 50, 50, "one")])
