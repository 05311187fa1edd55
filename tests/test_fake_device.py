"""GPU paths without a GPU: what is on cuda is fake (a shape, a dtype and a device), what is on the CPU is real.

Every model and experiment trains, evaluates, and samples with every sampler that takes it. A mix of devices raises; each
place where host and device wait for each other is noted, and WAITS lists those that may, and why.
"""

import contextlib
import functools
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves

from genai.checkpoint.build import build_typed
from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import check_sampler, with_items
from genai.kernels import affine_step
from genai.models.autoregressive import decode
from genai.models.diffusion.base import Diffusion
from genai.models.diffusion.sampling import samplers
from genai.train import codec, hardware, run
from genai.train.callbacks import Evaluate
from genai.train.ema import EMA
from genai.train.record import Record
from genai.train.strategy import Ranks
from tests.conftest import ROOT
from tests.test_configs import CASES, config_of, synthetic

GPU = torch.device("cuda", 0)
SAMPLERS = [OmegaConf.to_container(OmegaConf.load(path)) for path in sorted((ROOT / "conf" / "sampler").glob("*.yaml"))]

# (when, where, what waits): a case that shows it, and why it may. "step" is within a training step that is not logged, or within
# a CUDA graph; "call" is the rest of an evaluation, a logging step or a call of a sampler.
SEEDS, GIVEN = "seeds come from the host, once a call", "what is asked for comes from the host, once a call"
ITEMS, BATCHES = "items of the data come from the host, once a call", "batches come from the host"
WAITS: dict[tuple[str, str, str], tuple[str, str]] = {
    ("call", "callbacks.Evaluate.evaluate", "read"): ("model=ddpm_mlp", "how far the average is, once an evaluation"),
    ("call", "lit.LitModel.evaluate", "copy"): ("model=ddpm_mlp", BATCHES),
    ("call", "gradients.NonFiniteGuard.stop_if_bad", "read"): (
        "model=ddpm_mlp",
        "whether all was finite, on logging steps",
    ),
    ("call", "record.Means.read", "read"): (
        "model=ddpm_mlp",
        "all means at once, on logging steps and after evaluations",
    ),
    ("call", "samplers.sample", "copy"): ("model=ddpm_mlp", SEEDS),
    ("call", "samplers.sample", "read"): ("model=ddpm_mlp", "whether samples are finite, once a call"),
    ("call", "vocoder.LogMelCodec.decode", "copy"): (
        "model=audio_diffusion",
        "a constant of torchaudio's Griffin-Lim, once a call",
    ),
    ("call", "vocoder.LogMelCodec.decode", "read"): (
        "model=vqvae_audio",
        "a check of torch's inverse STFT, once a call",
    ),
    ("call", "media.sample", "copy"): ("model=media", GIVEN),
    ("call", "retrieval.retrieve", "copy"): ("model=contrastive", ITEMS),
    ("call", "decode.prompt_of", "copy"): ("model=gpt_nano", GIVEN),
    ("call", "decode.generate", "copy"): ("model=gpt_nano", SEEDS),
    ("call", "decode.Ends.all_within", "read"): (
        "model=gpt_nano",
        "whether all texts have ended, every CHECK_STOP_EVERY tokens",
    ),
    ("call", "sampling.Canvas.of", "copy"): ("model=bert", GIVEN),
    ("call", "sampling.ancestral", "copy"): ("model=mdlm", SEEDS),
    ("call", "beam.beam", "read"): ("model=seq2seq", "whether an open text can win, every CHECK_STOP_EVERY tokens"),
    ("call", "speculative.speculative", "copy"): ("model=gpt_nano", SEEDS),
    ("call", "speculative.speculative", "read"): ("model=gpt_nano", "where texts begin and end, once a call"),
    ("call", "speculative._speculate", "read"): ("model=gpt_nano", "which tokens were kept, once a round"),
    ("call", "maskgit.sample", "copy"): ("model=maskgit", SEEDS),
    ("call", "nets.labels", "copy"): ("model=gan", GIVEN),
    ("call", "gan.GAN.latent", "copy"): ("model=gan", SEEDS),
    ("call", "latents.interpolate", "copy"): ("model=gan", GIVEN),
    ("call", "stylegan2.StyleGAN2.latent", "copy"): ("model=stylegan2", SEEDS),
    ("call", "stylegan2.StyleGAN2.decode", "copy"): ("model=stylegan2", SEEDS),
    ("call", "samplers.style_mix", "copy"): ("model=stylegan2", GIVEN),
    ("call", "vae.VAE.latent", "copy"): ("model=vae_binary", SEEDS),
    ("call", "vae.VAE.infer", "copy"): ("model=vae_binary", ITEMS),
    ("call", "samplers.reconstruct", "copy"): ("model=vae_binary", ITEMS),
    ("call", "samplers.traverse", "copy"): ("model=vae_binary", GIVEN),
    ("call", "samplers.random_latents", "copy"): ("model=autoencoder", SEEDS),
}

