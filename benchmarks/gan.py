"""Training speed of two GANs.

    git clone https://github.com/NVlabs/stylegan2-ada-pytorch
    python -m benchmarks.gan [--rounds 12] [--window 10] [--cycles 3] [--stylegan2-ada stylegan2-ada-pytorch]

Compares DCGAN through `train.py` with a hand-written loop, and a step of StyleGAN2 with one of stylegan2-ada-pytorch. DCGAN is
model=dcgan on random 28x28 images in batches of 64. `train.py` runs with averaging, the check for non-finite values, seeding
and logs; the hand-written loop has the same networks and losses, two fused Adams and nothing else. They take turns, a window of
steps each, as in benchmarks/loop.py; a step updates the discriminator and the generator once.

StyleGAN2 trains on 32x32x3 images in batches of 16 with widths 128, 128, 128 and 64, in whole cycles of 16 steps with both
regularisers and Adam; the systems take turns step by step and are timed by the wall clock. stylegan2-ada-pytorch runs its
reference operations, since it has no custom ones for a CPU: once as it trains by default, and once with grouped convolutions, a
set of weights for each sample, as the paper describes. Targets: 1.05 times the hand-written loop's time, 0.7 times that of
stylegan2-ada-pytorch.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from benchmarks import loop
from benchmarks.common import left_out, parse, ratio, report, setup, spread
from benchmarks.vae import random_images
from genai.models.gan.stylegan2 import StyleGAN2
from genai.models.gan.stylegan2_nets import Discriminator, Generator
from genai.train.lit_adversarial import LitAdversarial

BATCH, WIDTHS, LATENTS = 16, (128, 128, 128, 64), 128


class Plain:
    """The loop one writes by hand for `lit`'s model."""

    def __init__(self, lit: LitAdversarial):
        self.model: Any = copy.deepcopy(lit.model)
        self.stream = iter(lit.train_dataloader())
        generator, discriminator = (
            [p for _, p in named]
            for named in (self.model.generator_parameters(), self.model.discriminator_parameters())
        )
        self.generator, self.discriminator = (
            torch.optim.Adam(ps, lr=2e-4, betas=(0.5, 0.999), fused=True) for ps in (generator, discriminator)
        )

    def train(self, steps: int) -> None:
        for step in range(steps):
            (batch,) = next(self.stream)
            fake = self.model.generate(batch, step)
            self.discriminator.zero_grad()
            self.model.discriminator_loss(batch, {"fake": fake["fake"].detach()}, step).total.backward()
            self.discriminator.step()
            self.generator.zero_grad()
            self.model.discriminator.requires_grad_(False)
            self.model.generator_loss(batch, fake, step).total.backward()
            self.model.discriminator.requires_grad_(True)
            self.generator.step()


class Turns(loop.Turns):
    peers: ClassVar = {"hand-written loop": Plain}


def dcgan(rounds: int, window: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as root:
        random_images(root)
        seconds = loop.trained(
            Turns, rounds, window, "model=dcgan", "data=mnist", f"data.root={root}", "data.batch_size=64", "logger=none"
        )
    ours = seconds["ours"]
    return [
        {
            "system": f"DCGAN, {name}",
            "ms/step": spread(times, 1e3, 1),
            "time of genai relative to it": ratio(ours, times),
        }
        for name, times in {"train.py": ours, **{k: v for k, v in seconds.items() if k != "ours"}}.items()
    ]


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=2.5e-3, betas=(0.0, 0.99), eps=1e-8)


