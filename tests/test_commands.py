"""Wrong commands: one sentence that names the fix, exit code 2, no traceback, nothing written."""

import resource
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.test_checkpoint import DEBUG


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A conditional and an unconditional run, trained in this process."""
    from genai.cli import composed
    from genai.train.run import run

    folder = tmp_path_factory.mktemp("runs")
    run(composed("train", [*DEBUG, f"run_dir={folder / 'digits'}"]))
    run(composed("train", ["debug=true", "experiment=ddpm_toy2d", "sampler.steps=2", f"run_dir={folder / 'toy'}"]))
    return folder


def names(group):
    return ", ".join(sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")))


MODELS = names("model")
TRAIN = {
    "max_step=3": "no key max_step, did you mean max_steps?",
    "lr=1e-3": "no key lr, did you mean optim.lr?",
    "optim.lrr=1": "did you mean optim.lr?",
    "data.batchsize=3": "did you mean data.batch_size?",
    "batch_size=3": "did you mean data.batch_size?",
    "model=ddmp": f"model=ddmp is none of {MODELS}, did you mean ddpm?",
    "data=mnits": "did you mean mnist?",
    "experiment=ddpm_minst": "did you mean ddpm_mnist?",
    "max_steps=abc": "max_steps=abc must be a number",
    "max_steps=0": "max_steps=0 must be a whole number of steps, at least 1",
    "max_steps=null": "max_steps=null must be a whole number",
    "max_steps=1.5": "max_steps=1.5 must be a whole number",
    "seed=-1": "seed=-1 must be a whole number",
    "debug=maybe": "debug=maybe must be true or false",
    "optim.betas=0.9": "optim.betas=0.9 must be a list",
    "optim=5": "optim=5 is none of adam, adamw",
    "max_steps=1,2": "add -m",
    "max_steps=[1": "cannot compose the config: no viable alternative",
    "accumulate=0": "accumulate=0 must be a whole number of micro-batches, at least 1",
    "data.batch_size=0": "data.batch_size=0 must be a whole number of items in memory at once, at least 1",
    "data.num_workers=-1": "data.num_workers=-1",
    "data.shape=[1,9,9]": "data.shape=[1, 9, 9], but this data has [1, 8, 8]",
    "optim.lr=0": "optim.lr=0 must be a number greater than 0",
    "ema.decay=2": "ema.decay=2",
    "model.parameterization=w": "none of eps, x0, v",
    "model.label_dropout=3": "model.label_dropout=3",
    "model.schedule.steps=0": "model.schedule.steps",
    "model.net.multipliers=[1,2,2,2,2]": "height and width must be multiples of 16, got 8x8",
    "+model.net.depth=3": "unexpected keyword argument 'depth'",
    "+model.schedule._target_=genai.nope": "genai.nope",
    "callbacks.save.every_steps=0": "callbacks.save.every_steps=0",
    "log_every_steps=0": "log_every_steps=0",
    "trainer.accelerator=gpu": "torch sees no GPU",
    "trainer.accelerator=tpu": "none of auto, cpu, gpu",
    "trainer.devices=0": "trainer.devices=0",
    "trainer.precision=16-mixed": "none of auto, 32-true",
    "resume=nowhere": "there is no nowhere/config.yaml",
    "init_from=nowhere.ckpt": "no checkpoint nowhere.ckpt",
    "init_from=nowhere/": "no checkpoint nowhere",
    "~seed": "set it to null instead",
}


@pytest.mark.parametrize("argument", TRAIN)
def test_wrong_training_commands(refused, argument):
    if argument == "trainer.accelerator=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert TRAIN[argument] in refused("train.py", argument, "logger=none")


def test_wrong_data(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    cases = {
        ("data=image_folder", "data.root=missing"): "data.root='missing'",
        ("data=image_folder", "data.root=empty"): "data.root='empty' holds no images",
        ("data=image_folder", "data.root=bad.zip"): "data.root='bad.zip'",
        (
            "data=mnist",
            "data.root=missing",
        ): "data.root='missing' (looked for missing/MNIST/raw/train-images-idx3-ubyte",
        ("data=toy2d", "model=ddpm_mlp", "data.distribution=moon"): "none of moons",
        ("data=toy2d",): "a U-Net takes images of shape [C, H, W], got [2]",
    }
    for arguments, message in cases.items():
        assert message in refused("train.py", *arguments, "logger=none"), arguments


def test_wrong_samplers_are_refused_before_the_first_step(refused, tmp_path):
    from genai.cli import composed
    from genai.core.errors import UserError
    from genai.train.run import run

    with pytest.raises(UserError, match=r"sampler\.steps=500 must be between 1 and the model's T=10"):
        run(composed("train", [*DEBUG, "sampler.steps=500", f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wrong_resumes(refused, runs, tmp_path):
    digits = runs / "digits"
    assert "optim.lr= cannot change when a run is resumed" in refused("train.py", f"resume={digits}", "optim.lr=1")
    assert "model= cannot change" in refused("train.py", f"resume={digits}", "model=ddpm_mlp")
    assert "already done its 5 steps: give a larger max_steps=" in refused("train.py", f"resume={digits}")
    assert f"resume={digits} goes on with it" in refused("train.py", f"run_dir={digits}")
    assert "does not fit this model" in refused("train.py", f"init_from={digits}", "model.net.channels=16")
    assert "does not fit this model" in refused(
        "train.py", f"init_from={digits}", "experiment=ddpm_toy2d", "init_strict=false"
    )


SAMPLE = {
    "label=12": "label=12 is not a class of this model: give an index from 0 to 9",
    "label=seven": "label=seven is not a class",
    "label=[1,x]": "label=x is not a class",
    "label=[]": "label=[] must be a value or a list that is not empty",
    "n=0": "n=0 must be a whole number",
    "n=many": "n=many must be a number",
    "batch_size=0": "batch_size=0",
    "seed=-3": "seed=-3",
    "weights=best": "none of ema, raw",
    "steps=0": "sampler.steps=0 must be a whole number of steps, at least 1",
    "sampler.steps=11": "sampler.steps=11 must be between 1 and the model's T=10",
    "sampler.step=3": "the sampler ddim has no step; it has steps, spacing, eta, guidance, cuda_graph, did you mean steps?",
    "temperature=2": "there is no key temperature",
    "eta=2": "sampler.eta=2",
    "sampler=huen": f"sampler=huen is none of {names('sampler')}, did you mean heun?",
    "spacing=even": "sampler.spacing=even is none of trailing, leading",
    "prompt=cat": "takes no text",
}


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(refused, runs, argument):
    assert SAMPLE[argument] in refused("sample.py", f"ckpt={runs / 'digits'}", argument)


def test_wrong_checkpoints(refused, runs, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert "there is no run below runs/ yet" in refused("sample.py")
    assert "no checkpoint nowhere" in refused("sample.py", "ckpt=nowhere")
    assert "text.ckpt is torn or no checkpoint" in refused("sample.py", "ckpt=text.ckpt")
    assert "empty holds no readable checkpoint" in refused("sample.py", "ckpt=empty")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused("sample.py", f"ckpt={runs / 'digits'}", "device=cuda")
    assert "unconditional: leave label= out" in refused("sample.py", f"ckpt={runs / 'toy'}", "label=1")
    assert "unconditional: leave guidance= out" in refused("sample.py", f"ckpt={runs / 'toy'}", "guidance=2")
    assert "split=dev is none of train, val, test" in refused("evaluate.py", f"ckpt={runs / 'digits'}", "split=dev")
    assert "has none (data.levels)" in refused("evaluate.py", f"ckpt={runs / 'toy'}")


def cpu_seconds(command):
    """User and system seconds of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("max_step=3", 2)])
def test_help_and_mistakes_answer_at_once(argument, code):
    script = [str(ROOT / "train.py"), argument]
    done = subprocess.run([sys.executable, "-X", "importtime", *script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert min(cpu_seconds([sys.executable, *script]) for _ in range(5)) < 0.6  # 0.33 to 0.45 were measured


def test_help_lists_choices_and_keys(runs, command):
    text = command("train.py", "--help", "model=ddpm_mlp").stdout
    assert f"\n  model: {MODELS}\n" in text and "\nname: ddpm_mlp_digits\n" in text
    assert "eta:" not in command("sample.py", "--help").stdout
    assert "eta:" in command("sample.py", "--help", f"ckpt={runs / 'digits'}").stdout


def test_newest_run_is_the_default(runs, tmp_path, command):
    shutil.copytree(runs / "digits", tmp_path / "runs" / "x")
    done = command("sample.py", "n=2", "out=here", "label=[3,4]", "guidance=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("newest run: ") == 1
    assert (tmp_path / "here" / "seed_000001_label_4.png").exists()


def test_multirun_runs_every_combination(tmp_path, command):
    done = command("train.py", "-m", *DEBUG, "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/sweeps/ddpm_digits-*/*/checkpoints/last.ckpt"))) == 2
