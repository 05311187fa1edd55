"""What one version makes of small runs of every model: trained, sampled, scored and resumed, and kept for those that follow.

    python tests/checkpoint/old/record.py

writes beside itself, for the checkpoint format of the code it runs on, the two files that test_old_runs.py compares with:

- `models_of_format_<n>.tar.xz`: a run directory of five steps of every file in conf/model and of VARIANTS, the text that some
  of them learn, and `plan.json`, which says for each run by which sampler nodes it is sampled and what it needs beside it;
- `models_of_format_<n>.npz`: what `results` makes of each run, what `machine` says of the one they were made on, and by how much
  other vector units change each of them.

They are written once for a format and never anew, so it refuses to write over them. Sampler nodes lie in the archive as
conf/sampler had them: what it says later is another matter.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

import genai
from genai import checkpoint
from genai.checkpoint.build import DATA, MODELS, build_stored
from genai.cli import OPTIMIZERS, compose_config, conf_dir, prepare_training
from genai.core.errors import UserError
from genai.core.protocols import AdversarialModel, Losses, Scorable
from genai.core.stored import up_to_date
from genai.modalities.pixels import Pixels
from genai.train.run import run

HERE = Path(__file__).parent
TEXT, LINES = "text.txt", "lines.txt"
WRITES_TEXT = ["data=text_file", f"data.path={TEXT}", "data.shape=[16]"]
DIGITS = ["data=digits"]
CAPTIONS = ["data=digits_text", "codec.ckpt=first"]
ENCODER = "{_target_: genai.nn.text_encoder.TextEncoder, length: 32, width: 16, layers: 1, heads: 2}"  # of captions
ADA = (
    "{_target_: genai.models.gan.ada.ADA, p: 0.5, ramp_images: 500, augment: {_target_: genai.models.gan.ada.Augment}}"
)
# What a file of conf/model needs to learn from what every machine has; a file that is not named here learns digits.
MODEL = {
    "ddpm_mlp": ["data=toy2d", "data.n=1000"],
    "dit": [*DIGITS, "model.net.layers=2"],
    "gpt": WRITES_TEXT,
    "gpt2": [*WRITES_TEXT, "model.net.transformer.attention.heads=4"],
    "gpt_nano": WRITES_TEXT,
    "autoencoder_adversarial": [*DIGITS, "model.start_step=2"],
    "vae": [*DIGITS, "model.encoder.width=8", "model.decoder.width=8"],
    "vae_conv": [*DIGITS, "model.encoder.channels=4", "model.decoder.channels=4"],
}
# A first stage for two of the others, and what no file of conf/model shows: recipes of conf/experiment that add to it.
VARIANTS = {
    "first": [
        "model=autoencoder",
        *DIGITS,
        "model.latent_shape=[2,4,4]",
        "model.encoder.outputs=4",
        "model.encoder.multipliers=[2]",
        "model.decoder.multipliers=[2]",
    ],
    "ddpm_v_unconditional": [
        "model=ddpm",
        *DIGITS,
        "model.parameterization=v",
        "model.classes=null",
        "model.net.classes=null",
        "model.guidance=1",
        "model.variance=large",
        "model.schedule._target_=genai.models.diffusion.process.schedules.linear",
        "model.weighting._target_=genai.models.diffusion.process.weightings.min_snr",
        "model.net.dropout=0.1",
    ],
    "dit_captions": ["model=dit", *CAPTIONS, f"model.net.text={ENCODER}"],
    "autoencoder_perceptual": ["experiment=autoencoder_cifar10", *DIGITS, "model.latent_shape=[4,4,4]"],
    "dcgan_mnist": ["experiment=dcgan_mnist", *DIGITS],
    "gpt_digits": ["experiment=gpt_digits"],
    "gpt_names": ["experiment=gpt_names", "data=lines", f"data.path={LINES}"],
    "gpt_characters": [
        "experiment=gpt_shakespeare",
        *WRITES_TEXT,
        "data.tokenizer=char",
        "compile=false",
        "model.net.transformer.attention.kv_heads=2",
        "model.net.transformer.attention.heads=4",
    ],
    "latent_digits_text": ["experiment=latent_digits_text", *CAPTIONS],
    "stylegan2_ada": [
        "model=stylegan2",
        *DIGITS,
        "model.classes=null",
        "model.path_weight=0",
        "model.mixing=0",
        "model.share_fake=false",
        "model.discriminator.residual=false",
        f"model.augment={ADA}",
    ],
    "vae_digits": ["experiment=vae_digits", "model.encoder.width=8", "model.decoder.width=8"],
}
SMALLER = {
    "channels": 2,
    "width": 16,
    "layers": 2,
    "style": 8,
    "group": 4,
    "codes": 32,
    "importance_samples": 4,
    "label_width": 4,
}
ALWAYS = ["debug=true", "trainer.accelerator=cpu", "logger=none"]
RATE = {"lr": 0.01, "warmup_steps": 2, "decay_steps": 20}  # at which weights that begin as zeros move

# Arguments of a sampler, each of which is one more way to call it; {} is the file as it is, with FEW.
FEW: dict[str, Any] = {"steps": 3, "columns": 2, "max_new_tokens": 9}
WAYS: dict[str, list[dict[str, Any]]] = {
    "ddim": [{}, {"guidance": 1.0}, {"guidance": 2.5, "eta": 0.5, "spacing": "leading"}, {"spacing": "linspace"}],
    "ddpm": [{}, {"variance": "large", "spacing": "log_snr"}],
    "dpmpp_2m": [{}, {"spacing": "trailing", "steps": 5}],
    "heun": [{}, {"guidance": 1.0}],
    "gan": [{}, {"truncation": 0.7}, {"standing_batches": 2}],
    "generate": [
        {},
        {"temperature": 0},
        {"temperature": 1.3, "top_k": 9},
        {"top_p": 0.8, "repetition_penalty": 1.5},
        {"min_p": 0.1},
    ],
    "speculative": [{"draft": "gpt_nano"}, {"draft": "gpt_nano", "ahead": 2, "temperature": 0.7, "top_p": 0.9}],
    "prior": [{}, {"temperature": 0.5, "pixels": "draw"}],
    "random_latents": [{}, {"temperature": 0.5}],
    "interpolate": [{}, {"truncation": 0.7}],
    "traverse": [{}, {"pixels": "draw"}],
    "style_mix": [{}, {"truncation": 0.7, "cut": 1}],
}
FLOW = {"_target_": "genai.models.diffusion.likelihood.ode.probability_flow", "steps": 2}
PROMPTS = {
    "tokens": [{}, {"prompt": "a", "stop": "e"}, {"prompt": ["the ", "a", "some rain "]}],
    "caption": [
        {},
        {"prompt": ["a handwritten seven", "the digit two", "one"]},
        {"prompt": ["zero", "nine"], "negative_prompt": "a handwritten one"},
    ],
}


def cases() -> dict[str, list[str]]:
    """Overrides of train.py by the name of the run: VARIANTS, then every file of conf/model."""
    files = sorted((Path(conf_dir()) / "model").glob("*.yaml"))
    return {**VARIANTS, **{p.stem: [f"model={p.stem}", *MODEL.get(p.stem, DIGITS)] for p in files}}


def small(node: Any, path: str = "model") -> Iterator[str]:
    """Overrides that make the networks of a composed config small, wherever they have a number of SMALLER."""
    for key, value in node.items():
        if isinstance(value, DictConfig):
            yield from small(value, f"{path}.{key}")
        elif key in SMALLER and value is not None:
            yield f"{path}.{key}={min(value, SMALLER[key])}"
        elif key == "widths":
            yield f"{path}.{key}={[8] * len(value)}"
        elif key == "steps" and path == "model.schedule":
            yield f"{path}.{key}=12"


def train(name: str, overrides: list[str]) -> None:
    """The run directory `name` of five steps, of which what resume= needs is kept."""
    cfg = compose_config("train", overrides)
    smaller = [line for line in small(cfg.model) if line.partition("=")[0] not in str(overrides)]
    smaller += [f"sampler.{key}={FEW[key]}" for key in cfg.sampler if key in FEW and "pixels" not in cfg.data._target_]
    rates = [f"{player}.{key}={RATE[key]}" for player in OPTIMIZERS if player in cfg for key in RATE]
    run(compose_config("train", [*overrides, *smaller, *rates, *ALWAYS, f"run_dir={name}"]))


def plan(name: str) -> dict[str, Any]:
    """What `results` needs to know of a run: the runs that it `needs` beside it, and `samples` by key, each a sampler node of
    conf/sampler that fits, and what else genai.sample is given."""
    loaded, samples = genai.load(name), {}
    asked = PROMPTS.get("caption" if "caption" in loaded.conditions else loaded.modality.field, [{}])
    for path in sorted((Path(conf_dir()) / "sampler").glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        few = {} if isinstance(loaded.modality, Pixels) else {key: FEW[key] for key in node.keys() & FEW.keys()}
        for i, way in enumerate(WAYS.get(path.stem, [{}])):
            for j, given in enumerate(asked if i == 0 else asked[1:] or asked):
                arguments = {"sampler": {**node, **few, **way}, **given}
                with contextlib.suppress(UserError):  # it does not fit
                    genai.sample(loaded, n=3, **arguments)
                    samples[f"{path.stem}.{i}.{j}"] = arguments
    needs = {loaded.config.get("codec", {}).get("ckpt"), *(a["sampler"].get("draft") for a in samples.values())}
    return {"needs": sorted(needs - {None, name}), "samples": samples}


def results(name: str, planned: dict[str, Any]) -> dict[str, np.ndarray]:
    """Everything that is compared of a run, by key: samples, losses, likelihoods, the weights that it would begin with, and those
    after five more steps. The working folder holds the run, and is written to."""
    loaded, found = genai.load(name), {}
    for key, arguments in planned["samples"].items():
        batch = genai.sample(loaded, n=3, seed=7, **arguments)
        found |= {f"{key}/{field}": value.numpy() for field, value in batch.items() if field not in ("seeds", "label")}
    return {**found, **scores(name), **initial(name), **five_more(name)}


def scores(name: str) -> dict[str, np.ndarray]:
    """Losses of a fixed batch in training and in evaluation, with all they log, and its likelihoods."""
    found = {}
    data = build_stored(genai.load(name).config["data"], (), (MODELS, DATA))
    batch = data.splits["train"].batch(torch.arange(8), None)
    for mode in ("train", "eval"):
        model: Any = genai.load(name, weights="raw").model
        model.train(mode == "train").requires_grad_(True)
        torch.manual_seed(0)
        losses = [model(batch, 16)] if not isinstance(model, AdversarialModel) else list(of_both(model, batch, 16))
        values = [[loss.total, loss.weight, *(x for k in sorted(loss.logs) for x in loss.logs[k])] for loss in losses]
        found[f"loss.{mode}"] = np.array([torch.as_tensor(x).detach().item() for row in values for x in row])
    loaded = genai.load(name)
    with contextlib.suppress(UserError):  # of what has no grey levels
        if isinstance(loaded.model, Scorable):
            found["log_prob"] = loaded.model.log_prob(batch, 3).detach().numpy()
        if hasattr(loaded.model, "denoise"):
            flow = build_stored(up_to_date({**FLOW, "_partial_": True}))
            found["probability_flow"] = flow(loaded.model, batch, 3, levels=data.levels).detach().numpy()
    return found


def of_both(model: Any, batch: dict, step: int) -> Iterator[Losses]:
    """The losses of both updates of an adversarial model."""
    fake = model.generate(batch, step)
    yield model.discriminator_loss(batch, fake, step)
    yield model.generator_loss(batch, fake, step)


def initial(name: str) -> dict[str, np.ndarray]:
    """The weights that a new run with this config would begin with."""
    node = genai.load(name).config["model"]
    torch.manual_seed(0)
    return of_weights("initial", build_stored(node).state_dict())


def five_more(name: str) -> dict[str, np.ndarray]:
    """All weights, live and averaged, after five more steps."""
    run(compose_config("train", [f"resume={name}", "max_steps=10"], prepare_training))
    content = checkpoint.read(Path(name) / "checkpoints" / "last.ckpt")
    weights = {f"{part}.{key}": tensor for part in ("model", "ema") for key, tensor in content[part].items()}
    return of_weights("weights", weights)


def of_weights(key: str, weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Names of tensors, one checksum of their bits, and two numbers of each: its norm and its product with a fixed wave, which
    tells signs and places."""
    sha, sums = hashlib.sha256(), []
    names = sorted(weights, key=lambda name: (name.startswith("ema."), name))
    for name in names:
        sha.update(weights[name].contiguous().numpy().tobytes())
        flat = weights[name].double().flatten()
        wave = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        sums.append([flat.norm().item(), (flat @ wave).item()])
    bits = np.frombuffer(sha.digest(), np.uint8)
    return {f"{key}.names": np.array(names), f"{key}.sums": np.array(sums), f"{key}.bits": bits}


