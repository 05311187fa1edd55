"""The package from Python: compose, train, load, sample, evaluate, several times in one process."""

import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import lightning as L
import numpy as np
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError

import genai
import genai.train.run  # packages change warnings and hooks when they are imported
from genai.cli import compose_config
from genai.core.errors import UserError
from tests.conftest import ROOT, python

TINY = ["debug=true", "sampler.steps=2", "callbacks.samples.n=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    return genai.train(genai.compose([*TINY, f"run_dir={folder / 'first'}"]))


def test_a_config_is_that_of_the_command_line_and_checked_alike(trained):
    cfg = genai.compose(["model=edm", "data.batch_size=32"])
    assert cfg == compose_config("train", ["model=edm", "data.batch_size=32"])
    assert genai.compose([f"ckpt={trained}", "steps=3"], "sample").sampler.steps == 3
    assert genai.compose(config="evaluate").split == "test"
    cfg.data.batch_size = 16
    with pytest.raises(ConfigAttributeError):
        cfg.data.batchsize = 16
    wrong = {
        "did you mean max_steps?": lambda: genai.compose(["max_step=3"]),
        "overrides must be a list of strings": lambda: genai.compose("max_steps=3"),
        "config='trian' must be one of train, sample": lambda: genai.compose([], "trian"),
        "has no effect without -m": lambda: genai.compose(["hydra.run.dir=x"]),
        "sweep= names several runs": lambda: genai.compose(["sweep=ddpm_digits_lr"]),
        "add -m": lambda: genai.compose(["seed=0,1"]),
        "resume=nowhere": lambda: genai.compose(["resume=nowhere"]),
    }
    for message, call in wrong.items():
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            call()


def test_wrong_arguments_of_compose_are_one_sentence(tmp_path):
    (file := tmp_path / "file").touch()
    wrong = {
        "overrides must be a list of strings such as": [
            lambda: genai.compose(None),
            lambda: genai.compose(3),
            lambda: genai.compose(tmp_path),
            lambda: genai.train(None),
            lambda: genai.train(3),
            lambda: genai.train(tmp_path),
        ],
        "config=['train'] must be one of train": [lambda: genai.compose([], config=["train"])],
        "config_dir=3 is not a folder": [lambda: genai.compose([], config_dir=3)],
        f"config_dir={tmp_path / 'gone'} is not a folder": [
            lambda: genai.compose([], config_dir=str(tmp_path / "gone"))
        ],
        f"config_dir={file} is not a folder": [lambda: genai.compose([], config_dir=file)],
    }
    for message, calls in wrong.items():
        for call in calls:
            with pytest.raises(UserError, match=re.escape(message)):
                call()
    assert genai.compose([], config_dir=tmp_path) == genai.compose([])


def edited(key, value=None, delete=False):
    cfg = genai.compose([*TINY, "logger=none"])
    OmegaConf.set_struct(cfg, False)
    node, _, last = key.rpartition(".")
    part = OmegaConf.select(cfg, node) if node else cfg
    if delete:
        del part[last]
    else:
        part[last] = value
    return cfg


WRONG_EDITS = {
    "name=None must be a name": ("name", None),
    "callbacks=[1] must be a group of keys": ("callbacks", [1]),
    "max_steps cannot be read: Interpolation key 'nokey' not found": ("max_steps", "${nokey}"),
    "resume=3 must be a path": ("resume", 3),
    "nothing reads foo: leave it out": ("foo", 1),
    "nothing reads trainer.foo: leave it out": ("trainer.foo", 1),
    "ema=null must be a node": ("ema", None),
}


@pytest.mark.parametrize("message", WRONG_EDITS)
def test_a_config_that_was_edited_wrongly_is_refused(message):
    with pytest.raises(UserError, match=re.escape(message)):
        genai.train(edited(*WRONG_EDITS[message]))


@pytest.mark.parametrize("key", [*genai.compose([]), "trainer.precision"])
def test_a_config_without_one_of_its_keys_is_refused(key):
    with pytest.raises(UserError, match=f"not a config of training, it has no {key}: compose it"):
        genai.train(edited(key, delete=True))


def test_a_config_of_plain_values_with_a_path_trains(tmp_path):
    for cfg in OmegaConf.create({"max_steps": 2}), OmegaConf.create(), DictConfig(None):
        with pytest.raises(UserError, match="not a config of training"):
            genai.train(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(edited("run_dir", tmp_path / "run"), resolve=True))
    assert genai.train(cfg) == tmp_path / "run" and cfg.run_dir == tmp_path / "run"


def test_a_config_of_data_that_are_still_to_say_their_shape_is_one_of_training():
    from genai.cli.door import check_training

    cfg = genai.compose(["model=seq2seq"])
    cfg.data.n = 200
    assert check_training(cfg).data.n == 200 and cfg.data.shape is None


def test_composing_leaves_a_notebooks_own_hydra_as_it_is():
    with initialize_config_dir(str(ROOT / "conf" / "optim"), version_base="1.3"):
        own = GlobalHydra.instance().hydra
        genai.compose(["model=ddpm_mlp"])
        with contextlib.suppress(UserError):
            genai.compose(["max_step=3"])
        assert GlobalHydra.instance().hydra is own is not None
    assert not GlobalHydra.instance().is_initialized()


def state_of_the_process():
    logger = logging.getLogger("lightning.pytorch")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    wandb = getattr(sys.modules.get("wandb"), "run", None)
    random = torch.get_rng_state().tolist()
    hydra = GlobalHydra.instance().hydra
    return handlers, logger.level, [*warnings.filters], hydra, wandb, sys.excepthook, os.getcwd(), random


def test_training_twice_in_one_process_gives_the_same_run_and_leaves_nothing_behind(trained, tmp_path):
    before = state_of_the_process()
    cfg = genai.compose([*TINY, "logger=wandb", f"run_dir={tmp_path / 'second'}"])
    same = OmegaConf.to_yaml(cfg)
    second = genai.train(cfg)
    assert second == tmp_path / "second"
    assert OmegaConf.to_yaml(cfg) == same
    assert state_of_the_process() == before
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["ema"] for run in (trained, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    more = genai.train([f"resume={second}", "max_steps=6"])
    assert more == second
    assert genai.load(second).step == 6


class Interrupting(L.Callback):
    def on_train_batch_end(self, *_):
        raise KeyboardInterrupt


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor() as pool:
        run = pool.submit(genai.train, [*TINY, f"run_dir={tmp_path / 'run'}"]).result()
    assert genai.load(run).step == 5


def test_a_callback_may_interrupt_and_must_be_one(tmp_path):
    def node(name):
        return f"+callbacks.own={{_target_: {name}}}"

    with pytest.raises(KeyboardInterrupt):
        genai.train([*TINY, node("tests.test_door.Interrupting"), f"run_dir={tmp_path / 'one'}"])
    with pytest.raises(UserError, match=r"callbacks.own._target_=collections.Counter is not a subclass"):
        genai.train([*TINY, node("collections.Counter"), f"run_dir={tmp_path / 'two'}"])
    assert not (tmp_path / "two").exists()


def test_what_stops_training_is_an_exception(tmp_path):
    before = state_of_the_process()
    diverges = ["optim.lr=1000", "optim.weight_decay=1", "optim.warmup_steps=0", "clip_norm=null"]
    cfg = genai.compose([*TINY, *diverges, "logger=none", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="was not finite at step"):
        genai.train(cfg)
    cfg.max_steps = 0
    with pytest.raises(UserError, match="max_steps=0 must be"):
        genai.train(cfg)
    with pytest.raises(UserError, match=r"trainer\.devices=2 starts processes, which a call from Python cannot"):
        genai.train(["trainer.devices=2", "trainer.accelerator=cpu"])
    with pytest.raises(UserError, match="makes a model of a checkpoint: choose another optim"):
        genai.train(["optim._target_=genai.checkpoint.pretrained", *TINY, "logger=none", f"run_dir={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="not a config of training"):
        genai.train(genai.compose(config="evaluate"))
    assert state_of_the_process() == before


def test_ctrl_c_saves_the_run_and_is_an_exception(tmp_path):
    script = (
        "import os, signal, genai\n"
        "from genai.train.lit import LitModel\n"
        "step = LitModel.finish_step\n"
        "def finish(self, number, lr):\n"
        "    step(self, number, lr)\n"
        "    number == 1 and os.kill(os.getpid(), signal.SIGINT)\n"
        "LitModel.finish_step = finish\n"
        "try:\n"
        f"    genai.train([*{TINY}, 'run_dir={tmp_path / 'run'}'])\n"
        "except KeyboardInterrupt:\n"
        "    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        f"    print('caught', genai.load('{tmp_path / 'run'}').step)\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert "caught 2" in done.stdout, done.stdout + done.stderr


class Stops(Exception):
    pass


@pytest.mark.parametrize("error", [ZeroDivisionError, Stops, UserError])
def test_an_error_of_the_callers_own_callback_is_passed_on(trained, error):
    def on_step(i, n, state):
        raise error("mine")

    with pytest.raises(error, match=r"^mine$"):
        genai.sample(genai.load(trained), n=2, on_step=on_step)


X = torch.zeros(1, 1, 8, 8)
WRONG_SAMPLES = {
    "on_step must be a function on_step(step, steps, state), got 3": {"on_step": 3},
    "guidance='2' must be a number": {"guidance": "2"},
    "guidance=[2] must be a number": {"guidance": [2]},
    "guidance=-1 must be a number": {"guidance": -1},
    "guidance=1000000000.0 must be a number": {"guidance": 1e9},
    "guidance=True must be a number": {"guidance": True},
    "guidance=a value of type Sequential must be": {"guidance": torch.nn.Sequential(torch.nn.Linear(1, 1))},
    "strength=2 must be a number": {"strength": 2, "image": X},
    "autoguidance=3 must be a path": {"autoguidance": 3},
    "image must be a file, a folder or a tensor, got a value of type ndarray": {"image": X.numpy()},
    "image must be a file, a folder or a tensor, got 3": {"image": 3},
    "image must be a file, a folder or a tensor, got ['a.png']": {"image": ["a.png"]},
    "image must be a file, a folder or a tensor, got ''": {"image": ""},
    "image is a tensor of shape [0, 1, 8, 8], without values": {"image": X[:0]},
    "image must be floats (n, C, H, W) in [-1, 1], got torch.float32 [1, 8, 8]": {"image": X[0]},
    "image is not finite": {"image": X / 0},
    "image must be floats (n, C, H, W) in [-1, 1], got torch.uint8": {"image": X.byte()},
    "image must be in [-1, 1], got values from 0 to 255": {"image": torch.linspace(0, 255, 64).view(1, 1, 8, 8)},
    "mask must be a file, a folder or a tensor, got 3": {"image": X, "mask": 3},
    "mask must be in [0, 1], got values from -1 to -1": {"image": X, "mask": X[0] - 1},
    "mask is not finite": {"image": X, "mask": X[0] / 0},
    "mask has shape [2, 4, 4], but the image has": {"image": X, "mask": X[0, 0, :4, :4]},
    "label= has 3 values for n=2 samples": {"label": [1, 2, 3]},
    "sampler.steps='2' must be": {"steps": "2", "strength": None},
    "mask holds 2 masks for n=3 samples": {"n": 3, "image": X, "mask": torch.zeros(2, 1, 8, 8)},
    "n='2' must be a whole number": {"n": "2"},
}


@pytest.mark.parametrize("message", WRONG_SAMPLES)
def test_a_wrong_argument_of_sample_is_named(trained, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        genai.sample(genai.load(trained), **{"n": 2, "steps": 2, "strength": 0.5, **WRONG_SAMPLES[message]})


def test_numbers_of_numpy_and_paths_are_arguments_of_sample(trained):
    loaded = genai.load(trained, device=torch.device("cpu"))
    plain = genai.sample(loaded, n=2, seed=3, steps=2, guidance=2.0, autoguidance=str(trained))
    ours = genai.sample(
        loaded, np.int64(2), np.int64(3), steps=np.int64(2), guidance=np.float32(2), autoguidance=trained
    )
    assert torch.equal(plain["image"], ours["image"])
    for key in "n", "repeats", "seed", "batch_size":
        with pytest.raises(UserError, match=f"{key}='2' must be a whole number"):
            genai.evaluate(loaded, **{key: "2"})
    assert genai.evaluate(loaded, n=np.int64(16), split="val", repeats=np.int64(1))["n"] == 16
    assert genai.sample(loaded, n=1, steps=2, guidance=2.0, guidance_interval=(0.1, None))["image"].shape == (
        1,
        1,
        8,
        8,
    )
    mask = torch.zeros(1, 8, 8)
    given = {"n": 2, "image": X, "strength": 0.5}
    assert torch.equal(
        genai.sample(loaded, mask=mask, **given)["image"], genai.sample(loaded, mask=mask.bool(), **given)["image"]
    )


def test_what_is_no_run_is_named_by_its_type(trained):
    loaded = genai.load(trained)
    wrong = {
        "ckpt must be a run or a checkpoint, got a value of type Loaded": lambda: genai.load(loaded),
        "ckpt= is empty": lambda: genai.load(""),
        "loaded must be a loaded model, got a value of type DDPM": lambda: genai.sample(loaded.model),
        "a value of type DDPM is not a loaded model": lambda: genai.evaluate(loaded.model),
    }
    for message, call in wrong.items():
        with pytest.raises(UserError, match=f"^{message}") as refused:
            call()
        assert len(str(refused.value)) < 200


def test_loading_sampling_and_measuring_leave_the_callers_random_state(trained):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = genai.load(trained)
    assert torch.equal(torch.get_rng_state(), before)
    genai.sample(loaded, n=1, steps=2, guidance=2.0, autoguidance=trained)
    assert torch.equal(torch.get_rng_state(), before)
    genai.evaluate(loaded, metrics=["frechet"], n=16, repeats=1, split="val")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("metrics", [[3], [None], 3, [], {}, {"frechet": None}, [{}], [""]])
def test_metrics_that_are_no_names_are_refused(trained, metrics):
    with pytest.raises(UserError, match=f"^metrics={re.escape(str(metrics))} must be a name"):
        genai.evaluate(genai.load(trained), metrics=metrics)


def test_figures_from_python_are_those_of_the_command(tmp_path):
    from genai.evaluation.metrics import PSNR, Frechet
    from genai.evaluation.run import run

    settings = {"metrics": ["frechet"], "n": 16, "repeats": 2, "split": "val"}
    given = ["metrics=[frechet]", "n=16", "repeats=2", "split=val"]
    toy = genai.train(["experiment=ddpm_toy2d", "debug=true", "sampler.steps=2", f"run_dir={tmp_path / 'toy'}"])
    loaded = genai.load(toy)
    figures = genai.evaluate(loaded, **settings)
    theirs = run(compose_config("evaluate", [f"ckpt={toy}", *given]))
    assert figures["cards"] == theirs["cards"]
    assert figures["frechet"] == theirs["cards"][0]["value"]
    own = genai.evaluate(loaded, **{**settings, "metrics": [{"mine": Frechet()}]})
    assert own["mine"] == figures["frechet"]
    wrong = {
        "split=tets must be one of": {"split": "tets"},
        "n=0 must be": {"n": 0},
        "'x' is not a loaded model": {"loaded": "x"},
        "extractor=jduge must be one of": {"extractor": "jduge"},
        "is not available for this model": {"metrics": [{"mine": PSNR()}]},
    }
    for message, change in wrong.items():
        with pytest.raises(UserError, match=message):
            genai.evaluate(**{"loaded": loaded, **settings, **change})


def test_the_likelihood_from_python_is_that_of_the_command(tmp_path):
    run_dir = genai.train(["model=vae", "debug=true", "logger=none", f"run_dir={tmp_path / 'vae'}"])
    from genai.evaluation.run import run

    figures = genai.evaluate(genai.load(run_dir, weights="raw"), n=20)
    theirs = run(compose_config("evaluate", [f"ckpt={run_dir}", "n=20", "weights=raw"]))
    clock = {key for key in theirs if "second" in key or "memory" in key}
    assert {key: figures[key] for key in theirs if key not in clock} == {
        key: value for key, value in theirs.items() if key not in clock
    }
    assert figures["weights"] == "raw"
