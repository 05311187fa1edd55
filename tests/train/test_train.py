"""The loop: accumulation, clipping, the average, the guard, the learning rate, two ranks."""

import functools
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from genai import checkpoint
from genai.checkpoint.build import build_typed
from genai.cli import compose_config, prepare_training
from genai.core.errors import UserError
from genai.core.protocols import Losses
from genai.data.base import Arrays, Data
from genai.modalities.image import Image
from genai.modalities.stored import nodes_of
from genai.train.callbacks import File, Save
from genai.train.ema import EMA, decay_at
from genai.train.gradients import ParameterGroup
from genai.train.lit import LitModel
from genai.train.optim import adamw, lr_at
from genai.train.record import Record
from genai.train.run import run
from tests.conftest import CONFIG, ROOT


def data(n=64, batch_size=8, dtype=np.float64):
    values = np.random.default_rng(0).normal(size=(n, 6)).astype(dtype)
    split = Arrays("vector", values, None)
    return Data(
        field="vector",
        shape=None,
        classes=None,
        levels=None,
        batch_size=batch_size,
        num_workers=0,
        splits={"train": split, "val": split},
        found_shape=[6],
        class_names=None,
        found_levels=None,
    )


class Masked(nn.Module):
    """A regression whose targets are masked unevenly: some samples have five, some none. NaN at step `nan_at`."""

    def __init__(self, nan_at=None, draws=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()
        self.register_buffer("constant", torch.rand(3))
        self.nan_at, self.draws = nan_at, draws

    def nets(self):
        return {"net": self.net}

    def forward(self, batch, step):
        x, many = batch["vector"][:, :5], batch["vector"][:, 5]
        mask = torch.arange(5) < (many * 3).round()[:, None]
        error = (self.net(x) - x.flip(1)) ** 2
        if self.draws:
            error = error * torch.rand(len(x))[:, None]
        weight = mask.sum()
        total = (error * mask).sum() / weight.clamp_min(1)
        if step == self.nan_at:
            total = total + (self.net[2].bias * torch.nan).sum()
        return Losses(total, weight, {"error": (error.mean().detach(), 1.0)})


def fit(
    folder,
    model=None,
    steps=10,
    callbacks=(),
    optim=None,
    accumulate=1,
    batch_size=8,
    clip_norm=1.0,
    dtype=np.float64,
    **trainer,
):
    folder.mkdir(exist_ok=True)
    record = Record(folder)
    record.cut(None)
    model = model or Masked()
    if dtype == np.float32:
        model.net.float()
    optim = optim or functools.partial(adamw, lr=0.01)
    lit = LitModel(
        model,
        data(batch_size=batch_size, dtype=dtype),
        optim,
        functools.partial(EMA, decay=0.9),
        record,
        accumulate=accumulate,
        clip_norm=clip_norm,
        log_every_steps=2,
    )
    arguments = {
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "devices": 1,
        "precision": "64-true",
        "plugins": [File(CONFIG, nodes_of(Image(), {}))],
        "use_distributed_sampler": False,
        **trainer,
    }
    L.Trainer(callbacks=list(callbacks), **arguments).fit(lit)
    return lit


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_accumulation_of_unequal_masks_equals_one_batch(tmp_path):
    one = fit(tmp_path / "one", batch_size=32, accumulate=1)
    four = fit(tmp_path / "four", batch_size=8, accumulate=4)
    assert (flat(one.model) - flat(four.model)).abs().max() < 1e-10
    assert (flat(one.ema.module) - flat(four.ema.module)).abs().max() < 1e-10
    assert four.ema.updates == 10
    assert four.trainer.global_step == 10
    assert (flat(one.model) - flat(Masked())).abs().max() > 0.01


class Norms(L.Callback):
    """Compares each step's gradients with what clip_grad_norm_ makes of the same."""

    def __init__(self, clip_norm):
        self.clip_norm, self.seen = clip_norm, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        got = [p.grad.clone() for p in pl_module.model.parameters()]
        self.seen.append(torch.stack([g.norm() for g in got]).norm().item())


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_clipping_is_clip_grad_norm(tmp_path, precision, monkeypatch):
    """20 steps with fused AdamW; the norm before and after equal those of torch's own function."""
    checked, original = [], ParameterGroup.clip

    def compare(self, losses, clip_norm, step):
        live = [p for _, p in self.named_parameters]
        twin = [torch.nn.Parameter(p.detach().clone()) for p in live]
        for mine, p in zip(twin, live, strict=True):
            mine.grad = p.grad.clone()
        expected = nn.utils.clip_grad_norm_(twin, 0.05)
        norm, bad = original(self, losses, clip_norm, step)
        assert torch.allclose(norm, expected.to(norm), rtol=1e-6)
        assert all(torch.allclose(p.grad, t.grad, rtol=1e-5) for p, t in zip(live, twin, strict=True))
        checked.append(expected.item())
        return norm, bad

    monkeypatch.setattr(ParameterGroup, "clip", compare)
    dtype = np.float64 if precision == "64-true" else np.float32
    lit = fit(tmp_path / "run", steps=20, clip_norm=0.05, precision=precision, dtype=dtype)
    assert len(checked) == 20
    assert max(checked) > 0.05  # it did clip
    assert lit.optimizers().optimizer.defaults["fused"]


def test_step_draws_do_not_depend_on_what_happened_before(tmp_path):
    """Random numbers in the model come from (seed, rank, step, micro-batch), so extra draws elsewhere change nothing."""

    class Draw(L.Callback):
        def on_train_batch_end(self, *_):
            torch.rand(7)

    a = fit(tmp_path / "a", Masked(draws=True))
    b = fit(tmp_path / "b", Masked(draws=True), callbacks=[Draw()])
    assert torch.equal(flat(a.model), flat(b.model))


def test_metrics_are_weighted_means_over_their_steps(tmp_path):
    seen = []

    class Spy(Masked):
        def forward(self, batch, step):
            losses = super().forward(batch, step)
            if self.training:
                seen.append((losses.total.item(), losses.weight.item()))
            return losses

    fit(tmp_path / "run", Spy(), steps=4, accumulate=2)
    lines = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    got = {int(step): float(value) for step, name, value in lines if name == "train/loss"}
    for step in (2, 4):
        part = seen[(step - 2) * 2 : step * 2]
        assert got[step] == pytest.approx(sum(t * w for t, w in part) / sum(w for _, w in part), rel=1e-9)
    assert {name for _, name, _ in lines} == {"train/loss", "train/error", "train/grad_norm", "train/lr"}


@pytest.mark.parametrize("make", [functools.partial(adamw, lr=0.01), lambda m: torch.optim.SGD(m.parameters(), 0.01)])
def test_a_bad_step_is_skipped_named_and_stops_the_run(tmp_path, make):
    """Fused AdamW skips on the device and the next logging step reads it; an optimiser that cannot stops at once."""
    good = fit(tmp_path / "good", steps=5, optim=make, callbacks=[Save(1)])
    with pytest.raises(UserError, match=r"the loss was not finite at step 5.*last good checkpoint is kept"):
        fit(tmp_path / "bad", Masked(nan_at=5), steps=20, optim=make, callbacks=[Save(5)])
    kept = checkpoint.read(tmp_path / "bad" / "checkpoints" / "last.ckpt")
    assert kept["step"] == 5
    assert all(torch.equal(kept["model"][k], v) for k, v in good.model.state_dict().items())


def test_the_guard_names_the_tensor(tmp_path):
    class OneBadGradient(Masked):
        def forward(self, batch, step):
            losses = super().forward(batch, step)
            if step == 3:
                self.net[0].weight.register_hook(lambda g: g * torch.inf)
            return losses

    with pytest.raises(UserError, match=r"the gradient of net\.0\.weight was not finite at step 3"):
        fit(tmp_path / "run", OneBadGradient(), steps=20)


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    content = {"model": {"w": torch.tensor([1.0, torch.inf])}, "ema": {}, "step": 1}
    with pytest.raises(UserError, match="model weight w is not finite"):
        checkpoint.save(content, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


# The average


def test_the_average_is_live_until_its_first_update_and_then_the_formula():
    model = Masked()
    ema = EMA(model, decay=0.9, power=None)
    assert torch.equal(flat(ema.module), flat(model))
    assert ema.distance() == 0
    first = flat(model).clone()
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update()
    assert torch.allclose(flat(ema.module), 0.9 * first + 0.1 * flat(model))
    assert ema.distance().item() == pytest.approx((flat(ema.module) - flat(model)).norm().item())
    model.constant += 5
    ema.update()
    assert torch.equal(ema.module.constant, model.constant)
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_an_average_without_decay_is_the_live_weights():
    model = Masked()
    ema = EMA(model, decay=0)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update()
    assert torch.equal(flat(ema.module), flat(model))
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_decay_warms_up_by_a_power():
    assert decay_at(1, 0.999, 0.75) == pytest.approx(1 - 2**-0.75)
    assert decay_at(10**9, 0.999, 0.75) == 0.999
    assert decay_at(1, 0.999, None) == 0.999
    mean, value = 0.0, 0.0
    for n in range(1, 50):  # power 1: with the start, an equal mean of all weights
        value += 1
        mean += (1 - decay_at(n, 1.0, 1.0)) * (value - mean)
    assert mean == pytest.approx(49 / 2)


def test_decay_warms_up_by_a_half_life_that_grows():
    """Karras et al. (2020): after N images 0.5^(batch / min(half-life, 0.05 N))."""
    for n in (1, 2, 21, 1000, 156_250, 156_251, 10**6):
        expected = 0.5 ** (64 / max(min(500_000, 0.05 * 64 * (n - 1)), 1e-8))
        assert decay_at(n, 0.5 ** (64 / 500_000), None, ramp=0.05) == pytest.approx(expected, abs=1e-12)
    assert decay_at(41, 0.9, 0.1, ramp=0.05) == 1 - 42**-0.1  # the least of the three
    model = Masked()
    ema = EMA(model, decay=0.9, power=None, ramp=0.05)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update()
    assert torch.equal(flat(ema.module), flat(model))


def test_frozen_parameters_are_not_averaged():
    model = Masked()
    model.net[0].requires_grad_(False)
    assert set(EMA(model).state_dict()) == {"net.2.weight", "net.2.bias"}


# The learning rate


def test_learning_rate_warms_up_decays_and_stays_on_its_floor():
    arguments = {"lr_max": 1.0, "lr_min": 0.1, "warmup_steps": 10, "decay_steps": 110}
    assert lr_at(0, **arguments) == 0.1
    assert lr_at(9, **arguments) == 1.0
    assert lr_at(60, **arguments) == pytest.approx(0.55)
    assert lr_at(110, **arguments) == pytest.approx(0.1)
    assert lr_at(10**6, **arguments) == pytest.approx(0.1)
    assert lr_at(10**6, 1.0, 0.1, 10, None) == 1.0


def test_weight_decay_is_for_matrices_only():
    groups = adamw(Masked(), lr=0.1, weight_decay=0.3).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.3), (2, 0.0)]