def our_stylegan2(x: torch.Tensor) -> Callable[[int], None]:
    shape = tuple(x.shape[1:])
    model = StyleGAN2(
        "image",
        shape,
        None,
        LATENTS,
        Generator(shape, LATENTS, WIDTHS, LATENTS, 8),
        Discriminator(shape, WIDTHS),
        gamma=0.1,
    ).train()
    both = [[p for _, p in named] for named in (model.generator_parameters(), model.discriminator_parameters())]
    (g, d), (g_optim, d_optim) = both, map(adam, both)

    def step(k: int) -> None:
        fake = model.generate({"image": x}, k)
        d_optim.zero_grad()
        model.discriminator_loss({"image": x}, fake, k).total.backward(inputs=d)
        d_optim.step()
        g_optim.zero_grad()
        model.generator_loss({"image": x}, fake, k).total.backward(inputs=g)
        g_optim.step()

    return step


def their_stylegan2(folder: str, x: torch.Tensor, grouped: bool) -> Callable[[int], None]:
    """The networks and loss of stylegan2-ada-pytorch at the same widths, in the phases of its training loop; with `grouped`, a
    set of weights for each sample."""
    sys.path.insert(0, folder)
    from training import loss, networks  # type: ignore[import-not-found]

    widths = {"channel_base": 2048, "channel_max": 128}
    g = networks.Generator(LATENTS, 0, LATENTS, 32, 3, mapping_kwargs={"num_layers": 8}, synthesis_kwargs=widths)
    d = networks.Discriminator(0, 32, 3, **widths, epilogue_kwargs={"mbstd_group_size": 4})
    if grouped:
        for block in g.synthesis.children():
            block.forward = lambda *given, inner=block.forward, **named: inner(
                *given, **{**named, "fused_modconv": True}
            )
    g_optim, d_optim = adam(g.train().parameters()), adam(d.train().parameters())
    losses = loss.StyleGAN2Loss("cpu", g.mapping, g.synthesis, d, r1_gamma=0.1)
    none = torch.zeros(len(x), 0)

    def phase(name: str, optim: torch.optim.Adam, net: Any, gain: int) -> None:
        optim.zero_grad()
        net.requires_grad_(True)
        losses.accumulate_gradients(name, x, none, torch.randn(len(x), LATENTS), none, True, gain)
        net.requires_grad_(False)
        optim.step()

    g.requires_grad_(False)
    d.requires_grad_(False)

    def step(k: int) -> None:
        phase("Gmain", g_optim, g, 1)
        if k % 4 == 0:
            phase("Greg", g_optim, g, 4)
        phase("Dmain", d_optim, d, 1)
        if k % 16 == 0:
            phase("Dreg", d_optim, d, 16)

    return step


def stylegan2(folder: str, cycles: int) -> list[dict]:
    x = torch.randn(BATCH, 3, 32, 32).clamp(-1, 1)
    steps = {
        "StyleGAN2, genai": our_stylegan2(x),
        "stylegan2-ada-pytorch": their_stylegan2(folder, x, grouped=False),
        "stylegan2-ada-pytorch, weights for each sample": their_stylegan2(folder, x, grouped=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in steps:
        steps[name](0)
    for _ in range(cycles):
        spent = dict.fromkeys(steps, 0.0)
        for k in range(16):
            for name, step in steps.items():
                start = time.perf_counter()
                step(k)
                spent[name] += time.perf_counter() - start
        for name, total in spent.items():
            seconds[name].append(total / 16)
    ours = seconds["StyleGAN2, genai"]
    return [
        {"system": name, "ms/step": spread(times, 1e3, 0), "time of genai relative to it": ratio(ours, times)}
        for name, times in seconds.items()
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--stylegan2-ada", help="folder of stylegan2-ada-pytorch; without it that part is left out")
    return parse(parser, rounds=2, window=2, cycles=1, stylegan2_ada=None)


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    device = setup()
    rows = dcgan(args.rounds, args.window)
    if args.stylegan2_ada:
        rows += stylegan2(args.stylegan2_ada, args.cycles)
    else:
        left_out.append("stylegan2-ada-pytorch")
    report("gan", args, device, rows, rounds=args.rounds, cycles=args.cycles)


if __name__ == "__main__":
    main()
