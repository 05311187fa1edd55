"""Time outside the network per DDIM step: 50 steps at batch 16, 3x32x32, with a network that returns a constant.

    pip install -e .[bench]
    python -m benchmarks.sampling [--rounds 15] [--batch 16] [--steps 50]

A step is the difference between a call of 50 steps and one of 10, divided by 40; beside it the whole call divided by its
steps, in which initial noise, tables and conversions count. Ours goes through
`genai.models.diffusion.samplers.ddim` and a DDPM; diffusers' is DDIMPipeline itself, tensors out, its progress bar off;
the hand loop is the least that torch can do, with its coefficients computed beforehand. At eta 1 both add noise.
Targets: ours <= 0.25x diffusers and <= 100 us a step.
"""

import argparse
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import interleave, ratio, report, setup, spread
from genai.core import rng
from genai.models.diffusion.ddpm import DDPM
from genai.models.diffusion.samplers import ddim, ddim_table, levels
from genai.models.diffusion.schedules import linear

SHAPE = (3, 32, 32)


class Constant(nn.Module):
    """A network that costs nothing."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # from which a model knows its dtype
        self.register_buffer("out", out)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return self.out


def ours(out: Tensor, steps: int, eta: float, label: Tensor | None = None) -> Callable[[], Tensor]:
    """Through the model and the sampler, guided where there are labels (the network then sees twice the batch)."""
    net = Constant(out if label is None else torch.cat([out, out]))
    classes = None if label is None else 10
    model = DDPM(net, linear(1000), SHAPE, classes=classes, guidance=1.5).to(out.device).eval()
    seeds, cond = rng.seed_range(0, len(out)), None if label is None else {"label": label}
    return lambda: ddim(model, seeds, cond, steps=steps, eta=eta)["image"]


def diffusers(out: Tensor, steps: int, eta: float) -> Callable[[], Tensor]:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput

    class Stub(UNet2DModel):
        def forward(self, sample: Tensor, timestep: Tensor, **_) -> UNet2DOutput:
            return UNet2DOutput(sample=out)

    stub = Stub(
        sample_size=32,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    )
    pipeline = DDIMPipeline(stub, DDIMScheduler()).to(out.device)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(len(out), eta=eta, num_inference_steps=steps, output_type="pt").images


def by_hand(out: Tensor, steps: int) -> Callable[[], Tensor]:
    """Five operations in place on a new tensor a step, and the network's time."""
    schedule, net = linear(1000), Constant(out)
    table = ddim_table(levels(schedule, steps))
    rows = [(float(t), *schedule.at(t), row.a, row.b) for t, row in zip(table.times, table.rows, strict=True)]

    @torch.inference_mode()
    def sample() -> Tensor:
        x = torch.randn_like(out)
        for t, alpha, sigma, a, b in rows:
            time = torch.full((len(x),), t, device=x.device)
            x0 = net(x, time).mul(-sigma / alpha).add_(x, alpha=1 / alpha)
            x = x0.clamp_(-1, 1).mul_(b).add_(x, alpha=a)
        return x

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    device = setup()
    out = torch.randn(args.batch, *SHAPE, device=device)
    label = torch.arange(args.batch) % 10
    short = args.steps // 5

    def cases(steps: int) -> dict[str, Callable[[], Tensor]]:
        return {
            "ours": ours(out, steps, 0.0),
            "hand loop": by_hand(out, steps),
            "diffusers": diffusers(out, steps, 0.0),
            "ours, guided": ours(out, steps, 0.0, label),
            "ours, eta 1": ours(out, steps, 1.0),
            "diffusers, eta 1": diffusers(out, steps, 1.0),
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
                "loop": name,
                "us a step": spread(step[name], 1e6, 1),
                "/ diffusers": ratio(step[name], step[peer]),
                "us of the call / steps": spread(seconds[name], 1e6 / args.steps, 1),
                "call / diffusers": ratio(seconds[name], seconds[peer]),
            }
        )
    report("sampling", device, rows, batch=args.batch, steps=args.steps, rounds=args.rounds)


if __name__ == "__main__":
    main()
