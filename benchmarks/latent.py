"""Cost of diffusion in the latents of a first stage and in pixels.

    python -m benchmarks.latent [--rounds 7] [--channels 32]

At 28x28 the U-Nets are those of the recipes: ddpm_mnist's in pixels and latent_mnist_text's in the 4x7x7 latents of
autoencoder_mnist, both conditioned on the class. At 3x32x32 one U-Net serves both, so that only the size of its maps differs:
--channels times 1, 2 and 2, two blocks each, attention in the middle resolution, in pixels or in the 4x16x16 latents of
autoencoder_cifar10. First stages are not trained, which does not change their speed.

A training step is the loss, the backward pass and the recipe's optimiser; it encodes its images, or finds the latents in the
batch as with codec.cache. A sampling step is the difference between ddim with 10 steps and with 2, divided by 8: one call of
the network, unguided; decoding, once a batch, is a column of its own. All cases take turns within a round.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks.common import interleave, parse, ratio, report, setup, spread
from genai.checkpoint.build import build_typed
from genai.cli import compose_config
from genai.core import rng
from genai.core.protocols import Batch
from genai.data.base import synthetic_batch
from genai.models.diffusion.sampling.samplers import sample
from genai.models.diffusion.sampling.tables import ddim

STEPS = 2, 10


def built(cfg: Any, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_typed(OmegaConf.to_container(cfg.model, resolve=True)).to(device).train()
    return model, build_typed(OmegaConf.to_container(cfg.optim, resolve=True))(model)


def over(first_stage: str, *overrides: str) -> Any:
    """The config of diffusion in the latents of the autoencoder that the experiment `first_stage` trains."""
    cfg, stage = compose_config("train", [*overrides]), compose_config("train", [f"experiment={first_stage}"])
    cfg.codec.model, cfg.codec.shape = OmegaConf.to_container(stage.model, resolve=True), stage.model.latent_shape
    return cfg


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Callable[[], None]:
    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch, 0).total.backward()
        optimizer.step()

    return one


def compare(pixels: Any, latents: Any, n: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each way to train, with batches of n images."""
    batch = {name: value.to(device) for name, value in synthetic_batch(pixels.data.shape, "image", 10, n).items()}
    cases: dict[str, Callable[[], Any]] = {}
    sizes = {}
    for space, cfg in (("pixels", pixels), ("latents", latents)):
        model, optimizer = built(cfg, device)
        sizes[space] = (
            f"{sum(p.numel() for p in model.net.parameters()) / 1e6:.2f} M, {'x'.join(map(str, model.shape))}"
        )
        cases[space] = step(model, optimizer, batch)
        sampled, seeds = copy.deepcopy(model).eval(), rng.seed_range(0, n)
        for steps in STEPS:
            cases[f"{space}, {steps}"] = lambda m=sampled, s=seeds, k=steps: sample(m, s, solver=ddim, steps=k)
        if model.latent is not None:
            z = model.latent.codec.encode(batch["image"])
            cases["precomputed"] = step(model, optimizer, {"latent": z, "label": batch["label"]})
            cases["decode"] = lambda m=sampled, z=z: m.latent.decode(z)
    seconds = interleave(cases, rounds, 10 if device.type == "cuda" else 1, device, warmup=2)
    few, many = STEPS
    sampling = {
        space: [
            (a - b) / (many - few) for a, b in zip(seconds[f"{space}, {many}"], seconds[f"{space}, {few}"], strict=True)
        ]
        for space in sizes
    }
    rows = []
    for name, case in (("pixels", "pixels"), ("latents, encoded", "latents"), ("latents, precomputed", "precomputed")):
        space = "pixels" if case == "pixels" else "latents"
        rows.append(
            {
                "images": "x".join(map(str, pixels.data.shape)),
                "batch": n,
                "diffusion in": name,
                "U-Net": sizes[space],
                "ms/training step": spread(seconds[case], 1e3, 1),
                "training, relative to pixels": ratio(seconds[case], seconds["pixels"]),
                "ms/sampling step": spread(sampling[space], 1e3, 1),
                "sampling, relative to pixels": ratio(sampling[space], sampling["pixels"]),
                "ms to decode": "-" if space == "pixels" else spread(seconds["decode"], 1e3, 1),
            }
        )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels", type=int, default=32)
    return parse(parser, rounds=1, channels=8)


def main() -> None:
    args = arguments()
    device = setup()
    given = ["model.classes=10", "model.net.text=null"]
    mnist = (
        compose_config("train", ["experiment=ddpm_mnist"]),
        over("autoencoder_mnist", "experiment=latent_mnist_text", *given),
    )
    net = [f"model.net.channels={args.channels}", "model.net.multipliers=[1,2,2]", "model.net.blocks=2", "data=cifar10"]
    cifar = (
        compose_config("train", ["model=ddpm", *net, "model.net.attention_depths=[1]"]),
        over("autoencoder_cifar10", "model=latent", *net, "model.net.attention_depths=[1]", *given),
    )
    rows = [*compare(*mnist, 32, args.rounds, device), *compare(*cifar, 16, args.rounds, device)]
    report("latent", args, device, rows, ("images", "diffusion in"), rounds=args.rounds, channels=args.channels)


if __name__ == "__main__":
    main()