NOT_FOR_THIS_MODEL = (
    "is for an? .*, and this model is a|would visit clean data, where this path ends|sigma cannot start from pure noise"
)

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:Accessing the data pointer")


class FakeGPU(TorchDispatchMode):
    """Works over a FakeTensorMode: keeps CPU tensors real, notes in `seen` what waits, and gives it a plausible answer."""

    def __init__(self):
        super().__init__()
        self.when, self.seen = "call", Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            with self:  # outside of inference mode autograd has done that
                return func.decompose(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        to = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not fakes and to != "cuda":
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.note("read")
            return {torch.bool: True, torch.int64: 0}.get(args[0].dtype, 1.0)
        if func is aten.equal.default:
            self.note("read")
            return False  # what torch's inverse STFT asks for: whether its windows leave gaps
        if func is aten._to_copy.default and to == "cpu":
            self.note("read")
            with _disable_current_modes():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.bincount.default:
            self.note("read")
            return args[0].new_empty(args[2] if len(args) > 2 else kwargs["minlength"])
        if func is aten._to_copy.default and not fakes:
            self.note("copy")
        if func is aten.copy_.default and len(fakes) == 1:
            self.note("copy" if isinstance(args[0], FakeTensor) else "read")
        if func._schema.name in ("aten::index", "aten::index_put_", "aten::index_put") and len(fakes) < len(tensors):
            self.note("copy")
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        """`what` happens in the function of the package that runs now."""
        frame = sys._getframe(2)
        while frame is not None and not (here := Path(frame.f_code.co_filename)).is_relative_to(ROOT / "genai"):
            frame = frame.f_back
        name = "" if frame is None else re.sub(r"(\.<locals>)?\.<\w+>", "", frame.f_code.co_qualname)
        self.seen[self.when, f"{here.stem}.{name}", what] += 1

    @contextlib.contextmanager
    def within_step(self) -> Iterator[None]:
        before, self.when = self.when, "step"
        yield
        self.when = before


@pytest.fixture
def gpu(monkeypatch) -> Iterator[FakeGPU]:
    """The fake device; what needs a driver (backward passes, graphs, Triton) stands aside."""

    def grad(outputs, inputs, *_, **__):
        return [torch.empty_like(x) for x in ([inputs] if isinstance(inputs, torch.Tensor) else inputs)]

    with FakeTensorMode(allow_non_fake_inputs=True), FakeGPU() as gpu:

        def capture(trajectory, inputs):
            with gpu.within_step():
                out = trajectory(inputs)
            return lambda inputs: out

        monkeypatch.setattr(torch.autograd, "grad", grad)
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # its LSTM asks the driver
        monkeypatch.setattr(samplers, "find_graph", lambda model, kind, *graph: capture(*graph))
        monkeypatch.setattr(decode, "capture", capture)
        monkeypatch.setattr(decode, "CHECK_STOP_EVERY", 2)
        monkeypatch.setattr(rng, "philox", remembered(rng.philox))
        monkeypatch.setattr(affine_step, "_triton", torch.ops.genai.affine_step)
        yield gpu


def moved(module: nn.Module) -> nn.Module:
    """A module with its parameters and buffers on the fake device; tied ones stay tied, other tensors where they were."""

    @functools.cache
    def on_gpu(t: torch.Tensor) -> torch.Tensor:
        fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU)
        return nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: on_gpu(t) for name, t in tensors.items() if t is not None})
    return module


def loop_of(config: dict, folder: Path):
    """The training loop of a config with its model on the fake device, without Lightning's trainer."""
    data = synthetic(config["data"])
    loop = build_typed({**config["loop"], "_partial_": True})
    ema = functools.partial(EMA, decay=0.9)
    model, record = build_typed(config["model"]), Record(folder, writes=False)
    lit = loop(
        model, data, build_typed(config["optim"]), ema, record, accumulate=config["accumulate"], log_every_steps=2
    )
    moved(nn.ModuleList([lit.model, lit.ema.module]))
    lit.ema.module.to = lambda device: None
    optimizers = lit.configure_optimizers()
    wrapped = [
        types.SimpleNamespace(optimizer=o, step=o.step)
        for o in (optimizers if isinstance(optimizers, list) else [optimizers])
    ]
    lit.__dict__.update(
        optimizers=lambda: wrapped if isinstance(optimizers, list) else wrapped[0],
        manual_backward=lambda loss: [
            setattr(p, "grad", torch.empty_like(p)) for p in lit.model.parameters() if p.requires_grad
        ],
    )
    lit._device = GPU
    strategy = types.SimpleNamespace()
    precision = types.SimpleNamespace(forward_context=contextlib.nullcontext)
    lit._trainer = types.SimpleNamespace(
        global_step=0, world_size=1, global_rank=0, strategy=strategy, precision_plugin=precision, training=True
    )
    return lit