def test_compiled_networks_leave_no_trace_in_keys():
    """aot_eager takes the same path through nn.Module.compile as the default backend, in seconds."""
    model = Masked()
    names = list(model.state_dict())
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for net in model.nets().values():
        net.compile(backend=backend)
    ema = EMA(Masked())
    x = {"vector": torch.randn(4, 6, dtype=torch.float64)}
    assert torch.allclose(model(x, 0).total, Masked()(x, 0).total)
    assert len(compiled) > 0
    assert list(model.state_dict()) == names
    assert set(ema.state_dict()) <= set(names)


# Two ranks

TWO_RANKS = """
import functools, sys, torch, lightning as L
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from pathlib import Path
from tests.train.test_train import Masked, data, LitModel, EMA, Record, adamw, File
devices, batch, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
folder.mkdir(exist_ok=True)

class Spy(Masked):
    seen = []
    def forward(self, batch, step):
        Spy.seen.append((batch["vector"].clone(), torch.rand(3)))  # what the model sees, what it would draw
        return super().forward(batch, step)

record = Record(folder, writes=False)
lit = LitModel(Spy(), data(batch_size=batch), functools.partial(adamw, lr=0.01), functools.partial(EMA, decay=0.9), record,
               accumulate=2)
trainer = L.Trainer(max_steps=20, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu",
                    enable_progress_bar=False, enable_model_summary=False, devices=devices, precision="64-true",
                    strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False)
trainer.fit(lit)
state = {{"model": lit.model.state_dict(), "ema": lit.ema.state_dict(), "seen": Spy.seen}}
torch.save(state, folder / f"{{trainer.global_rank}}.pt")
"""


