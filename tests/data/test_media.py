"""Media of a class: an image, a recording and a word that agree, drawn in training and in turn else."""

import numpy as np
import pytest
import soundfile
import torch

from genai.core.errors import UserError
from genai.data.audio import SpokenDigits
from genai.data.base import Arrays, Data
from genai.data.media import Media

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Recordings whose samples are all digit * 100 + speaker * 10 + take, as int16."""
    root = tmp_path_factory.mktemp("speech")
    for digit in range(10):
        for k, speaker in enumerate(("ann", "bob", "eve")):
            for take in range(9):
                wave = np.full(40, digit * 100 + k * 10 + take, np.int16)
                soundfile.write(root / f"{digit}_{speaker}_{take}.wav", wave, 8000, subtype="PCM_16")
    return root


def speech(root, **options):
    given = {"speaker": None, "max_seconds": 0.01, "crop_seconds": None, "field": "audio", "shape": None}
    facts = {"classes": 10, "levels": None, "speakers": None, "batch_size": 4}
    return SpokenDigits(str(root), **{**given, **facts, **options})


def images(n=60, classes=10):
    label = np.arange(n) % classes
    values = np.repeat(label.astype(np.uint8), 4).reshape(n, 1, 2, 2)
    splits = {name: Arrays("image", values, label) for name in ("train", "val", "test")}
    names = [str(i) for i in range(classes)]
    facts = {"field": "image", "shape": None, "classes": None, "levels": None, "batch_size": 4, "num_workers": 0}
    return Data(**facts, splits=splits, found_shape=[1, 2, 2], class_names=names, found_levels=256)


def media(root, pictures=None, names=WORDS, length=5, **options):
    facts = {"field": "image", "shape": None, "classes": None, "levels": None, "batch_size": 4}
    return Media(pictures or images(), speech(root, **options), names, length, **facts)


def digits_of(batch):
    """The digit of each image, word and recording."""
    picture = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().long()
    word = [WORDS.index(bytes(i for i in row if i < 256).decode()) for row in batch["caption"].tolist()]
    samples = (batch["audio"][:, 0, 0] * 32768).round().long()
    return picture, torch.tensor(word), samples // 100


@pytest.mark.parametrize("draws", [None, "drawn"])
def test_an_item_is_of_one_class(root, draws):
    split = media(root).splits["train"]
    index = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    drawn = None if draws is None else torch.rand(60, 4, generator=torch.Generator().manual_seed(1))
    batch = split.batch(index, drawn)
    for digit in digits_of(batch):
        assert torch.equal(digit, batch["label"])
    assert torch.equal(split.batch(index, drawn)["audio"], batch["audio"])


def test_recordings_are_drawn_at_random_and_taken_in_turn(root):
    split = media(root).splits["train"]  # takes 7 and 8 of three speakers: 6 of a digit
    index = torch.full((600,), 3)
    drawn = split.batch(index, torch.rand(600, 4, generator=torch.Generator().manual_seed(0)))["audio"][:, 0, 0]
    _, counts = drawn.unique(return_counts=True)
    assert len(counts) == 6 and counts.min() > 60
    sevens = torch.arange(7, 60, 10)
    assert len(split.batch(sevens, None)["audio"][:, 0, 0].unique()) == 6


def test_a_speaker_is_held_out(root):
    data = speech(root, held_out="bob")
    speakers = {
        name: set(part.batch(torch.arange(len(part)), None)["speaker"].tolist()) for name, part in data.splits.items()
    }
    assert speakers == {"train": {0, 2}, "val": {0, 2}, "test": {1}}
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 140, "val": 40, "test": 90}
    for options, sentence in (
        ({"held_out": "joe"}, r"data\.held_out=joe must be one of ann, bob, eve, or null"),
        ({"held_out": "bob", "speaker": "ann"}, "leaves no other speaker to learn from"),
    ):
        with pytest.raises(UserError, match=sentence):
            speech(root, **options)


def test_data_that_do_not_belong_together(root):
    with pytest.raises(UserError, match=r"data\.images has 7 classes and data\.audio 10"):
        media(root, images(classes=7))
    with pytest.raises(UserError, match=r"data\.names are 2 words, but this data has 10 classes"):
        media(root, names=["a", "b"])
    with pytest.raises(UserError, match=r"'three' is 5 bytes long, but data\.length is 4"):
        media(root, length=4)
    with pytest.raises(UserError, match=r"data\.audio holds image, which is not sound"):
        facts = {"field": "image", "shape": None, "classes": None, "levels": None, "batch_size": 4}
        Media(images(), images(), WORDS, 5, **facts)
