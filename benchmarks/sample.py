"""Time outside the network of a sampling step.

    pip install -e .[bench]
    python -m benchmarks.sample [--rounds 15] [--batch 16] [--steps 50]
    python -m benchmarks.sample --network 64 [--dtype bfloat16]

A DDIM step at batch 16 of 3x32x32 has a network that returns a constant. A step is the difference between a call of 50 steps
and one of 10, divided by 40; a second column has the whole call divided by its steps, which counts initial noise, tables and
conversions. genai samples a DDPM by its own sampler; diffusers runs its DDIMPipeline with tensors as output and no progress
bar; the hand-written loop is the least that torch can do, with its coefficients computed beforehand. At eta 1 both add noise.
Targets: at most 0.25 of diffusers' time and at most 100 us a step.

With --network it measures sampling as a whole, with a U-Net of that many channels; the rate is in GFLOP/s, so the speedup is
the ratio of images per second at equal FLOPs. On a GPU genai replays one CUDA graph, each network runs as it is and compiled,
as `sample.py compile=true` does and as diffusers advises (reduce-overhead), and diffusers' network is channels-last too.
Target: 3 times diffusers.
"""

import argparse
import copy
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import interleave, parse, ratio, report, setup, spread
from benchmarks.unet import MULTIPLIERS, SHAPE, Diffusers, forward_gflop
from genai.core import rng
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.nets.unet import UNet
from genai.models.diffusion.process.schedules import linear
from genai.models.diffusion.sampling.samplers import sample
from genai.models.diffusion.sampling.tables import ddim, discretize


class Constant(nn.Module):
    """A network that returns a constant and takes no time."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # from which a model knows its dtype
        self.register_buffer("out", out)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return self.out


def ours(net: nn.Module, n: int, steps: int, eta: float, label: Tensor | None = None) -> Callable[[], Tensor]:
    """A call of the sampler, guided where there are labels (the network then gets twice the batch)."""
    classes = None if label is None else 10
    model = DDPM(net, linear(1000), SHAPE, classes=classes, guidance=1.5).eval()
    model.to(next(net.buffers(), next(net.parameters())).device)
    seeds, cond = rng.seed_range(0, n), None if label is None else {"label": label}
    solver = functools.partial(ddim, eta=eta)
    return lambda: sample(model, seeds, cond, solver=solver, steps=steps)["image"]


def constant_for_diffusers(out: Tensor) -> nn.Module:
    from diffusers import UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput

    class Stub(UNet2DModel):
        def forward(self, sample: Tensor, timestep: Tensor, **_) -> UNet2DOutput:
            return UNet2DOutput(sample=out)

    return Stub(
        sample_size=32,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    ).to(out.device)


def diffusers(net: nn.Module, n: int, steps: int, eta: float) -> Callable[[], Tensor]:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(net, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(n, eta=eta, num_inference_steps=steps, output_type="pt").images


def by_hand(out: Tensor, steps: int) -> Callable[[], Tensor]:
    """A hand-written loop: five operations in place on a new tensor each step, and the network's input time."""
    schedule, net = linear(1000), Constant(out)
    table = ddim(schedule, discretize(schedule, steps))
    rows = [(float(t), *schedule.alpha_sigma(t), row.a, row.b) for t, row in zip(table.times, table.rows, strict=True)]

    @torch.inference_mode()
    def sample() -> Tensor:
        x = torch.randn_like(out)
        for t, alpha, sigma, a, b in rows:
            time = torch.full((len(x),), t, device=x.device)
            x0 = net(x, time).mul(-sigma / alpha).add_(x, alpha=1 / alpha)
            x = x0.clamp_(-1, 1).mul_(b).add_(x, alpha=a)
        return x

    return sample


def end_to_end(channels: int, dtype: torch.dtype, args: argparse.Namespace, device: torch.device) -> None:
    peer = Diffusers(channels)
    nets = {"genai": UNet(SHAPE, channels, MULTIPLIERS, attention_depths=[1]), "diffusers": peer.net}
    gflop = {"genai": forward_gflop(nets["genai"]), "diffusers": forward_gflop(peer)}
    for net in nets.values():
        net.to(device, dtype).eval()
    if device.type == "cuda":
        peer.net.to(memory_format=torch.channels_last)
        for name, options in (("genai", {}), ("diffusers", {"mode": "reduce-overhead"})):
            nets[f"{name}, compiled"] = copy.deepcopy(nets[name])
            nets[f"{name}, compiled"].compile(**options)
    loops = {"genai": ours, "diffusers": diffusers}
    calls = {name: loops[name.split(",")[0]](net, args.batch, args.steps, 0.0) for name, net in nets.items()}
    seconds = interleave(calls, args.rounds, 1, device, warmup=3)
    gflop = {name: gflop[name.split(",")[0]] for name in calls}
    rate = {name: [args.steps * args.batch * gflop[name] / s for s in seconds[name]] for name in calls}
    fastest = "genai, compiled" if "genai, compiled" in calls else "genai"
    rows = [
        {
            "system": name,
            "forward GFLOP/img": gflop[name],
            "img/s": spread([args.batch / s for s in seconds[name]], 1, 2),
            "GFLOP/s": spread(rate[name], 1, 1),
            "speedup of genai": ratio(rate["genai"], rate[name]),
            "speedup of genai, compiled": ratio(rate[fastest], rate[name]),
        }
        for name in calls
    ]
    facts = {"channels": channels, "dtype": str(dtype), "batch": args.batch, "steps": args.steps, "rounds": args.rounds}
    report("sample_network", args, device, rows, **facts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--network", type=int, help="channels of a real network instead of a constant")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    args = parse(parser, rounds=1, batch=1, steps=5)
    args.network = 8 if args.toy and args.network else args.network
    return args


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    device = setup()
    if args.network:
        return end_to_end(args.network, getattr(torch, args.dtype), args, device)
    out = torch.randn(args.batch, *SHAPE, device=device)
    label = torch.arange(args.batch) % 10
    short, n = args.steps // 5, args.batch

    def cases(steps: int) -> dict[str, Callable[[], Tensor]]:
        return {
            "genai": ours(Constant(out), n, steps, 0.0),
            "hand-written loop": by_hand(out, steps),
            "diffusers": diffusers(constant_for_diffusers(out), n, steps, 0.0),
            "genai, guided": ours(Constant(torch.cat([out, out])), n, steps, 0.0, label),
            "genai, eta 1": ours(Constant(out), n, steps, 1.0),
            "diffusers, eta 1": diffusers(constant_for_diffusers(out), n, steps, 1.0),
        }

    long = cases(args.steps)
    both = {**long, **{f"{name}, short": call for name, call in cases(short).items()}}
    seconds = interleave(both, args.rounds, 4, device, warmup=2)
    step = {
        name: [(a - b) / (args.steps - short) for a, b in zip(seconds[name], seconds[f"{name}, short"], strict=True)]
        for name in long
    }
    rows = []
    for name in long:
        peer = "diffusers, eta 1" if "eta" in name else "diffusers"
        rows.append(
            {
                "system": name,
                "us/step": spread(step[name], 1e6, 1),
                "relative to diffusers": ratio(step[name], step[peer]),
                "whole call, us/step": spread(seconds[name], 1e6 / args.steps, 1),
                "whole call, relative to diffusers": ratio(seconds[name], seconds[peer]),
            }
        )
    report("sample", args, device, rows, batch=args.batch, steps=args.steps, rounds=args.rounds)


if __name__ == "__main__":
    main()