def facts_of(config: dict) -> tuple:
    return tuple(config["data"][key] for key in ("shape", "field", "classes"))


def train_and_evaluate(gpu: FakeGPU, lit, config: dict) -> None:
    """Make a step of two micro-batches, log, and evaluate."""
    items = lit.data.splits["train"].batch(torch.arange(4), None)
    batch = {name: torch.empty_like(t, device=GPU) for name, t in items.items()}
    lit.on_fit_start()
    lit.model.train()
    with gpu.within_step():
        lit.training_step([batch] * (lit.accumulate * getattr(lit, "critic_steps", 1)), 0)
    lit.finish_step(1, 0.1)
    Evaluate(None, 4).evaluate(lit)


def remembered(forward):
    """A function that answers at once where it has seen such inputs: only shapes, dtypes and devices matter here."""
    answers = {}

    def answer(*args, **kwargs):
        leaves, structure = tree_flatten((args, kwargs))
        key = str(structure), tuple((t.shape, t.dtype, t.device) if isinstance(t, torch.Tensor) else t for t in leaves)
        if key not in answers:
            answers[key] = forward(*args, **kwargs)
        return answers[key]

    return answer


def sample(gpu: FakeGPU, model: nn.Module, node: dict, config: dict) -> None:
    """Call a sampler."""
    shape, field, classes = facts_of(config)
    small = {"steps": 2, "max_new_tokens": 4, "columns": 2, "ahead": 2}
    node = {**node, **{key: value for key, value in small.items() if key in node}}
    draft = {"draft": model} if node.pop("draft", 0) is None else {}
    sampler = functools.partial(build_typed(node), **draft)
    sampler = with_items(sampler, lambda split, index, *_: torch.zeros(len(index), *shape))
    cond = {} if classes is None else {"label": torch.arange(4) % classes}
    if field == "tokens":
        text = torch.zeros(4, 2, dtype=torch.int64)
        cond = {"tokens": text, "pad": torch.arange(4) % 2, "stop": text[:, 0] + 1}
    if "images" in config["data"] and "audio" in config["data"]:
        cond = {"caption": torch.zeros(4, config["data"]["length"], dtype=torch.int64)}
    check_sampler(sampler, model)
    sampler(model, rng.seed_range(0, 4), cond, None)


def seen_by(case: str, gpu: FakeGPU, folder: Path) -> set[tuple[str, str, str]]:
    """What waits while a case trains, evaluates and samples."""
    several = case in ("model=ddpm_mlp", "model=gan")  # the loops are the same for all
    config = config_of(case) | {"accumulate": 2 if several else 1}
    lit = loop_of(config, folder)
    train_and_evaluate(gpu, lit, config)
    model = lit.model.eval().requires_grad_(False)
    if isinstance(model, Diffusion):
        model.net.forward = remembered(model.net.forward)
    taken = 0
    for node in SAMPLERS:
        try:
            sample(gpu, model, node, config)
            taken += 1
        except UserError as error:  # any other refusal would leave a path unseen
            assert re.search(NOT_FOR_THIS_MODEL, str(error)), error
    assert taken > 0
    return set(gpu.seen)


@pytest.mark.parametrize(
    "case", [c if c.startswith("model=") else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_host_and_device_wait_for_each_other_only_where_it_is_said(case, gpu, tmp_path):
    seen = seen_by(case, gpu, tmp_path)
    assert seen <= WAITS.keys()
    shown = {wait for wait, (witness, _) in WAITS.items() if witness == case}
    assert shown <= seen, "these wait no more: take them from WAITS"
    if case == "model=gpt_nano":  # with these plausible answers each of four texts ends in its first round
        assert gpu.seen["call", "speculative._speculate", "read"] == 4


def test_latents_are_measured_and_precomputed_where_the_run_trains(gpu, tmp_path):
    config = config_of("model=latent")
    lit = loop_of(config | {"accumulate": 1}, tmp_path)
    run._prepare(lit.model, lit.data, GPU)
    assert ("call", "latent_space.Latent.measure", "read") in gpu.seen
    cfg = OmegaConf.create({"codec": {**config["codec"], "cache": str(tmp_path)}, "resume": None})
    lit.data.splits = {"val": lit.data.splits["val"]}
    codec.precompute(lit.model, lit.data, cfg)
    assert len(lit.data.splits["val"].latents) == 16
    assert gpu.seen["call", "codec.precompute.save", "read"] == 1


def test_each_rank_has_a_device_of_its_own():
    assert hardware.choose_device({"accelerator": "gpu"}, Ranks(rank=5, world=8, local=1, here=4)) == torch.device(
        "cuda", 1
    )
    assert hardware.choose_device({"accelerator": "cpu"}, Ranks(rank=5, world=8, local=1, here=4)) == torch.device(
        "cpu"
    )
