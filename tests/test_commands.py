"""Wrong commands: one sentence that names the fix, exit code 2, no traceback, nothing written."""

import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoint.test_checkpoint import DEBUG
from tests.conftest import ROOT, python


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A conditional and an unconditional run, trained in this process."""
    from genai.cli import compose_config
    from genai.train.run import run

    folder = tmp_path_factory.mktemp("runs")
    run(compose_config("train", [*DEBUG, f"run_dir={folder / 'digits'}"]))
    run(
        compose_config("train", ["debug=true", "experiment=ddpm_toy2d", "sampler.steps=2", f"run_dir={folder / 'toy'}"])
    )
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
    "model=ddmp": f"model=ddmp must be one of {MODELS}, did you mean ddpm?",
    "data=mnits": "did you mean mnist?",
    "experiment=ddpm_minst": "did you mean ddpm_mnist?",
    "max_steps=abc": "max_steps=abc must be a number",
    "max_steps=0": "max_steps=0 must be a whole number of steps, at least 1",
    "max_steps=null": "max_steps=null must be a whole number",
    "max_steps=1.5": "max_steps=1.5 must be a whole number",
    "seed=-1": "seed=-1 must be a whole number",
    "debug=maybe": "debug=maybe must be true or false",
    "optim.betas=0.9": "optim.betas=0.9 must be a list",
    "optim=5": "optim=5 must be one of adam, adamw",
    "max_steps=1,2": "add -m",
    "max_steps=[1": "'max_steps=[1' cannot be read: write key=value",
    "accumulate=0": "accumulate=0 must be a whole number of micro-batches, at least 1",
    "data.batch_size=0": "data.batch_size=0 must be a whole number of items in memory at once, at least 1",
    "data.num_workers=-1": "data.num_workers=-1",
    "data.shape=[1,9,9]": "data.shape=[1, 9, 9], but this data has [1, 8, 8]",
    "optim.lr=0": "optim.lr=0 must be a number greater than 0",
    "ema.decay=2": "ema.decay=2",
    "model.parameterization=w": "one of eps, x0, v",
    "model.label_dropout=3": "model.label_dropout=3",
    "model.schedule.steps=0": "model.schedule.steps",
    "model.net.multipliers=[1,2,2,2,2]": "height and width must be multiples of 16, got 8x8",
    "+model.net.depth=3": "unexpected keyword argument 'depth'",
    "+model.schedule._target_=genai.nope": "genai.nope",
    "callbacks.save.every_steps=0": "callbacks.save.every_steps=0",
    "log_every_steps=0": "log_every_steps=0",
    "trainer.accelerator=gpu": "torch sees no GPU",
    "trainer.accelerator=tpu": "one of auto, cpu, gpu",
    "trainer.devices=0": "trainer.devices=0",
    "trainer.precision=16-mixed": "one of auto, 32-true",
    "trainer.precision=16": "fp16 training needs loss scaling, which is not supported",
    "trainer.precision=fp16": "fp16 training needs loss scaling, which is not supported",
    "resume=nowhere": "there is no nowhere/config.yaml",
    "init_from=nowhere.ckpt": "no checkpoint nowhere.ckpt",
    "init_from=nowhere/": "no checkpoint nowhere",
    "~seed": "set it to null instead",
    # Arguments that are not key=value, or a flag
    "--max_steps=10": "unrecognized arguments: --max_steps=10: write max_steps=10",
    "--max-steps=10": "write max_steps=10",
    "-max_steps=10": "write max_steps=10",
    "--learning_rate": "keys are written key=value",
    "--cfg=nope": "invalid choice: 'nope' (choose from 'job', 'hydra', 'all'): give --cfg one of job, hydra, all",
    "--cfg": "give --cfg one of job, hydra, all",
    "--config-dir": "give --config-dir a folder",
    "--multirun=3": "give --multirun no value",
    "--resolve": "--resolve has no effect without --cfg",
    "--info=nope": "invalid choice: 'nope'",
    "--config-name=nope": "--config-name and --config-path have no effect here",
    "--config-path=nope": "--config-name and --config-path have no effect here",
    "--config-dir=nope": "--config-dir nope is not a folder",
    "--package=x": "have no effect here",
    "--experimental-rerun=x": "have no effect here",
    "hydra.run.dir=x": "hydra.run.dir=x has no effect without -m",
    "hydra/launcher=nope": "has no effect without -m",
    "max_steps": "'max_steps' must be key=value",
    "=3": "'=3' must be key=value",
    "max_steps =3": "without spaces around =",
    "a key=3": "'a key=3' cannot be read",
    "max_steps==3": "'max_steps==3' cannot be read",
    "data.batch_size=64 # comment": "cannot be read",
    "name=\udcff": "is not valid UTF-8",
    # Hints from other projects' words
    "epochs=10": "no key epochs, did you mean max_steps?",
    "iterations=10": "did you mean max_steps?",
    "learning_rate=1": "did you mean optim.lr?",
    "gpus=1": "did you mean trainer.devices?",
    "dataset=mnist": "did you mean data?",
    # Nothing where something must be
    "data=": "data= must be one of",
    "data=null": "data= cannot be left empty: choose one of",
    "model=null": "model= cannot be left empty",
    "~model": "model= cannot be left empty",
    "callbacks=null": "callbacks= cannot be left empty: choose one of default",
    "logger=null": "logger=none turns it off",
    "loop=null": "loop=null would delete a group of keys",
    "ema=null": "ema=null would delete a group of keys",
    "trainer=null": "trainer=null would delete a group of keys",
    "model.net=null": "model.net=null must be a node with a _target_",
    "run_dir=": "run_dir= is empty",
    "run_dir=''": "run_dir= is empty",
    "name=": "name= is empty",
    "resume=": "resume= is empty",
    "init_from=": "init_from= is empty",
    # Values of another kind
    "seed=true": "seed=True must be a number",
    "seed={a: 1}": "must be a number",
    "compile=1": "compile=1 must be true or false",
    "model.net=5": "must be a group of keys",
    "model.schedule=linear": "such as model.schedule._target_=genai.models.diffusion.process.schedules.linear",
    "callbacks.evaluate=5": "must be a group of keys",
    "trainer.devices=1.5": "trainer.devices=1.5 must be a whole number",
    "trainer.devices=auto": "must be a number",
    "trust=5": "trust=5 must be the name of a package",
    "trust=[my lab]": "must be the name of a package",
    "init_from=5": "no checkpoint 5",
    "name=${nope}": "Interpolation key 'nope' not found",
    "model.field=nope": "model.field=nope must be what data.field is, image",
    "data.field=label": "data.field=label is a name that batches have for something else",
    "loop._target_=os.system": "os.system cannot be built",
    "loop._target_=torch.nn.Linear": "loop._target_=torch.nn.Linear is not a training loop",
    "model._target_=os.system": "model._target_=os.system needs command",
    "model._target_=genai.nope": "_target_=genai.nope cannot be found",
    "experiment=../train": "experiment=../train must be one of",
    "+experiment=gan_digits": "+experiment=gan_digits would add a second experiment: write experiment=gan_digits",
    "extractor=inception": "extractor= is not a key of genai train, but of genai evaluate: leave it out",
    "+baseline=gmm": "baseline= is not a key of genai train, but of genai baselines: leave it out",
    "model@foo=ddpm": "model@foo= has no effect, for this config has no foo: write model=",
    "sweep=ddpm_digits_lr": "add -m",
    "seed=choice(1,2)": "add -m",
    # Files for folders
    "run_dir=/dev/null": "run_dir=/dev/null cannot be a folder",
    "run_dir=/dev/null/x": "run_dir=/dev/null/x cannot be a folder",
    f"run_dir={'a' * 300}": "has a name of 300 characters",
    f"name={'a' * 300}": "has a name of 300 characters",
    "init_from=/dev/null": "/dev/null is damaged, cut off or not a checkpoint",
    "init_from=C:\\runs\\x": "no checkpoint C:\\runs\\x",
    "resume=/dev/null": "resume=/dev/null is neither a run directory nor a folder of them",
}
TRAIN_PAIRS = {
    ("data=text_file", "model=gpt", "data.path=empty"): "data.path='empty' is not a file",
    ("data=text_folder", "model=gpt", "data.path=afile"): "data.path='afile' holds no text",
    ("data=image_folder", "data.root=afile"): "data.root='afile' is neither a folder nor an intact zip",
    ("model=latent", "codec.ckpt=5"): "no checkpoint 5",
    ("model=latent", "codec.ckpt=empty"): "empty holds no readable checkpoint",
    ("model=latent", "codec.cache=afile"): "codec.cache=afile cannot be a folder",
    ("data=text_file", "model=gpt", "data.path=afile", "data.cache=afile"): "data.cache=afile cannot be a folder",
    ("run_dir=afile/x",): "run_dir=afile/x cannot be a folder, for afile is not one",
    ("resume=empty",): "there is no empty/config.yaml",
    ("resume=not_yaml",): "not_yaml/config.yaml is not a config of a run (while parsing",
    ("resume=a_list",): "a_list/config.yaml is not a config of a run (it holds no keys)",
    ("resume=nothing",): "nothing/config.yaml is not a config of a run (it holds no keys)",
    ("resume=keys",): "keys/config.yaml is not a config of a run (it has no model)",
    ("+model=ddpm",): "+model=ddpm would add a second model: write model=ddpm",
    ("model=vae", "data=toy2d"): "model.likelihood is of grey levels, but this data has none: choose images with data=",
    (
        "model=gpt",
        "data=toy2d",
    ): "this model takes tokens, but this data has none (data.levels): choose a text with data=",
    ("model=ddpm_mlp", "data=digits"): "this model takes vectors (model.net.dim), but this data has shape [1, 8, 8]",
    ("model=vae_binary", "data=toy2d"): "choose images with data=, or gaussian",
    ("model=stylegan2", "data=toy2d"): "got [2]: choose another data=",
    (
        "model=gan",
        "data=digits_pixels",
    ): "model.field=tokens must be a field of images or vectors, for only model=gpt takes tokens: choose",
    ("init_from=empty",): "give init_from= another one",
    ("init_from=empty", "model=ddpm", "debug=true"): "give init_from= another one",
    ("-m", "seed=0,1", "run_dir=x"): "a sweep names the folders of its runs itself",
    ("-m", "seed=0,1", "resume=x"): "neither a run directory nor a folder of them",
    ("-m", "seed=0,x"): "seed=x must be a number",
    ("-m", "seed=0,1", "nope=3"): "there is no key nope",
    ("-m", "model=ddpm,nope"): "model=nope must be one of",
    ("-m", "sweep=nope"): "sweep=nope must be one of",
    ("-m", "sweep=ddpm_digits_lr", "sweep.over=5"): "sweep.over=5 must be a group",
    ("-m", "sweep=ddpm_digits_lr", "sweep.trials=0"): "sweep.trials=0 must be a whole number",
    ("-m", "seed=range(0)"): "there is nothing to run",
    ("-m", "optim.lr=interval(0,1)"): "cannot be listed",
    ("-m", "hydra/launcher=nope"): "Could not find 'hydra/launcher/nope'",
    ("-m", "hydra.nope=3"): "Could not override 'hydra.nope'",
    ("-m", "--nope"): "unrecognized arguments: --nope",
}


@pytest.mark.parametrize("argument", TRAIN)
def test_wrong_training_commands(refused, argument):
    if argument == "trainer.accelerator=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert TRAIN[argument] in refused("train.py", *([] if "logger" in argument else ["logger=none"]), argument)


LONG = {
    ("max_steps=VALUE",): "max_steps=VALUE must be a number",
    ("VALUE=3",): "there is no key VALUE (--help lists all)",
    ("model=VALUE",): "model=VALUE must be one of",
    ("name=VALUE VALUE",): "name a shorter one",
    ("run_dir=VALUE",): "run_dir=VALUE has a name of 20000 characters: name a shorter one",
    ("init_from=VALUE",): "VALUE/config.yaml cannot be used (File name too long): make room, or name another",
    ("data.root=VALUE", "data=mnist"): "cannot be used (File name too long)",
    ("--config-dir", "VALUE"): "VALUE cannot be used (File name too long)",
    ("optim.betas=[" + "0.5," * 9000 + "0.5]",): "0.5, 0... must be a list like [a,b] of 2 values",
}


@pytest.mark.parametrize("arguments", LONG, ids=lambda arguments: arguments[0][:20])
def test_long_values_are_cut_in_sentences(refused, arguments):
    cut = f"{'x' * 60}...{'x' * 20} (20000 characters)"
    sentence = refused("train.py", *(argument.replace("VALUE", "x" * 20000) for argument in arguments), "logger=none")
    assert LONG[arguments].replace("VALUE", cut) in sentence and len(sentence) < 600


def test_a_command_in_a_deleted_folder(tmp_path):
    script = (
        "import os, sys, genai.commands\n"
        "os.mkdir('gone'), os.chdir('gone'), os.rmdir('../gone')\n"
        "sys.argv = ['genai', 'train', '--cfg', 'job']\n"
        "genai.commands.main()\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the working directory cannot be used (No such file or directory)")


@pytest.fixture
def folder(tmp_path, runs):
    """What is not a run: a file, an empty folder, and runs whose config.yaml is broken; a command is given in their folder."""
    (tmp_path / "afile").write_text("x")
    (tmp_path / "empty").mkdir()
    broken = {"not_yaml": "{[", "a_list": "- 1", "nothing": "", "keys": "model: 3"}
    for name, text in broken.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(text)
        shutil.copy(runs / "digits" / "checkpoints" / "last.ckpt", tmp_path / name / "checkpoints")
    return tmp_path


@pytest.mark.parametrize("arguments", TRAIN_PAIRS, ids=" ".join)
def test_wrong_pairs_of_training_arguments(refused, folder, arguments):
    assert TRAIN_PAIRS[arguments] in refused(
        "train.py", *arguments, *([] if "--nope" in arguments else ["logger=none"])
    )


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
        ("data=toy2d", "model=ddpm_mlp", "data.distribution=moon"): "one of moons",
        ("data=toy2d",): "a U-Net takes images of shape [C, H, W] or sequences [C, T], got [2]",
    }
    for arguments, message in cases.items():
        assert message in refused("train.py", *arguments, "logger=none"), arguments


def test_wrong_samplers_are_refused_before_the_first_step(refused, tmp_path):
    from genai.cli import compose_config
    from genai.core.errors import UserError
    from genai.train.run import run

    with pytest.raises(UserError, match=r"sampler\.steps=500 must be a whole number between 1 and the model's T=10"):
        run(compose_config("train", [*DEBUG, "sampler.steps=500", f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_wrong_resumes(refused, runs, tmp_path):
    digits = runs / "digits"
    assert "optim.lr= cannot change when a run is resumed" in refused("train.py", f"resume={digits}", "optim.lr=1")
    assert "model= cannot change" in refused("train.py", f"resume={digits}", "model=ddpm_mlp")
    assert "is finished, at step 5: give a larger max_steps=" in refused("train.py", f"resume={digits}")
    assert f"continue it with resume={digits}" in refused("train.py", f"run_dir={digits}")
    assert "does not fit this model" in refused("train.py", f"init_from={digits}", "model.net.channels=16")
    sentence = refused("train.py", f"init_from={digits}", "experiment=ddpm_toy2d", "init_strict=false")
    assert "does not fit this model" in sentence and "init_strict" not in sentence


SAMPLE = {
    "label=12": "label=12 is not a class of this model: give an index from 0 to 9",
    "label=seven": "label=seven is not a class",
    "label=[1,x]": "label=x is not a class",
    "label=[]": "label=[] must be a value or a list that is not empty",
    "n=0": "n=0 must be a whole number",
    "n=many": "n=many must be a number",
    "batch_size=0": "batch_size=0",
    "seed=-3": "seed=-3",
    "weights=best": "one of ema, raw",
    "steps=0": "sampler.steps=0 must be a whole number of steps, at least 1",
    "sampler.steps=11": "sampler.steps=11 must be a whole number between 1 and the model's T=10",
    "sampler.step=3": "the sampler ddim has no step; it has eta, solver, steps, spacing, rho, shift,",
    "temperature=2": "there is no key temperature",
    "eta=2": "sampler.solver.eta=2",
    "sampler=huen": f"sampler=huen must be one of {names('sampler')}, did you mean heun?",
    "spacing=even": "sampler.spacing=even must be one of trailing, leading",
    "prompt=cat": "takes no text",
    "n=1e30": "n=1",
    "n=1.5": "n=1.5 must be a whole number",
    "n=": "n= must be a number",
    "label=true": "label=true is not a class",
    "label=1e3": "label=1e3 is not a class",
    "label=1.5": "label=1.5 is not a class",
    "label=-1": "label=-1 is not a class",
    "label=[1,true]": "label=true is not a class",
    "label=[[1]]": "label=[1] is not a class",
    "steps=1.5": "steps=1.5 must be",
    "steps=abc": "steps=abc must be a number",
    "eta=true": "sampler.solver.eta=True must be a number",
    "guidance=abc": "guidance=abc must be a number",
    "guidance=true": "guidance=true must be a number",
    "device=tpu": "device=tpu must be auto, cpu, cuda or one of several",
    "device=": "device= must be auto, cpu, cuda or one of several",
    "device=meta": "device=meta must be auto, cpu, cuda or one of several",
    "device=null": "device=null must be auto, cpu, cuda or one of several",
    "device=five": "device=five must be auto, cpu, cuda or one of several",
    "device=cuda:99": "device=cuda:99, but torch sees",
    "out=": "out= is empty",
    "out=/dev/null": "out=/dev/null cannot be a folder",
    "out=/dev/null/x": "out=/dev/null/x cannot be a folder",
    f"out={'a' * 300}": "has a name of 300 characters",
    "trust=5": "trust=5 must be the name of a package",
    "trust=": "trust= must be the name of a package",
    "weights=": "weights= is empty",
    "weights=null": "one of ema, raw",
    "sampler=": "sampler= must be one of",
    "sampler._target_=os.system": "the sampler ddim has no _target_",
    "sampler=gan": "sampler gan is for a GAN",
    "sampler=speculative": "sampler speculative is for a Rewindable",
    "sampler=interpolate": "sampler interpolate is for a LatentGenerator",
    "num_samples=5": "did you mean n?",
    "output=x": "did you mean out?",
    "class=3": "did you mean label?",
    "image=cat.jpg": "image=cat.jpg cannot be read as an image",
    "stop=x": "takes no text",
    "prompt=-": "prompt=- is for a model of text, and samples of this one are image: leave it out",
    "negative_prompt=x": "takes no prompt",
    "seed=1,2": "seed=1,2 names several values: genai sample takes one, so repeat the command in a loop of the shell",
    "-m": "genai sample has no sweeps: leave -m out, and repeat the command in a loop of the shell",
    "data=mnist": "data= is not a key of genai sample, but of genai train and genai baselines: leave it out, as the run",
    "--n=5": "write n=5",
    "hydra.verbose=true": "has no effect without -m",
}
CKPT = {
    "ckpt=": "ckpt= is empty",
    "ckpt=5": "no checkpoint 5",
    "ckpt=afile": "afile is damaged, cut off or not a checkpoint",
    "ckpt=/dev/null": "/dev/null is damaged, cut off or not a checkpoint",
    "ckpt=~/nope": "nope: name a run, or a file in its checkpoints/",
    "ckpt= empty": "no checkpoint  empty",
    "ckpt=s3://bucket/x.ckpt": "no checkpoint s3:/bucket/x.ckpt",
    "ckpt=not_yaml": "not_yaml/config.yaml is not a config of a run",
    "ckpt=a_list": "it holds no keys",
    "ckpt=nothing": "it holds no keys",
    "ckpt=keys": "it has no model",
    "ckpt=not_yaml/config.yaml": "config.yaml is damaged, cut off or not a checkpoint",
}
EVALUATE = {
    "metrics=5": "metrics=5 must be",
    "metrics=[]": "metrics=[]",
    "metrics=nope": "metrics=['nope']: nope is not a metric",
    "split=": "split= must be one of",
    "n=0": "n=0 must be a whole number",
    "n=1000000": "more than the",
    "repeats=0": "repeats=0",
    "likelihood=nope": "likelihood=nope must be one of probability_flow",
    "extractor=null": "extractor= cannot be left empty",
    "extractor=nope": "extractor=nope must be one of",
    "device=tpu": "device=tpu must be auto, cpu, cuda or one of several",
    "trust=5": "trust=5 must be the name of a package",
    "baselines=5": "baselines=5 must be true or false",
    "metric=[frechet]": "did you mean metrics?",
    "model=edm": "model= is not a key of genai evaluate, but of genai train: leave it out, as the run that ckpt= names",
    "+model=edm": "model= is not a key of genai evaluate",
    "--multirun": "genai evaluate has no sweeps: leave -m out",
    "root=": "root= is empty",
    "--split=test": "write split=test",
}


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(refused, runs, argument):
    assert SAMPLE[argument] in refused("sample.py", f"ckpt={runs / 'digits'}", argument)


@pytest.mark.parametrize("argument", CKPT)
def test_wrong_names_of_checkpoints(refused, folder, argument):
    assert CKPT[argument] in refused("sample.py", argument)


@pytest.mark.parametrize("argument", EVALUATE)
def test_wrong_evaluations(refused, runs, argument):
    assert EVALUATE[argument] in refused("evaluate.py", f"ckpt={runs / 'digits'}", argument)


def test_a_sample_is_not_written_over_a_file(refused, folder, runs):
    for out in ("afile", "afile/x"):
        assert f"out={out} cannot be a folder" in refused("sample.py", f"ckpt={runs / 'digits'}", f"out={out}")


COMPARE = {
    (): "the following arguments are required: runs",
    ("",): "is empty",
    ("nope",): "nope holds no run",
    ("afile",): "afile holds no run",
    ("empty",): "empty holds no run",
    ("a_list",): "a_list/config.yaml is not a config of a run",
    ("keys",): "keys/config.yaml is not a config of a run (it has no model)",
    ("RUN", "--out", "afile"): "--out=afile cannot be a folder",
    ("RUN", "--out", "afile/x"): "--out=afile/x cannot be a folder",
    ("RUN", "--out", ""): "--out is empty",
    ("RUN", "--out"): "argument --out: expected one argument",
    ("RUN", "--nope"): "unrecognized arguments: --nope",
    ("RUN", "nope"): "nope holds no run",
}
BASELINES = {
    "seed=18446744073709551616": "seed=18446744073709551616",
    "seed=-1": "seed=-1",
    "repeats=0": "repeats=0 must be a whole number",
    "split=dev": "split=dev must be one of",
    "fit=5": "fit=5 must be a list",
    "fit=nope": "fit=nope must be a list like [a,b] of 1 or more values, each train, val, test",
    "fit=[]": "fit=[]",
    "features=nope": "features=nope must be one of",
    "out=": "out= is empty",
    "out=afile/x": "afile is not one",
    "out=empty": "out=empty is a folder",
    "baseline=nope": "baseline=nope must be one of",
    "baseline=ngram": "choose another with baseline=",
    "baseline.order=3": "there is no key baseline.order",
    "rows=null": "rows=null would delete a group of keys",
    "rows.image=[5]": "rows.image=[5] must be a list",
    "data=null": "data= cannot be left empty",
    "data=toy2d": "there are no baselines of vector",
    "--data=digits": "write data=digits",
    "-m": "genai baselines has no sweeps: leave -m out",
    "model=ddpm": "model= is not a key of genai baselines, but of genai train: leave it out",
}


@pytest.mark.parametrize("arguments", COMPARE, ids=" ".join)
def test_wrong_comparisons(refused, folder, runs, arguments):
    given = [str(runs / "digits") if argument == "RUN" else argument for argument in arguments]
    assert COMPARE[arguments] in refused("genai/compare/__main__.py", *given)


@pytest.mark.parametrize("argument", BASELINES)
def test_wrong_baselines(refused, folder, argument):
    assert BASELINES[argument] in refused("genai/evaluation/baselines/__main__.py", argument)


def test_wrong_calls_from_python(runs):
    import genai
    from genai.core.errors import UserError

    loaded = genai.load(runs / "digits")
    calls = {
        "device=tpu must be one of auto, cpu, cuda": lambda: genai.load(runs / "digits", device="tpu"),
        "device=meta must be one of": lambda: genai.load(runs / "digits", device="meta"),
        "trust=5 is not a name of a Python package": lambda: genai.load(runs / "digits", trust=5),
        "weights=None must be one of ema, raw": lambda: genai.load(runs / "digits", weights=None),
        "no checkpoint 5": lambda: genai.load(5),
        "loaded must be a loaded model, got 'runs/vae': sample(load('runs/vae'))": lambda: genai.sample("runs/vae"),
        "loaded must be a loaded model, got None": lambda: genai.sample(None),
        "label=True is not a class": lambda: genai.sample(loaded, label=True),
        "label=1.0 is not a class": lambda: genai.sample(loaded, label=[1.0]),
        "must be a whole number, at least 1 and at most": lambda: genai.sample(loaded, n=10**30),
        "steps=1.5 must be": lambda: genai.sample(loaded, n=1, steps=1.5),
        "has no step;": lambda: genai.sample(loaded, n=1, step=1),
        "mask must be one image, got the folder": lambda: genai.sample(loaded, n=1, mask=runs),
        "sampler='ddim' must be a config node": lambda: genai.sample(loaded, n=1, sampler="ddim"),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=re.escape(message)):
            call()


def test_every_callback_can_be_turned_off(runs):
    from genai.cli import compose_config
    from genai.train.run import run

    off = [f"callbacks.{name}=null" for name in ("evaluate", "samples", "save", "cards")]
    folder = run(compose_config("train", [*DEBUG, *off, f"run_dir={runs / 'off'}"]))
    assert (folder / "metrics.csv").is_file() and not list(folder.glob("checkpoints/*.ckpt"))


def test_a_training_that_diverges_says_so(runs):
    from genai.cli import compose_config
    from genai.core.errors import UserError
    from genai.train.run import run

    wild = [
        "optim.lr=1000",
        "optim.weight_decay=1",
        "clip_norm=null",
        "optim.warmup_steps=0",
        "ema.decay=0.01",
        "callbacks.samples.every_steps=1",
    ]
    with pytest.raises(UserError) as stopped:
        run(compose_config("train", [*DEBUG, *wild, f"run_dir={runs / 'wild'}"]))
    assert "not finite" in str(stopped.value) and "lower optim.lr" in str(stopped.value), stopped.value


def test_wrong_checkpoints(refused, runs, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert "there is no run below runs/ yet" in refused("sample.py")
    assert "no checkpoint nowhere" in refused("sample.py", "ckpt=nowhere")
    assert "text.ckpt is damaged, cut off or not a checkpoint" in refused("sample.py", "ckpt=text.ckpt")
    assert "empty holds no readable checkpoint" in refused("sample.py", "ckpt=empty")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refused("sample.py", f"ckpt={runs / 'digits'}", "device=cuda")
    assert "unconditional: leave label= out" in refused("sample.py", f"ckpt={runs / 'toy'}", "label=1")
    assert "unconditional: leave guidance= out" in refused("sample.py", f"ckpt={runs / 'toy'}", "guidance=2")
    assert "split=dev must be one of train, val, test" in refused("evaluate.py", f"ckpt={runs / 'digits'}", "split=dev")
    assert "has none (data.levels)" in refused("evaluate.py", f"ckpt={runs / 'toy'}")


def test_an_image_is_changed_filled_in_and_inverted_from_the_command_line(runs, tmp_path, monkeypatch):
    from genai.cli import compose_config, prepare_sampling
    from genai.sampling import run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    draw = np.random.default_rng(0)
    given = draw.integers(256, size=(2, 8, 8), dtype=np.uint8)
    for name, pixels in zip("ab", given, strict=True):
        Image.fromarray(pixels).save(f"in/{name}.png")
    white = np.zeros((8, 8), np.uint8)
    Image.fromarray(white).save("none.png")
    white[4:] = 255
    Image.fromarray(white).save("lower.png")

    def sampled(*arguments):
        cfg = compose_config(
            "sample", [f"ckpt={runs / 'digits'}", "out=out", "n=3", "label=1", "image=in", *arguments], prepare_sampling
        )
        return np.load(run(cfg) / "samples.npz")["samples"][:, 0]

    repeated = given[[0, 1, 0]]
    assert (sampled("mask=none.png") == repeated).all()
    filled = sampled("mask=lower.png", "frames=true", "steps=4")
    assert (filled[:, :4] == repeated[:, :4]).all() and (filled[:, 4:] != repeated[:, 4:]).any()
    with Image.open("out/path.gif") as film, Image.open("out/path.png") as picture:
        assert film.n_frames == 5 and picture.height < picture.width
    near, far = (
        sampled("image=in/a.png", "strength=0.3", "steps=5"),
        sampled("image=in/a.png", "strength=0.9", "steps=5"),
    )
    assert abs(near.astype(float) - given[0]).mean() < abs(far.astype(float) - given[0]).mean()
    assert sampled("invert=true", "guidance=0", "eta=0", "sampler.rho=5").shape == (3, 8, 8)
    again = sampled("strength=0.9", f"autoguidance={runs / 'digits'}", "guidance=2", "guidance_interval=[0.1,null]")
    assert (again == sampled("strength=0.9", "guidance=1")).mean() > 0.9  # away from itself


REFUSED_IMAGES = {
    ("image=cat.png", "strength=0.5"): "image=cat.png cannot be read as an image (No such file or directory)",
    (
        "image=broken.png",
        "strength=0.5",
    ): "image=broken.png cannot be read as an image (cannot identify image file): name",
    ("image=empty", "strength=0.5"): "image=empty contains no file",
    ("image=/dev/null", "strength=0.5"): "image=/dev/null is not a file",
    ("strength=0.5",): "strength= says what to do with a given image, and there is none: give image=",
    ("strength=0",): "strength=0 must be a number greater than 0 and at most 1",
    ("guidance_interval=[2]",): "guidance_interval=[2] must be",
    ("guidance_interval=[2,1]", "guidance=2"): "guidance_interval=[2, 1] must be [low,high]",
    ("autoguidance=nowhere", "guidance=2"): "autoguidance: there is no checkpoint nowhere: name a run",
    ("sampler.sigma_max=1e5",): "sampler.sigma_max=100000.0 is out of range",
    ("sampler.sigma_min=2", "sampler.sigma_max=1"): "sampler.sigma_min=2 must be below sampler.sigma_max=1",
    ("frames=true", "sampler=gan"): "the sampler gan has no frames",
}


@pytest.mark.parametrize("arguments", REFUSED_IMAGES)
def test_what_an_image_cannot_be_or_do_is_refused(runs, tmp_path, monkeypatch, arguments):
    from genai.cli import compose_config, prepare_sampling
    from genai.core.errors import UserError
    from genai.sampling import run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(UserError) as refusal:
        run(compose_config("sample", [f"ckpt={runs / 'digits'}", "n=2", *arguments], prepare_sampling))
    assert REFUSED_IMAGES[arguments] in str(refusal.value)


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
    least, ours = [sys.executable, "-c", "import hydra.main, hydra.compose"], [sys.executable, *script]
    seconds = [(cpu_seconds(least), cpu_seconds(ours)) for _ in range(3)]
    floor, taken = map(min, zip(*seconds, strict=True))
    assert taken < 4 * floor, (floor, taken)


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


@pytest.mark.slow
def test_multirun_runs_every_combination(tmp_path, command):
    done = command("train.py", "-m", *DEBUG, "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/sweeps/ddpm_digits-*/*/checkpoints/last.ckpt"))) == 2
