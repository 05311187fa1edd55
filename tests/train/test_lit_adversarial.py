"""The adversarial loop: rounds are steps, each network learns from its own loss, and a resumed run forgets nothing."""

import functools

import lightning as L
import pytest
import torch
from torch import nn

from genai import checkpoint
from genai.core.errors import UserError
from genai.core.protocols import AdversarialModel, Losses
from genai.losses.adversarial import logistic, non_saturating
from genai.modalities.image import Image
from genai.modalities.stored import nodes_of
from genai.train.callbacks import Evaluate, File, Save
from genai.train.ema import EMA
from genai.train.gradients import ParameterGroup
from genai.train.lit_adversarial import LitAdversarial, frozen
from genai.train.optim import adamw
from genai.train.record import Record
from tests.conftest import CONFIG
from tests.train.test_train import Masked, data, flat, ranks


class TinyGAN(nn.Module):
    """Fakes are a function of the batch, so that how it is cut into micro-batches and ranks changes nothing; notes who is asked
    for what. NaN in one network's gradient at a step."""

    images_per_step = 0

    def __init__(self, share_fake=True, nan=None):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.register_buffer("rounds", torch.zeros(()))
        self.share_fake, self.nan, self.asked, self.seen = share_fake, nan, [], []

    def nets(self):
        return {"generator": self.generator, "discriminator": self.discriminator}

    def generator_parameters(self):
        return self.generator.named_parameters("generator")

    def discriminator_parameters(self):
        return self.discriminator.named_parameters("discriminator")

    def generate(self, batch, step):
        self.asked.append(("generate", step, torch.is_grad_enabled()))
        self.seen.append((batch["vector"].clone(), torch.rand(2)))
        return {"fake": self.generator(batch["vector"][:, :3])}

    def discriminator_loss(self, batch, fake, step):
        self.asked.append(("discriminator", step, fake["fake"].requires_grad))
        total = logistic(self.discriminator(batch["vector"]), self.discriminator(fake["fake"])).mean()
        return self.losses(total, "discriminator", step, len(fake["fake"]))

    def generator_loss(self, batch, fake, step):
        trained = [p.requires_grad for p in self.discriminator.parameters()]
        self.asked.append(("generator", step, any(trained)))
        if self.training:
            self.rounds += 1
        return self.losses(
            non_saturating(self.discriminator(fake["fake"])).mean(), "generator", step, len(fake["fake"])
        )

    def losses(self, total, who, step, n):
        if self.nan == (who, step):
            total = total + (getattr(self, who)[2].bias * torch.nan).sum()
        return Losses(total, float(n), {f"{who}_seen": (total.detach(), float(n))})


def train(folder, model=None, steps=6, critic_steps=1, accumulate=1, batch_size=8, callbacks=(), **arguments):
    folder.mkdir(exist_ok=True)
    record = Record(folder)
    record.cut(None)
    optim = functools.partial(adamw, lr=0.02, betas=(0.0, 0.9))
    lit = LitAdversarial(
        model or TinyGAN(),
        data(batch_size=batch_size),
        optim,
        functools.partial(EMA, decay=0.9),
        record,
        discriminator_optim=functools.partial(adamw, lr=0.03, betas=(0.0, 0.9)),
        critic_steps=critic_steps,
        accumulate=accumulate,
        log_every_steps=2,
    )
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="64-true",
        plugins=[File(CONFIG, nodes_of(Image(), {}))],
        callbacks=list(callbacks),
        use_distributed_sampler=False,
    )
    trainer.fit(lit, **arguments)
    return lit


@pytest.mark.parametrize("share_fake", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("critic_steps", [1, 5])
def test_max_steps_is_that_many_rounds(tmp_path, critic_steps, accumulate, share_fake):
    lit = train(tmp_path / "run", TinyGAN(share_fake), 4, critic_steps, accumulate, batch_size=2)
    model = lit.model
    assert isinstance(model, AdversarialModel)
    assert lit.trainer.global_step == 4 and lit.ema.updates == 4 and model.rounds == 4 * accumulate
    assert model.images_per_step == 2 * accumulate
    generator, discriminator = (o.optimizer for o in lit.optimizers())
    steps = [int(next(iter(o.state.values()))["step"]) for o in (generator, discriminator)]
    assert steps == [4, 4 * critic_steps]
    one = [(who, flag) for who, step, flag in model.asked if step == 2]
    made = [flag for who, flag in one if who == "generate"]
    turns = critic_steps * accumulate
    if share_fake:  # only what the generator learns from keeps what its gradient needs
        assert made == [False] * (turns - accumulate) + [True] * accumulate
    else:
        assert made == [False] * turns + [True] * accumulate
    assert [flag for who, flag in one if who == "discriminator"] == [False] * turns
    assert [flag for who, flag in one if who == "generator"] == [False] * accumulate


def test_a_round_is_a_step_of_each_by_hand(tmp_path):
    lit = train(tmp_path / "run", steps=5)
    twin = TinyGAN()
    optims = [
        torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.0, 0.9), weight_decay=0.0)
        for net, lr in ((twin.generator, 0.02), (twin.discriminator, 0.03))
    ]
    averaged = [p.detach().clone() for p in twin.generator.parameters()]
    for k in range(5):
        batch = {"vector": lit.model.seen[k][0]}
        fake = twin.generate(batch, k)
        held = {"fake": fake["fake"].detach()}
        for optim, loss in zip(optims[::-1], (twin.discriminator_loss, twin.generator_loss), strict=True):
            given = held if optim is optims[1] else fake
            optim.zero_grad()
            loss(batch, given, k).total.backward()
            optim.step()
        decay = min(0.9, 1 - (k + 2) ** -0.75)
        for mine, p in zip(averaged, twin.generator.parameters(), strict=True):
            mine.lerp_(p.detach(), 1 - decay)
    assert (flat(lit.model) - flat(twin)).abs().max() < 1e-10
    assert all(torch.allclose(a, b) for a, b in zip(averaged, lit.ema.module.generator.parameters(), strict=True))


