"""Modalities: their states come back, older checkpoints had them in other words, and one may live in a user's own package."""

import json
import wave

import numpy as np
import pytest
import torch

import genai
from genai import checkpoint, sampling
from genai.checkpoint.build import build_modality
from genai.cli import compose_config, prepare_sampling, prepare_training
from genai.compare.page import report
from genai.compare.runs import read_all
from genai.core.errors import UserError
from genai.core.stored import up_to_date
from genai.data.images import Digits
from genai.evaluation.run import run as evaluate
from genai.modalities.caption import Caption
from genai.modalities.image import Image
from genai.modalities.label import Label
from genai.modalities.pixels import Pixels
from genai.modalities.stored import difference, legacy_nodes, node_of, nodes_of
from genai.modalities.text import Text
from genai.modalities.tokenizers import Byte, Char
from genai.modalities.vector import Vector
from genai.train.run import run

WAVES = '''
import wave
from pathlib import Path

import numpy as np
import torch

from genai.data.base import Arrays, Data
from genai.modalities.base import Modality


class Waves(Modality):
    """Waveforms (B, T) in [-1, 1]: a bar for each sample, a .wav file for each wave, compared by their spectra."""

    field, meaning = "wave", "sample rate"

    def __init__(self, sr_hz):
        self.sr_hz = sr_hz

    def state(self):
        return {"sr_hz": self.sr_hz}

    def preview(self, batch, columns=None):
        return ["".join("_-=^"[i] for i in row) for row in ((batch["wave"].clamp(-1, 0.99) + 1) * 2).int().tolist()]

    def write(self, folder, batch, names, request, columns):
        written = super().write(folder, batch, names, request, columns)
        for row, name in zip(batch["wave"], names, strict=True):
            with wave.open(str(Path(folder) / f"{name}.wav"), "wb") as file:
                file.setparams((1, 2, self.sr_hz, 0, "NONE", ""))
                file.writeframes((row.clamp(-1, 1) * 32767).short().numpy().tobytes())
        return written

    def features(self, x):
        return torch.fft.rfft(x).abs()


class Tones(Data):
    def __init__(self, sr_hz, field, shape, classes, levels, batch_size, num_workers=0):
        phase = np.random.default_rng(0).uniform(0, 7, (300, 1)) + np.arange(8)
        parts = {"train": phase[:200], "val": phase[200:240], "test": phase[240:]}
        splits = {name: Arrays(field, np.sin(x).astype(np.float32), None) for name, x in parts.items()}
        super().__init__(field=field, shape=shape, classes=classes, levels=levels, batch_size=batch_size, splits=splits,
                         num_workers=num_workers, found_shape=[8], class_names=None, found_levels=None,
                         modality=Waves(sr_hz))
'''
TRACKER = """
class Notes:
    def __init__(self, folder):
        self.path = folder / "tracked.txt"

    def log_text(self, name, columns, rows, step):
        with self.path.open("a") as file:
            file.writelines(f"{step} {name} {text}\\n" for _, text in rows)


def notes(folder, title, config):
    return Notes(folder)
"""


