"""A new run takes the architecture of the run that it starts from, unless the command line says otherwise."""

import os
import re

import pytest
import torch
import yaml

from genai import checkpoint
from genai.cli import compose_config, prepare_training
from genai.core.errors import UserError
from genai.train.run import run

SMALL = [
    "logger=none",
    "max_steps=2",
    "data.batch_size=4",
    "callbacks.evaluate.n=4",
    "callbacks.samples.n=2",
    "trainer.accelerator=cpu",
]
NET = ["model.net.channels=8", "model.net.multipliers=[1]", "model.schedule.steps=10", "sampler.steps=2"]


def train(folder, *given):
    return run(compose_config("train", [*SMALL, f"run_dir={folder}", *map(str, given)], prepare_training))


def config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def same_start(first, second):
    """The second run's weights at step 0 are the averaged ones of the first, so far as two steps at a rate of 0 show."""
    old, new = (checkpoint.load(folder).model.state_dict() for folder in (first, second))
    assert old.keys() == new.keys()
    return all(torch.allclose(old[name].float(), new[name].float(), atol=1e-5) for name in old)


FROZEN = ["optim.lr=1e-12", "optim.lr_min=0"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return train(tmp_path_factory.mktemp("init") / "digits", "optim.lr=1e-3", "seed=3", *NET)


def test_a_diffusion_model_keeps_its_network_and_its_sampler(digits, tmp_path, capsys):
    again = train(tmp_path / "again", f"init_from={digits}", *FROZEN)
    assert config(again)["model"] == config(digits)["model"] and config(again)["sampler"]["steps"] == 2
    assert config(again)["optim"]["lr"] == 1e-12 and config(again)["seed"] == 0
    assert same_start(digits, again)
    assert f"weights from the average in {digits}" in (said := capsys.readouterr().out)
    assert "also as there: model, loop, sampler, data\n" in said


def test_skipped_weights_are_counted_and_a_few_layers_named(digits, tmp_path, capsys):
    train(tmp_path / "again", f"init_from={digits}", "init_strict=false", "model.net.channels=16", *FROZEN)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights from the average")]
    assert (
        re.search(r" but for \d+ of \d+ tensors, in net\..* and \d+ others; also as there: ", said) and len(said) < 500
    )


def test_a_folder_of_runs_or_a_file_names_the_source_too(digits, tmp_path, capsys):
    cfg = compose_config("train", [f"init_from={digits.parent}"], prepare_training)
    assert cfg.init_from == str(digits) and cfg.model.net.channels == 8 and cfg.name == config(digits)["name"]
    assert f"the newest run there is {digits}" in capsys.readouterr().err
    cfg = compose_config("train", [f"init_from={digits / 'checkpoints' / 'last.ckpt'}"], prepare_training)
    assert cfg.model.net.channels == 8
    alone = tmp_path / "alone.ckpt"
    os.link(digits / "checkpoints" / "last.ckpt", alone)
    assert compose_config("train", [f"init_from={alone}"], prepare_training).model.net.channels == 8


def test_a_model_that_is_given_is_not_replaced(digits, tmp_path):
    assert compose_config("train", [f"init_from={digits}", "model=flow"], prepare_training).model._target_.endswith(
        "Flow"
    )
    assert compose_config("train", [f"init_from={digits}", "model=ddpm"], prepare_training).model.net.channels == 32
    with pytest.raises(UserError, match="does not fit this model"):
        train(tmp_path / "wider", f"init_from={digits}", "model.net.channels=16")


def test_a_gpt_keeps_its_tokenizer_and_context_on_another_text(tmp_path):
    (tmp_path / "one.txt").write_text("a first text about cats. " * 200)
    (tmp_path / "two.txt").write_text("another one, on dogs and ducks; " * 200)
    tiny = [
        "model.net.transformer.width=16",
        "model.net.transformer.layers=1",
        "model.net.transformer.attention.heads=2",
    ]
    text = ["data=text_file", f"data.cache={tmp_path / 'cache'}"]
    given = [*text, f"data.path={tmp_path / 'one.txt'}", "data.tokenizer=byte", "data.shape=[24]", "data.val=0.1"]
    first = train(tmp_path / "first", "model=gpt", *given, *tiny)
    second = train(
        tmp_path / "second", f"init_from={first}", *text, f"data.path={tmp_path / 'two.txt'}", "data.val=0.1", *FROZEN
    )
    found = config(second)
    assert (found["data"]["tokenizer"], found["data"]["shape"]) == ("byte", [24])
    assert found["data"]["path"] == str(tmp_path / "two.txt") and found["sampler"] == config(first)["sampler"]
    assert same_start(first, second)


@pytest.mark.slow
def test_a_latent_model_brings_its_first_stage_along(tmp_path):
    """Its weights are in the source, so that the file they once came from may be gone."""
    stage = train(tmp_path / "stage", "experiment=autoencoder_digits")
    given = ["experiment=latent_digits_text", f"codec.ckpt={stage}", "model.net.channels=8", "sampler.steps=2"]
    first = train(tmp_path / "first", *given)
    stage.rename(tmp_path / "gone")
    second = train(tmp_path / "second", f"init_from={first}", "data=digits_text", *FROZEN)
    old, new = (checkpoint.load(folder).model for folder in (first, second))
    for name, tensor in old.latent.codec.state_dict().items():
        assert torch.equal(tensor, new.latent.codec.state_dict()[name]), name
    assert config(second)["codec"]["ckpt"] is None
    assert same_start(first, second)
    other = compose_config(
        "train", [f"init_from={first}", "data=digits_text", f"codec.ckpt={tmp_path / 'gone'}"], prepare_training
    )
    assert other.model.latent.codec.ckpt == str(tmp_path / "gone")


@pytest.mark.slow
def test_a_gan_keeps_both_optimisers(tmp_path):
    first = train(tmp_path / "first", "model=gan", "model.generator.width=16", "model.discriminator.width=16")
    second = train(tmp_path / "second", f"init_from={first}", *FROZEN, "discriminator_optim.lr=1e-12")
    found = config(second)
    assert found["loop"]["_target_"] == config(first)["loop"]["_target_"] and found["clip_norm"] is None
    assert found["loop"]["discriminator_optim"]["lr"] == found["discriminator_optim"]["lr"] == 1e-12
    assert same_start(first, second)


def test_other_data_must_be_named(digits, tmp_path):
    found = config(digits)
    found["data"] = {"_target_": "genai.data.toy2d.Toy2D"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    with pytest.raises(UserError, match=r"was trained on Toy2D, and the default here is Digits: give data="):
        compose_config("train", [f"init_from={tmp_path}"], prepare_training)


@pytest.mark.parametrize("target", ["os.system", "genai.core.files.write_text", "my_lab.nets.Net"])
def test_a_source_builds_only_what_a_file_may(digits, tmp_path, target):
    found = config(digits)
    found["model"]["net"]["_target_"] = target
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    with pytest.raises(UserError, match=f"wants to build {target}"):
        compose_config("train", [f"init_from={tmp_path}"], prepare_training)


def test_a_folder_without_runs_is_said_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"is neither a run directory nor a folder of them"):
        compose_config("train", [f"resume={tmp_path}"], prepare_training)
    with pytest.raises(UserError, match=r"holds no readable checkpoint"):
        compose_config("train", [f"init_from={tmp_path}"], prepare_training)


def test_resume_takes_the_newest_run_of_a_folder(digits, capsys):
    cfg = compose_config("train", [f"resume={digits.parent}", "max_steps=5"], prepare_training)
    assert cfg.resume == str(digits) and cfg.max_steps == 5
    assert "the newest run there is" in capsys.readouterr().err
