"""Time of one reverse step without a network.

    pip install -e .[bench]
    python -m benchmarks.step [--rounds 15] [--shapes 64,3,32,32 8,3,256,256]

Times are in units of torch.add(x, eps, out=y), which reads two tensors and writes one. genai's step runs in place in torch,
compiled by Inductor where there is a C++ compiler or a GPU, and on a GPU as the Triton kernel, launched from Python as the
others are, and in a CUDA graph as its samplers launch it: a row in a graph counts in units of `torch.add` in a graph. The
schedulers of diffusers and denoising-diffusion-pytorch get the same tensors. A stochastic step draws its noise within the time:
genai by seed, the others from torch.randn. Target: 1.15 units in a graph.
"""

import argparse
import shutil
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common import installed, interleave, parse, ratio, report, setup, spread
from genai.core import rng
from genai.core.protocols import Prediction
from genai.kernels.affine_step import Row, affine_step

GRAPH = ", in a graph"
CALLS = 20  # in one graph, so that its own launch does not count
ROWS = {"deterministic": Row(0.5, 0.4), "stochastic": Row(0.5, 0.4, 0.2)}


def cases(shape: list[int], device: torch.device) -> dict[str, Callable[[], object]]:
    x, eps = torch.randn(2, *shape, device=device)
    y, seeds = torch.empty_like(x), rng.seed_range(0, shape[0]).to(device)
    prediction = Prediction(eps, p=1.3, q=-0.7)
    impls = ["torch"]
    if device.type == "cuda":
        impls.append("triton")
    if device.type == "cuda" or shutil.which("g++"):
        impls.append("compiled")
    found: dict[str, Callable[[], object]] = {"torch.add": lambda: torch.add(x, eps, out=y)}
    for kind, row in ROWS.items():
        for impl in impls:
            found[f"{kind}, genai, {impl}"] = lambda row=row, impl=impl: affine_step(
                x, prediction, row, seeds=seeds, index=3, clip=1.0, impl=impl
            )
    if device.type == "cuda":
        found |= {
            name + GRAPH: graphed(call) for name, call in found.items() if name == "torch.add" or "triton" in name
        }
    if installed("diffusers"):
        from diffusers import DDIMScheduler, DDPMScheduler

        ddim, ddpm = DDIMScheduler(), DDPMScheduler()
        ddim.set_timesteps(50)
        ddpm.set_timesteps(1000)
        found["deterministic, diffusers DDIM"] = lambda: ddim.step(eps, 500, x)
        found["stochastic, diffusers DDPM"] = lambda: ddpm.step(eps, 500, x)
    if shape[1:2] == [3] and installed("denoising_diffusion_pytorch"):
        lucid = lucidrains(eps)
        found["stochastic, denoising-diffusion-pytorch"] = lambda: lucid(x, 500)
    return found


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """One CUDA graph of CALLS calls."""
    call()  # which compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def lucidrains(eps: torch.Tensor) -> Callable[[torch.Tensor, int], object]:
    """The ancestral step of denoising-diffusion-pytorch with a network that returns eps."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    class Stub(nn.Module):
        channels = out_dim = 3
        self_condition = random_or_learned_sinusoidal_cond = False

        def forward(self, *_) -> torch.Tensor:
            return eps

    return GaussianDiffusion(Stub(), image_size=tuple(eps.shape[2:]), objective="pred_noise").to(eps.device).p_sample


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=["64,3,32,32", "8,3,256,256"])
    return parse(parser, rounds=1, shapes=["2,3,8,8"])


def main() -> None:
    args = arguments()
    device, rows = setup(), []
    for text in args.shapes:
        shape = [int(n) for n in text.split(",")]
        with torch.inference_mode():
            seconds = interleave(cases(shape, device), args.rounds, 3, device, warmup=2)
        for name, values in seconds.items():
            graph = GRAPH if name.endswith(GRAPH) else ""
            units = ratio(values, seconds["torch.add" + graph])
            us = spread(values, 1e6 / (CALLS if graph else 1), 1)
            rows.append({"shape": text, "step": name, "us": us, "units of torch.add": units})
    report("step", args, device, rows, ("shape", "step"), rounds=args.rounds)


if __name__ == "__main__":
    main()
