"""Sound as files, pictures and prompts: what is written is what was made, and what is read is what was written."""

import base64
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from genai.checkpoint.build import build_modality
from genai.compare.page import report
from genai.compare.runs import read
from genai.core.errors import UserError
from genai.modalities.audio import Audio, QuantizedAudio, spectrograms
from genai.modalities.base import PAUSE_SECONDS
from genai.modalities.stored import node_of
from genai.train.record import Record
from tests.compare.test_compare import write
from tests.train.test_tracking import offline_runs

SR_HZ = 8000


def sines(*frequencies, n=4000, amplitude=1.0):
    """Waveforms (B, 1, n), one for each frequency in Hz."""
    at = torch.arange(n) / SR_HZ
    return amplitude * torch.stack([torch.sin(2 * torch.pi * f * at) for f in frequencies])[:, None]


@pytest.mark.parametrize(
    "modality", [Audio(SR_HZ), Audio(44100, 2), QuantizedAudio(SR_HZ, 17, "mu_law")], ids=("mono", "stereo", "codes")
)
def test_a_state_is_plain_and_makes_the_same_modality(modality):
    again = build_modality(json.loads(json.dumps(node_of(modality))))
    assert type(again) is type(modality) and again.state() == modality.state() and again.field == modality.field


def test_a_spectrogram_shows_a_sine_at_its_frequency_and_loudness():
    """White is a sine of amplitude 1; a tenth of that is 20 dB, a quarter of the range, darker; upwards is higher."""
    maps = spectrograms(sines(1000, 3000), SR_HZ)
    n, _, rows, _ = maps.shape
    assert n == 2 and maps.abs().max() <= 1
    middle = maps[..., maps.shape[-1] // 2][:, 0]
    for column, hz in zip(middle, (1000, 3000), strict=True):
        assert abs((rows - 1 - int(column.argmax())) * SR_HZ / 2 / (rows - 1) - hz) <= SR_HZ / 2 / (rows - 1)
        assert column.max() == pytest.approx(1, abs=0.02)
    quiet = spectrograms(sines(1000, amplitude=0.1), SR_HZ)[0, 0, :, maps.shape[-1] // 2]
    assert quiet.max() == pytest.approx(0.5, abs=0.02)
    assert (spectrograms(torch.zeros(1, 1, 4000), SR_HZ) == -1).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_clips_are_written_as_they_are_and_read_back(tmp_path, channels):
    kind, x = Audio(SR_HZ, channels), sines(440, 880, 1200, n=1000, amplitude=0.5).expand(3, channels, 1000) * 0.7
    names = ["a", "b", "c"]
    written = kind.write(tmp_path / "out", {"audio": x, "seeds": torch.arange(3)}, names, {}, None)
    assert written == ["a.wav", "grid.png", "grid.wav", "samples.npz"]
    for wave, name in zip(x, names, strict=True):
        samples, sr_hz = soundfile.read(tmp_path / "out" / f"{name}.wav", dtype="int16", always_2d=True)
        assert sr_hz == SR_HZ and np.array_equal(samples.T, (wave * 32768).round().numpy())
    stored = np.load(tmp_path / "out" / "samples.npz")["samples"]
    assert stored.dtype == np.int16 and stored.shape == (3, channels, 1000)
    whole, _ = soundfile.read(tmp_path / "out" / "grid.wav", dtype="int16", always_2d=True)
    pause = round(PAUSE_SECONDS * SR_HZ)
    assert len(whole) == 3 * (1000 + pause)
    assert np.array_equal(whole[1000 + pause : 2000 + pause].T, stored[1]) and not whole[1000 : 1000 + pause].any()
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.size[0] > 50
    for name in ("grid.wav", "grid.png", "samples.npz"):
        (tmp_path / "out" / name).unlink()
    again = kind.read(tmp_path / "out", [channels, 1500], "x")
    assert torch.equal(again[..., :1000] * 32768, (x * 32768).round()) and not again[..., 1000:].any()
    assert torch.equal(kind.read(tmp_path / "out" / "b.wav", [channels, 300], "x")[0], again[1, :, :300])


def test_a_loud_clip_is_clipped_and_does_not_wrap_around(tmp_path):
    Audio(SR_HZ).write(tmp_path, {"audio": 3 * sines(440), "seeds": torch.arange(1)}, ["a"], {}, None)
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert samples.max() == 32767 and samples.min() == -32768 and np.abs(np.diff(samples.astype(int))).max() < 40000


def test_a_file_of_other_channels_is_mixed_or_doubled(tmp_path):
    x = np.stack([np.linspace(-0.5, 0.5, 100), np.linspace(0.25, -0.25, 100)], 1)
    soundfile.write(tmp_path / "two.wav", x, SR_HZ, "FLOAT")
    soundfile.write(tmp_path / "one.wav", x[:, 0], SR_HZ, "FLOAT")
    mixed = Audio(SR_HZ).read_one(tmp_path / "two.wav", "x")
    assert np.allclose(mixed[0].numpy(), x.mean(1), atol=1e-6)
    assert torch.equal(*Audio(SR_HZ, 2).read_one(tmp_path / "one.wav", "x"))
    with pytest.raises(
        UserError, match=r"^x=.*two\.wav has 8000 Hz, and this model 16000 Hz: give a file of that rate$"
    ):
        Audio(16000).read_one(tmp_path / "two.wav", "x")


def test_a_clip_of_codes_follows_its_prompt(tmp_path):
    kind = QuantizedAudio(SR_HZ, 65536, "linear")
    for name, n in (("long", 30), ("short", 10)):
        soundfile.write(tmp_path / f"{name}.wav", np.arange(1, n + 1, dtype=np.int16), SR_HZ)
    request = {"prompt": [str(tmp_path / "long.wav"), str(tmp_path / "short.wav")]}
    cond = kind.condition(request, 3)
    assert cond["pad"].tolist() == [0, 20, 0] and cond["lead"].tolist() == [1, 1, 1]
    assert cond["tokens"].tolist()[0] == [32768, *range(32769, 32799)] == cond["tokens"].tolist()[2]
    assert cond["tokens"].tolist()[1] == [32768] * 21 + [*range(32769, 32779)]
    made = torch.full((3, 5), 32768 + 999)
    kind.write(tmp_path / "out", {"tokens": made, "seeds": torch.arange(3)}, ["a", "b", "c"], request, None)
    first, second = (soundfile.read(tmp_path / "out" / f"{name}.wav", dtype="int16")[0].tolist() for name in "ab")
    assert first == [*range(1, 31), *[999] * 5] and second == [0] * 20 + [*range(1, 11), *[999] * 5]
    assert kind.condition({}, 2)["tokens"].tolist() == [[32768], [32768]]


def shown():
    return Audio(SR_HZ).preview({"audio": sines(440, 880, amplitude=0.5)})


def test_tensorboard_is_given_the_sound_with_its_rate(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "board", name="", version="")
    Record(tmp_path / "run", logger).samples(7, "samples", shown(), "seeds 0 to 1")
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (heard,) = events.Audio("samples_sound")
    assert heard.step == 7 and heard.sample_rate == SR_HZ and heard.length_frames == 4000
    assert len(events.Images("samples")) == 1
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "samples_0000007.png",
        "samples_0000007.wav",
    ]


def test_a_tracker_is_given_the_file_of_sound_with_its_rate_and_caption(tmp_path):
    class Heard:
        """A logger that takes sound, as that of Weights & Biases."""

        def log_audio(self, *arguments, **more):
            self.call = arguments, more

    logger, folder = Heard(), tmp_path / "samples"
    Record(tmp_path, logger).samples(7, "samples", shown(), "seeds 0 to 1")
    (name, (path,)), more = logger.call
    assert (name, path) == ("samples_sound", str(folder / "samples_0000007.wav"))
    assert more == {"step": 7, "caption": ["step 7, seeds 0 to 1"], "sample_rate": [SR_HZ]}


@pytest.mark.slow
def test_weights_and_biases_hears_the_samples(tmp_path, command):
    small = [
        "max_steps=2",
        "callbacks.samples.n=2",
        "callbacks.samples.every_steps=2",
        "model=wavenet",
        "data.audio.n=20",
        "data.audio.max_seconds=0.05",
        "data.shape=null",
    ]
    small += ["model.width=4", "model.dilations=[1]"]
    done = command("train.py", *small, "logger=wandb", f"run_dir={tmp_path / 'run'}", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    (offline,) = offline_runs(tmp_path / "run")
    heard = [row for row in offline.history if any(key.startswith("samples_sound") for key in row)]
    assert len(heard) == 1
    (wave,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/audio/*.wav")
    assert wave.read_bytes() == next((tmp_path / "run" / "samples").glob("*.wav")).read_bytes()


def test_a_page_of_runs_can_be_heard(tmp_path):
    folder = write(tmp_path / "wavenet")
    for path in (folder / "samples").iterdir():
        path.unlink()
    record = Record(folder)
    record.samples(5, "samples", Audio(SR_HZ).preview({"audio": sines(300)}))
    record.samples(40, "samples", shown())
    page = report([read(folder)])
    newest = base64.b64encode((folder / "samples" / "samples_0000040.wav").read_bytes()).decode()
    assert page.count("<audio controls") == 1 and f'src="data:audio/wav;base64,{newest}"' in page
    assert "<audio" not in report([read(write(tmp_path / "images"))])


def test_maps_are_log_mels_of_each_channel():
    maps = Audio(SR_HZ, 2).maps(torch.cat([sines(440), sines(880)], 1))
    assert maps.shape[:3] == (1, 2, 40)
    assert maps[0, 0, :, 10].argmax() < maps[0, 1, :, 10].argmax()
    assert math.isfinite(maps.sum())


@pytest.mark.parametrize(("sr_hz", "samples"), [(1, 1), (60, 100), (8000, 1)])
def test_a_spectrogram_of_any_rate_is_drawn(sr_hz, samples):
    picture = Audio(sr_hz).preview({"audio": torch.zeros(2, 1, samples)}).picture
    assert picture.ndim == 3


def test_a_mask_between_two_samples_is_refused():
    assert Audio(SR_HZ).read_mask([0.0, 1e-9], [1, SR_HZ]).sum() == 1
    with pytest.raises(UserError, match=r"^mask=\[1e-06, 2e-06\] has no sample between its times at 8000 Hz"):
        Audio(SR_HZ).read_mask([1e-6, 2e-6], [1, SR_HZ])
