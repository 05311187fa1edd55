"""Training speed of the U-Net.

    pip install -e .[bench]
    python -m benchmarks.unet [--channels 64] [--batch 16] [--rounds 7]

Compares the U-Net with those of diffusers and denoising-diffusion-pytorch at equal FLOPs per image. A step is the forward pass,
the backward pass and fused AdamW on 32x32x3 images in fp32. diffusers' UNet2DModel has its default settings (attention heads of
8 channels at 16x16 and in the middle) at the widths of ours; the Unet of denoising-diffusion-pytorch has the `dim` whose FLOPs
come nearest to ours. The rate is GFLOP/s, with the backward pass counted as two forward passes, so the speedup is the ratio of
images per second at equal FLOPs. Targets: 1.1 times diffusers, 1.4 times denoising-diffusion-pytorch.
"""

import argparse
import logging
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import installed, interleave, parse, ratio, report, setup, spread
from genai.models.diffusion.nets.unet import UNet

SHAPE = (3, 32, 32)
MULTIPLIERS = (1, 2, 2)


class Diffusers(nn.Module):
    """diffusers' UNet2DModel at the widths of ours: three resolutions, two blocks each, attention at 16x16."""

    def __init__(self, channels: int):
        from diffusers import UNet2DModel

        super().__init__()
        self.net = UNet2DModel(
            sample_size=32,
            block_out_channels=[channels * m for m in MULTIPLIERS],
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=math.gcd(channels, 32),
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.net(x, time).sample


def lucidrains(gflop: float) -> nn.Module:
    """The Unet of denoising-diffusion-pytorch whose GFLOP per image come nearest to `gflop`, with a dim divisible by 8."""
    from denoising_diffusion_pytorch import Unet

    with torch.device("meta"):
        dim = min(range(16, 256, 8), key=lambda d: abs(forward_gflop(Unet(d, dim_mults=MULTIPLIERS), "meta") - gflop))
    return Unet(dim, dim_mults=MULTIPLIERS)


def forward_gflop(net: nn.Module, device: torch.device | str = "cpu") -> float:
    """GFLOP of one image's forward pass, with plain attention, since the counter does not count the CPU's flash attention."""
    x, time = torch.randn(1, *SHAPE, device=device), torch.zeros(1, device=device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net.train()(x, time)
    return counter.get_total_flops() / 1e9


def trainer(net: nn.Module, batch: int, device: torch.device) -> Callable[[], None]:
    """A function that makes one update."""
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x, target = torch.randn(2, batch, *SHAPE, device=device)
    time = torch.randint(1000, (batch,), device=device).float()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.mse_loss(net(x, time), target).backward()
        optimizer.step()

    return step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    return parse(parser, rounds=1, channels=8, batch=1)


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    device = setup()

    nets: dict[str, nn.Module] = {"genai": UNet(SHAPE, args.channels, MULTIPLIERS, attention_depths=[1])}
    if installed("diffusers"):
        nets["diffusers"] = Diffusers(args.channels)
    if installed("denoising_diffusion_pytorch"):
        nets["denoising-diffusion-pytorch"] = lucidrains(forward_gflop(nets["genai"]))
    gflop = {name: forward_gflop(net) for name, net in nets.items()}
    steps = {name: trainer(net, args.batch, device) for name, net in nets.items()}
    seconds = interleave(steps, args.rounds, 10 if device.type == "cuda" else 1, device)

    rate = {name: [3 * gflop[name] * args.batch / s for s in seconds[name]] for name in nets}
    rows = [
        {
            "net": name,
            "params": f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M",
            "forward GFLOP/img": gflop[name],
            "ms/step": spread(seconds[name], 1e3, 0 if device.type == "cpu" else 2),
            "img/s": args.batch / statistics.median(seconds[name]),
            "GFLOP/s": statistics.median(rate[name]),
            "speedup of genai": ratio(rate["genai"], rate[name]),
        }
        for name, net in nets.items()
    ]
    report("unet", args, device, rows, channels=args.channels, batch=args.batch, rounds=args.rounds)


if __name__ == "__main__":
    main()
