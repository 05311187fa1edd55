"""Wrong commands about sound: one sentence that names the fix, exit code 2, no traceback, nothing written."""

import numpy as np
import pytest
import soundfile

from tests.conftest import SHARED

AUDIO = {
    ("data.sr_hz=0",): "data.sr_hz=0 must be a whole number of Hz, at least 1 and at most 768000",
    ("data.sr_hz=-1",): "data.sr_hz=-1 must be a whole number of Hz",
    ("data.sr_hz=44.1",): "data.sr_hz=44.1 must be a whole number of Hz",
    ("data.sr_hz=10000000",): "data.sr_hz=10000000 must be a whole number of Hz",
    ("data.sr_hz=null",): "data.sr_hz=null must be a whole number of Hz",
    ("data.max_seconds=0",): "data.max_seconds=0 must be a number of seconds, greater than 0 and at most 3600, or null",
    ("data.max_seconds=-1",): "data.max_seconds=-1 must be a number of seconds",
    ("data.max_seconds=4000",): "data.max_seconds=4000 must be a number of seconds",
    ("data.max_seconds=1e-9",): "data.max_seconds=1e-09 is less than one sample at 16000 Hz: give more",
    ("data.crop_seconds=0",): "data.crop_seconds=0 must be a number of seconds",
    ("data.crop_seconds=1e-9",): "data.crop_seconds=1e-09 is less than one sample at 16000 Hz: give more",
    ("data.channels=3",): "data.channels=3 must be one of 1, 2",
    ("data.channels=0",): "data.channels=0 must be one of 1, 2",
    ("data.channels=null",): "data.channels=null must be one of 1, 2",
    (
        "data.root=missing",
    ): "data.root='missing' is neither a folder nor an intact zip file: set data.root to one with recordings",
    (
        "data.root=empty",
    ): "data.root='empty' holds no recordings: set data.root to a folder, or a zip of one, that does",
    ("data.root=texts",): "data.root='texts' holds no recordings: set data.root",
    (
        "data.root=broken",
    ): "data.root='broken' holds no recordings (a.wav cannot be read as sound (Format not recognised)):",
    ("data.root=one",): "data.root='one' holds too few files to set some aside for validation and test: add some",
    ("data.root=sounds/00.wav",): "data.root='sounds/00.wav' is neither a folder nor an intact zip file",
    (
        "data.root=mixed",
    ): "data.root='mixed' has folders named train, but also more/00.wav: there must be train, and every file",
    ("data.shape=[1,5]",): "data.shape=[1, 5], but this data has [1, 16000]: correct data.shape or set it to null",
    ("data.classes=3",): "data.classes=3, but this data has None: correct data.classes or set it to null",
    ("data.levels=256",): "data.levels=256, but this data has 65536",
    ("data.speaker=bob",): "there is no key data.speaker",
    ("data.flip=true",): "there is no key data.flip",
}
CODES = {
    ("data.companding=alaw",): "data.companding=alaw must be one of mu_law, linear",
    ("data.levels=1",): "data.levels=1 must be a whole number",
    ("data.levels=70000",): "data.levels=70000 must be a whole number, at least 2 and at most 65536",
    ("data.audio.channels=2",): "data.audio is audio of shape [2, 16000]: give audio of one channel",
    ("data.audio=null",): "data.audio=null must be a node with a _target_",
    ("data.shape=[100]",): "data.shape=[100], but this data has [16000]",
    ("data.speakers=2",): "data.speakers=2, but this data has None",
    ("data.sr_hz=8000",): "there is no key data.sr_hz, did you mean data.audio.sr_hz?",
    ("data.audio.sr_hz=0",): "data.audio.sr_hz=0 must be a whole number of Hz",
}
OTHERS = {
    ("data=tones", "data.sr_hz=3999"): "data.sr_hz=3999 is too low for tones of up to 1760 Hz: give at least 4000",
    ("data=tones", "data.n=10", "model=wavenet"): "a WaveNet takes tokens, but this data has audio: choose codes",
    ("data=tones", "data.n=0"): "data.n=0 must be a whole number of tones",
    ("data=tones", "data.max_seconds=null"): "data.max_seconds=null must be a number of seconds",
    ("data=tones", "data.n=10", "data.max_seconds=1"): "data.shape=[1, 4000], but this data has [1, 8000]",
    ("data=spoken_digits", "data.takes=2"): "data.takes=2 must be a whole number of takes, at least 3",
    ("data=spoken_digits", "data.sr_hz=0"): "data.sr_hz=0 must be a whole number of Hz",
    ("data=spoken_digits", "data.takes=3", "data.speakers=6"): "data.speakers=6, but this data has 8",
    ("data=fsdd", "data.root=missing"): "data.root=missing holds no recordings such as 7_jackson_32.wav: download",
    ("data=fsdd", "data.root=sounds"): "data.root=sounds holds no recordings such as 7_jackson_32.wav",
    ("data=fsdd_codes", "data.root=missing", "model=gpt_nano"): "data.root=missing holds no recordings such as",
    ("data=fsdd", "data.root=two_rates"): "data.root=two_rates holds recordings of 8000 and 16000 Hz: give one rate",
    ("data=fsdd", "data.root=torn"): "torn/0_a_0.wav is cut short: bring it back or remove it",
    ("data=fsdd", "data.root=stereo"): "stereo/0_a_0.wav has 2 channels, and these recordings one",
    ("data=fsdd", "data.root=few"): "data.root=few holds no recordings of the train split: bring back takes 0 to 7",
}


