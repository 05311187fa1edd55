"""The package from Python: compose, train, load, sample, evaluate, several times in one process."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import lightning as L
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
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