def test_a_modality_in_ones_own_package(tmp_path, monkeypatch):
    """Forty lines: train.py trains it, the tracker and the page show it, sample.py writes it, evaluate.py compares it."""
    assert len([line for line in WAVES.splitlines() if line.strip()]) <= 45
    (tmp_path / "my_waves.py").write_text(WAVES)
    (tmp_path / "my_notes.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = [
        "data=toy2d",
        "data._target_=my_waves.Tones",
        "data.sr_hz=8000",
        "data.field=wave",
        "data.shape=[8]",
        "model=ddpm_mlp",
        "model.net.width=8",
        "model.net.blocks=1",
        "model.schedule.steps=4",
        "sampler.steps=2",
        "max_steps=2",
        "data.batch_size=4",
        "callbacks.samples.every_steps=2",
        "callbacks.samples.n=3",
        "callbacks.evaluate.n=4",
        "logger._target_=my_notes.notes",
        "run_dir=run",
    ]
    folder = run(compose_config("train", given, prepare_training))
    shown = (folder / "samples" / "samples_0000002.txt").read_text()
    bars = shown.split()[2::3]
    assert len(bars) == 3 and all(len(bar) == 8 and set(bar) <= set("_-=^") for bar in bars)
    assert (folder / "tracked.txt").read_text().splitlines() == [f"2 samples {bar}" for bar in bars]
    assert all(bar in report(read_all([folder])) for bar in bars)

    stored = checkpoint.read(folder / "checkpoints" / "last.ckpt")["modalities"]
    assert stored == {"output": {"_target_": "my_waves.Waves", "state": {"sr_hz": 8000}}, "conditions": {}}
    with pytest.raises(UserError, match=r"wants to build my_waves.Waves, .* add trust=my_waves"):
        genai.load(folder)

    mine = [f"ckpt={folder}", "trust=my_waves", "device=cpu"]
    out = sampling.run(compose_config("sample", [*mine, "n=3", "frames=true", "out=out"], prepare_sampling))
    files = sorted(path.name for path in out.iterdir())
    assert files == ["grid.txt", "path.txt", "samples.npz", "seed_000000.wav", "seed_000001.wav", "seed_000002.wav"]
    path, written = ((out / f"{name}.txt").read_text().split()[2::3] for name in ("path", "grid"))
    assert len(path) == 3 and path[-1] == written[0], "noise, a step and the first sample itself"
    with wave.open("out/seed_000001.wav") as file, np.load("out/samples.npz") as arrays:
        assert (file.getframerate(), file.getnframes()) == (8000, 8)
        heard = np.frombuffer(file.readframes(8), np.int16) / 32767
        assert np.abs(heard - arrays["samples"][1].clip(-1, 1)).max() < 1e-4
    wanted = ["metrics=[frechet,recall]", "n=20", "repeats=2", "split=test"]
    cards = evaluate(compose_config("evaluate", [*mine, *wanted]))["cards"]
    assert [card["metric"] for card in cards] == ["frechet", "recall"]
    assert cards[0]["protocol"]["extractor"]["kind"] == "Waves" and cards[0]["value"] > cards[0]["floor"]
    assert set((folder / "cards" / "nearest.txt").read_text().split()[2]) <= set("_-=^")

    run(compose_config("train", [f"resume={folder}", "max_steps=3", "trust=[my_waves,my_notes]"], prepare_training))
    assert checkpoint.read(folder / "checkpoints" / "last.ckpt")["step"] == 3
    with pytest.raises(UserError, match=r"the sample rate of this data is not that of .* or init_strict=false"):
        run(
            compose_config(
                "train", [*given[:-1], "run_dir=other", "data.sr_hz=16000", f"init_from={folder}"], prepare_training
            )
        )


MODALITIES = [
    Image(),
    Image("face"),
    Vector(),
    Pixels([3, 4, 5], 17),
    Text(Char("ab", end=True)),
    Caption(12),
    Label(2, ["a", "b"]),
    Label(3),
]


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda m: type(m).__name__)
def test_a_state_is_plain_and_makes_the_same_modality(modality):
    again = build_modality(json.loads(json.dumps(node_of(modality))))
    assert type(again) is type(modality) and again.state() == modality.state() and again.field == modality.field


@pytest.mark.parametrize(
    ("assets", "data", "model", "null", "output", "conditions"),
    [
        ({"class_names": ["a", "b"]}, {"field": "image"}, {"classes": 2}, {}, Image(), [Label(2, ["a", "b"])]),
        ({"class_names": ["a", "b"]}, {"field": "image"}, {"classes": None}, {}, Image(), []),
        ({"class_names": None}, {"field": "vector"}, {}, {}, Vector(), []),
        ({}, {}, {"classes": 3}, {"label": torch.tensor(3)}, Image(), [Label(3)]),
        ({"class_names": None}, {"field": "image"}, {}, {"caption": torch.zeros(9)}, Image(), [Caption(9)]),
        ({"pixels": {"shape": [1, 8, 8], "levels": 17}}, {"field": "tokens"}, {}, {}, Pixels([1, 8, 8], 17), []),
        ({"tokenizer": {"_target_": "genai.data.tokenizers.Byte", "end": True}}, {}, {}, {}, Text(Byte(end=True)), []),
    ],
)
def test_an_older_checkpoint_meant_the_same_in_other_words(assets, data, model, null, output, conditions):
    node = legacy_nodes(up_to_date(assets), {"data": data, "model": model}, null)
    found = build_modality(node["output"]), {name: build_modality(n) for name, n in node["conditions"].items()}
    assert type(found[0]) is type(output)
    assert difference(node, output, {m.field: m for m in conditions}) is None
    assert list(found[1]) == [m.field for m in conditions]