def write(path, sr_hz=16000, n=800, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(n * channels).reshape(n, channels) / 9), sr_hz)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of sounds that something is wrong with, and one with which nothing is."""
    root = tmp_path_factory.mktemp("sounds")
    for i in range(14):
        write(root / "sounds" / f"{i:02d}.wav")
        write(root / "mixed" / ("train" if i % 2 else "more") / f"{i:02d}.wav")
    for name in ("empty", "texts", "broken"):
        (root / name).mkdir()
    (root / "texts" / "a.txt").write_text("x")
    (root / "broken" / "a.wav").write_text("x")
    write(root / "one" / "a.wav")
    for take in range(8):
        write(root / "two_rates" / f"0_a_{take}.wav", sr_hz=8000 if take else 16000)
        write(root / "torn" / f"0_a_{take}.wav", n=800)
        write(root / "stereo" / f"0_a_{take}.wav", channels=2)
        if take < 5:
            write(root / "few" / f"0_a_{take}.wav")
    content = (root / "torn" / "0_a_0.wav").read_bytes()
    (root / "torn" / "0_a_0.wav").write_bytes(content[:500])
    return root


@pytest.fixture
def here(made, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)


def given(arguments, *more):
    root = [] if any(argument.startswith("data.root=") for argument in arguments) else ["data.root=sounds"]
    return ["logger=none", *more, *root, *arguments]


@pytest.mark.parametrize("arguments", AUDIO, ids=" ".join)
def test_wrong_folders_of_sounds(refused, here, arguments):
    assert AUDIO[arguments] in refused("train.py", *given(arguments, "data=audio_folder"))


@pytest.mark.parametrize("arguments", CODES, ids=" ".join)
def test_wrong_codes(refused, here, arguments):
    assert CODES[arguments] in refused("train.py", *given(arguments, "data=audio_folder_codes", "model=gpt_nano"))


@pytest.mark.parametrize("arguments", OTHERS, ids=" ".join)
def test_wrong_data_sets_of_sound(refused, here, arguments):
    assert OTHERS[arguments] in refused("train.py", "logger=none", *arguments)


def test_a_model_that_fills_the_memory(refused, monkeypatch):
    def fills(self, **_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824000 bytes.")

    monkeypatch.setattr("genai.models.autoregressive.wavenet.WaveNet.__init__", fills)
    sentence = refused("train.py", "model=wavenet", "data.audio.n=10", "logger=none")
    assert (
        "this model does not fit the memory for data of shape [4000]: choose another model=, or smaller d" in sentence
    )


def test_an_unknown_speaker(refused):
    if not (SHARED / "fsdd").exists():
        pytest.skip("fsdd is not in ../shared/data")
    sentence = refused("train.py", "data=fsdd", f"data.root={SHARED / 'fsdd'}", "data.speaker=bob", "logger=none")
    assert (
        "data.speaker=bob must be one of george, jackson, lucas, nicolas, theo, yweweler, or null for all" in sentence
    )
    sentence = refused("train.py", "data=fsdd", f"data.root={SHARED / 'fsdd'}", "data.speaker=theo", "logger=none")
    assert "data.speakers=6, but this data has None: correct data.speakers or set it to null" in sentence


SAMPLE = {
    ("prompt=sounds/00.wav",): "prompt=sounds/00.wav has 16000 Hz, and this model 4000 Hz: give a file of that rate",
    (
        "prompt=afile.wav",
    ): "prompt=afile.wav cannot be read as sound (Format not recognised): name a .wav, .flac, .ogg or",
    ("prompt=missing.wav",): "prompt=missing.wav cannot be read as sound (No such file or directory)",
    ("prompt=empty",): "prompt=empty is a folder: name a .wav, .flac, .ogg or .mp3 file",
    ("prompt=torn.wav",): "prompt=torn.wav is cut short: name a .wav",
    ("prompt=none.wav",): "prompt=none.wav holds no samples: name a .wav",
    ("prompt=[]",): "prompt=[] must be a value or a list that is not empty",
    ("prompt=",): "prompt= is empty: leave it out, or name a file",
    ("prompt=5",): "prompt=5 cannot be read as sound (",
    ("prompt=[torn.wav,sounds/00.wav]",): "prompt= has 2 values for n=1 samples",
    ("label=cat",): "label=cat is not a class of this model: give an index from 0 to 1, or one of bell, dog",
    ("label=[dog,7]",): "label= has 2 values for n=1 samples: give at most as many, or n=2",
    ("label=[]",): "label=[] must be a value or a list that is not empty",
    ("speaker=bob",): "speaker=bob was given, but this model has no speakers: leave speaker= out",
    ("stop=x",): "stop='x' was given, but this model takes no text: leave stop= out",
    ("negative_prompt=x",): "negative_prompt='x' was given, but this model takes no prompt: leave negative_prompt= out",
    ("init=sounds/00.wav",): "there is no key init",
}


def trained(folder, *chosen):
    """A run of a small WaveNet at 4,000 Hz."""
    from genai.cli import compose_config
    from genai.train.run import run

    small = [
        "data.audio.sr_hz=4000",
        "data.audio.max_seconds=0.01",
        "model.width=4",
        "model.dilations=[1]",
        "logger=none",
    ]
    return run(compose_config("train", ["debug=true", "model=wavenet", *chosen, *small, f"run_dir={folder}"]))


@pytest.fixture(scope="module")
def run_of_codes(made, tmp_path_factory):
    for i in range(14):
        write(made / "classes" / ("bell", "dog")[i % 2] / f"{i:02d}.wav", sr_hz=4000)
    chosen = ["data=audio_folder_codes", f"data.root={made / 'classes'}", "data.num_workers=0"]
    return trained(tmp_path_factory.mktemp("run") / "codes", *chosen)


@pytest.mark.parametrize("arguments", SAMPLE, ids=" ".join)
def test_wrong_samples_of_sound(refused, here, run_of_codes, tmp_path, arguments):
    (tmp_path / "afile.wav").write_text("x")
    write(tmp_path / "none.wav", sr_hz=4000, n=0)
    write(tmp_path / "torn.wav", sr_hz=4000)
    (tmp_path / "torn.wav").write_bytes((tmp_path / "torn.wav").read_bytes()[:400])
    assert SAMPLE[arguments] in refused("sample.py", f"ckpt={run_of_codes}", "n=1", *arguments)


def test_an_unknown_speaker_of_a_model(refused, tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = trained(tmp_path_factory.mktemp("run") / "spoken", "data=spoken_digits_codes", "data.audio.takes=3")
    sentence = refused("sample.py", f"ckpt={folder}", "n=1", "speaker=bob")
    assert "speaker=bob is not a class of this model: give an index from 0 to 7, or one of american_man" in sentence
    assert "speaker=8 is not a class of this model" in refused("sample.py", f"ckpt={folder}", "n=1", "speaker=8")