def ranks(tmp_path, text, most):
    """Run a script as two ranks and as one with the doubled batch; their weights agree to `most`. What each saved."""
    script = tmp_path / "ranks.py"
    script.write_text(text.format(root=str(ROOT)))
    for devices, batch, name in ((2, 4, "two"), (1, 8, "one")):
        command = [sys.executable, str(script), str(devices), str(batch), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1))
    one = torch.load(tmp_path / "one" / "0.pt")
    for part in ("model", "ema"):
        for name, value in one[part].items():
            assert torch.equal(first[part][name], second[part][name])
            assert (first[part][name] - value).abs().max() < most
    return first, second, one


@pytest.mark.slow
def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path):
    first, second, one = ranks(tmp_path, TWO_RANKS, 1e-5)
    assert len(one["seen"]) == 40
    for (a, noise_a), (b, noise_b), (whole, _) in zip(first["seen"], second["seen"], one["seen"], strict=True):
        assert torch.equal(torch.cat([a, b]), whole)  # positions partition the stream
        assert not torch.equal(noise_a, noise_b)  # ranks draw different noise


@pytest.mark.slow
def test_two_ranks_through_the_command_line(tmp_path, command):
    """One rank has nothing to evaluate, only the first writes, and the run resumes."""
    from tests.checkpoint.test_checkpoint import DEBUG

    devices = ["trainer.devices=2", "trainer.accelerator=cpu"]
    done = command("train.py", *DEBUG, *devices, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    done = command("train.py", f"resume={tmp_path / 'run'}", "max_steps=7")
    assert done.returncode == 0, done.stderr[-3000:]
    assert checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["step"] == 7
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines if ",train/loss," in line] == [str(i) for i in range(1, 8)]


def test_what_a_model_measures_of_its_arguments_stands_in_the_runs_config(tmp_path):
    """And is not measured again, by a checkpoint that samples or by a run that goes on."""
    small = [
        "data.num_workers=0",
        "model.net.channels=8",
        "callbacks.samples=null",
        "callbacks.evaluate=null",
        "logger=none",
    ]
    folder = run(
        compose_config(
            "train", ["model=edm", "data=digits", "max_steps=1", f"run_dir={tmp_path}", *small], prepare_training
        )
    )
    measured = OmegaConf.load(folder / "config.yaml").model.sigma_data
    images = build_typed(OmegaConf.to_container(compose_config("train", ["data=digits"]).data, resolve=True)).splits[
        "train"
    ]
    whole = images.batch(torch.arange(len(images)), None)["image"].double()
    assert measured == round(whole.std(correction=0).item(), 4)
    loaded = checkpoint.load(folder)
    assert loaded.config["model"]["sigma_data"] == loaded.model.sigma_data == measured