def machine() -> str:
    """What decides the last bits of a float: torch, its vector units, the threads, and the processor, by which libraries of torch
    choose their kernels."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        fields = re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = "-".join(value for _, value in fields[:3])
    units = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__.partition('+')[0]}, {units}, {torch.get_num_threads()} threads, {cpu}"


def write_texts(folder: Path) -> None:
    """A text and a list of lines that depend on nothing but this."""
    draw = random.Random(0)
    words = [
        "the",
        "a",
        "some",
        "rain",
        "sea",
        "stone",
        "wind",
        "light",
        "under",
        "falls",
        "sleeps",
        "and",
        "slowly",
        "again",
    ]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(3, 9))) for _ in range(120)]
    (folder / TEXT).write_text(".\n".join(lines) + ".\n", encoding="utf-8")
    (folder / LINES).write_text("\n".join(dict.fromkeys(line[:14].strip() for line in lines)) + "\n", encoding="utf-8")


def pack(folder: Path, path: Path, plans: dict[str, Any]) -> None:
    """The archive, of what is the same each time it is written."""
    kept = ["config.yaml", "checkpoints/last.ckpt"]
    files = {f"{name}/{file}": (folder / name / file).read_bytes() for name in plans for file in kept}
    files |= {name: (folder / name).read_bytes() for name in (TEXT, LINES, "plan.json")}
    with tarfile.open(path, "x:xz", preset=9) as archive:
        for name, content in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def copy(runs: Path, folder: Path, names: list[str]) -> None:
    """Some of the runs that were recorded, and the texts, in a folder of their own."""
    for name in names:
        shutil.copytree(runs / name / "checkpoints", folder / name / "checkpoints")
        shutil.copy(runs / name / "config.yaml", folder / name)
    for name in (TEXT, LINES):
        shutil.copy(runs / name, folder)


# Other vector units compute in another order: what differs by them differs from processor to processor.
OTHER_UNITS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def everything(runs: Path, plans: dict[str, Any], out: Path) -> None:
    """`results` of all runs, by `run/key`, each in a folder of its own."""
    found: dict[str, Any] = {"machine": np.array(machine())}
    for name in plans:
        with tempfile.TemporaryDirectory() as alone:
            copy(runs, Path(alone), [name, *plans[name]["needs"]])
            os.chdir(alone)
            found |= {f"{name}/{key}": value for key, value in results(name, plans[name]).items()}
            os.chdir(runs)
    np.savez_compressed(out, **found)


def spread(key: str, found: np.ndarray, other: np.ndarray) -> np.ndarray:
    """By how much other vector units change a value, the most of all its numbers but of weights' each; infinite where they choose
    another token."""
    if found.dtype.kind != "f":
        return np.array(0.0 if np.array_equal(found, other) else np.inf)
    by = np.abs(found - other).astype(np.float32)
    return by if key.endswith(".sums") else by.max()


def main() -> None:
    archive, values = (HERE / f"models_of_format_{checkpoint.FORMAT}.{kind}" for kind in ("tar.xz", "npz"))
    if archive.exists() or values.exists():
        sys.exit(f"{archive} is there already, and is what later versions are held to")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        runs = Path(scratch) / "runs"
        runs.mkdir()
        os.chdir(runs)
        write_texts(Path())
        for name, overrides in cases().items():
            train(name, overrides)
        plans = {name: plan(name) for name in cases()}
        (runs / "plan.json").write_text(json.dumps(plans, indent=1))
        pack(runs, archive, plans)
        found = []
        for i, units in enumerate(({}, OTHER_UNITS)):
            out = Path(scratch) / f"{i}.npz"
            subprocess.run([sys.executable, __file__, str(runs), str(out)], env={**os.environ, **units}, check=True)
            found.append(dict(np.load(out)))
        keep(*found, values)


def keep(found: dict[str, np.ndarray], other: dict[str, np.ndarray], path: Path) -> None:
    """Write what was found, and beside each value its spread."""
    spreads = {f"spread/{key}": spread(key, value, other[key]) for key, value in found.items() if "/" in key}
    np.savez_compressed(path, **found, **spreads)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:  # of what was trained, on these vector units or the others
        everything(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "plan.json").read_text()), Path(sys.argv[2]))
    else:
        main()