def test_what_means_something_else_is_said_in_words():
    stored = nodes_of(Image(), {"label": Label(2, ["a", "b"])})
    assert difference(stored, Image(), {"label": Label(2, ["a", "b"])}) is None
    assert difference(stored, Image(), {"label": Label(2, ["b", "a"])}) == "list of classes"
    assert difference(stored, Image(), {}) is None, "a model without labels stores no names"
    assert difference(nodes_of(Text(Char("ab")), {}), Text(Char("abc")), {}) == "vocabulary"


def test_data_show_and_tell_by_their_modalities():
    data = Digits("image", [1, 8, 8], 10, 17, 4)
    assert (data.cond(12) or {})["label"].tolist() == [*range(10), 0, 1] and data.describe_cond(12)[-1] == "1"
    shown = data.show({"image": torch.zeros(20, 1, 8, 8)})
    assert isinstance(shown, torch.Tensor) and shown.shape[2] > 4 * shown.shape[1], "ten columns for ten classes"
    assert Vector().preview({"vector": torch.tensor([[0.5, 1.0, -2.0]])}) == ["0.5 1 -2"]


def test_points_outside_the_picture_are_counted(tmp_path, capsys):
    points = {"vector": torch.tensor([[0.5, 1.0], [0.0, -5.0]]), "seeds": torch.arange(2)}
    Vector().write(tmp_path, points, ["0", "1"], {}, None)
    assert capsys.readouterr().err == "1 of 2 points lie outside the picture, [-4, 4]^2\n"


def test_files_of_images_and_their_captions_name_each_other(tmp_path):
    """Where a model takes both, a caption's line names the file that its label's number is part of."""
    batch = {"image": torch.zeros(2, 1, 4, 4), "label": torch.tensor([3, 4]), "seeds": torch.tensor([5, 6])}
    names, request = sampling.file_names(batch["seeds"], batch["label"]), {"prompt": ["three", "four"]}
    Image().write(tmp_path, batch, names, request, None)
    Caption(9).note(tmp_path, names, request)
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["three", "four"]
    assert all((tmp_path / line["file_name"]).is_file() for line in lines)


def test_media_are_distinguished_by_what_is_given_and_what_is_made(tmp_path):
    import soundfile

    from genai.modalities.base import to_pil
    from genai.modalities.media import Media

    kind = Media(5, ["six", "seven"], [1, 4, 4], [1, 8], 8000)
    again = Media.from_state(kind.state())
    assert again.state() == kind.state()
    to_pil(torch.full((1, 4, 4), 255, dtype=torch.uint8)).save(tmp_path / "a.PNG")
    soundfile.write(tmp_path / "a.wav", [0.5] * 4, 8000)
    found = {name: kind.condition({"prompt": str(tmp_path / name)}, 2) for name in ("a.PNG", "a.wav")}
    assert found["a.PNG"]["image"].eq(1).all() and found["a.PNG"]["image"].shape == (2, 1, 4, 4)
    assert found["a.wav"]["audio"].shape == (2, 1, 8) and found["a.wav"]["audio"][0, 0, 4:].eq(0).all()
    words = kind.condition({}, 3)["caption"]
    assert kind.caption.preview({"caption": words}) == kind.in_turn(0, 3) == ["six", "seven", "six"]
    with pytest.raises(UserError, match="are of several media"):
        kind.condition({"prompt": ["six", "a.wav"]}, 2)
    made = {"caption": words, **found["a.PNG"], **found["a.wav"]}
    for field, names in (
        ("caption", ["grid.txt"]),
        ("image", ["s.png", "grid.png"]),
        ("audio", ["s.wav", "grid.png", "grid.wav"]),
    ):
        out = tmp_path / field
        batch = {field: made[field][:1], "seeds": torch.arange(1), "tokens": torch.zeros(1, 2)}
        assert kind.kind_in(batch).write(out, batch, ["s"], {}, None) == [*names, "samples.npz"]
        assert all((out / name).exists() for name in names)
    with pytest.raises(UserError, match="a batch of media has tokens, none of caption, image, audio"):
        kind.preview({"tokens": torch.zeros(1, 2)})
    with pytest.raises(UserError, match="words="):
        Media(5, [], [1, 4, 4], [1, 8], 8000)