def test_accumulation_of_four_equals_one_batch_of_four_parts(tmp_path):
    for critic_steps in (1, 2):
        one = train(tmp_path / "one", critic_steps=critic_steps, batch_size=32)
        four = train(tmp_path / "four", critic_steps=critic_steps, batch_size=8, accumulate=4)
        assert (flat(one.model) - flat(four.model)).abs().max() < 1e-10


def test_the_average_is_of_the_generator_with_its_buffers(tmp_path):
    lit = train(tmp_path / "run", callbacks=[Save(3)])
    average = lit.ema.module
    assert torch.equal(average.rounds, lit.model.rounds) and average.rounds == 6
    for mine, live in zip(average.discriminator.parameters(), lit.model.discriminator.parameters(), strict=True):
        assert mine is live and live.requires_grad
    assert not torch.equal(flat(average.generator), flat(lit.model.generator))
    content = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert set(content["ema"]) == {name for name, _ in lit.model.generator_parameters()}
    assert len(content["trainer"]["optimizer_states"]) == 2


def test_both_networks_are_logged_and_evaluated(tmp_path):
    lit = train(tmp_path / "run", callbacks=[Evaluate(3), Save(3)])
    rows = [line.split(",")[1] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    logged = {
        "loss",
        "discriminator_loss",
        "generator_seen",
        "discriminator_seen",
        "grad_norm",
        "discriminator_grad_norm",
    }
    assert {f"train/{name}" for name in logged} <= set(rows)
    assert {"val/generator_loss", "val/discriminator_loss", "val/generator_seen"} <= set(
        rows
    ) and "val/loss" not in rows
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    assert lit.evaluate() == lit.evaluate()


@pytest.mark.parametrize("who", ["generator", "discriminator"])
def test_nan_in_either_network_stops_training_and_is_named(tmp_path, who):
    model = TinyGAN(nan=(who, 5))
    with pytest.raises(UserError, match=rf"the {who}'s loss was not finite at step 5: .* last good checkpoint is kept"):
        train(tmp_path / "run", model, steps=9, callbacks=[Save(2)])
    content = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert content["step"] == 4 and all(t.isfinite().all() for t in content["model"].values())
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_resumed_equals_uninterrupted(tmp_path, critic_steps):
    whole = train(tmp_path / "whole", steps=6, critic_steps=critic_steps)
    train(tmp_path / "part", steps=3, critic_steps=critic_steps, callbacks=[Save(3)])
    again = train(
        tmp_path / "part", steps=6, critic_steps=critic_steps, ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt"
    )
    assert torch.equal(flat(whole.model), flat(again.model)) and torch.equal(whole.model.rounds, again.model.rounds)
    assert torch.equal(flat(whole.ema.module), flat(again.ema.module))
    draws = [torch.stack([u for _, u in lit.model.seen[-critic_steps:]]) for lit in (whole, again)]
    assert torch.equal(*draws)


def test_the_loop_needs_an_adversarial_model(tmp_path):
    with pytest.raises(UserError, match="must train an AdversarialModel, got Masked"):
        train(tmp_path / "run", Masked())


TWO_RANKS = """
import functools, sys, torch, lightning as L
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from pathlib import Path
from tests.train.test_lit_adversarial import TinyGAN, LitAdversarial, EMA, Record, adamw, data
devices, batch, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
folder.mkdir(exist_ok=True)
optim = functools.partial(adamw, lr=0.02, betas=(0.0, 0.9))
lit = LitAdversarial(TinyGAN(), data(batch_size=batch), optim, functools.partial(EMA, decay=0.9), Record(folder, writes=False),
                     discriminator_optim=optim, critic_steps=2, accumulate=2)
trainer = L.Trainer(max_steps=8, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
                    enable_progress_bar=False, enable_model_summary=False, devices=devices, precision="64-true",
                    strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False)
trainer.fit(lit)
assert lit.model.images_per_step == 16
torch.save({{"model": lit.model.state_dict(), "ema": lit.ema.state_dict()}}, folder / f"{{trainer.global_rank}}.pt")
"""


@pytest.mark.slow
def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path):
    ranks(tmp_path, TWO_RANKS, 1e-8)


def test_what_is_frozen_for_an_update_learns_again_after_a_loss_that_raises():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="of the loss"), frozen(ParameterGroup(net.named_parameters(), "")):
        assert not any(p.requires_grad for p in net.parameters())
        raise ValueError("of the loss")
    assert all(p.requires_grad for p in net.parameters())
