"""Which levels to visit: distance to the exact ODE for each solver, path, spacing and number of steps.

    python -m benchmarks.solvers [--n 128] [--steps 5 10 20 50]

The data are a mixture of Gaussians, one for each of the ten digits, with the mean and covariance of the training images (8x8, in
[-1, 1]), so that the denoiser is exact and the only error is the solver's: the root mean square over pixels of what it makes
of a seed less what Heun's method makes of it in 400 steps spaced in log SNR. A path names the spacing that is best for most
solvers (`spacing` in genai/models/diffusion/process/paths.py and schedules.py). Prints a table for the README and writes
results/solvers.json.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import RESULTS, parse, setup
from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Denoiser, Prediction
from genai.data.images import Digits
from genai.data.stream import batches
from genai.models.diffusion.process import schedules
from genai.models.diffusion.process.paths import CLEAN, LinearPath, Path, VarianceExploding
from genai.models.diffusion.sampling import tables
from genai.models.diffusion.sampling.samplers import run_table

PATHS: dict[str, Path] = {"DDPM": schedules.cosine(200), "EDM": VarianceExploding(), "Flow": LinearPath()}
SOLVERS = {"ddim": tables.ddim, "dpmpp_2m": tables.dpmpp_2m, "heun": tables.heun, "midpoint": tables.midpoint}
SPACINGS = ("trailing", "leading", "linspace", "karras", "log_snr")
ENDS = {"sigma_min": 0.002, "sigma_max": 80.0}  # EDM's, for spacings that a path from pure noise to clean data has not
SMOOTH = 0.01  # variance added to each pixel, of which some never change


def mixture() -> Callable[[Path], Denoiser]:
    """The exact denoiser along a path, float64."""
    data = Digits("image", [1, 8, 8], 10, 17, 64, 0)
    batch = next(batches(data.splits["train"], 1437, 1437))
    x, label = batch["image"].flatten(1).double(), batch["label"]
    mean = torch.stack([x[label == k].mean(0) for k in range(10)])
    cov = torch.stack([torch.cov(x[label == k].T) for k in range(10)]) + SMOOTH * torch.eye(64)
    variance, basis = torch.linalg.eigh(cov)
    log_share = label.bincount().double().div(len(x)).log()

    def along(path: Path) -> Denoiser:
        def denoise(x: Tensor, t: float) -> Prediction:
            _, alpha, sigma = path.marginal(t)
            total = alpha**2 * variance + sigma**2
            z = torch.einsum("kij,bki->bkj", basis, x[:, None] - alpha * mean)  # (B, 10, 64)
            log = log_share - 0.5 * (z**2 / total).sum(-1) - 0.5 * total.log().sum(-1)
            each = mean + torch.einsum("kij,bkj->bki", basis, alpha * variance / total * z)
            return Prediction((log.softmax(-1)[..., None] * each).sum(1))

        return denoise

    return along


def errors(path: Path, denoise: Denoiser, n: int, steps: list[int]) -> dict[str, dict[str, list[float | None]]]:
    """Root mean square error by solver and spacing, None for what the path has not."""
    seeds = rng.seed_range(0, n)
    eps, start = rng.normal(seeds, (64,)).double(), path.marginal(path.t_max)

    def solved(solver: tables.Solver, levels: list) -> Tensor:
        return run_table(denoise, solver(path, levels), levels[0].sigma * eps, seeds)

    high = start if start.alpha else path.marginal_of_ratio(1e4)
    low = path.marginal(path.t_min) if path.marginal(path.t_min).sigma else path.marginal_of_ratio(1e-3)
    ratios = [high.ratio * (low.ratio / high.ratio) ** (k / 400) for k in range(401)]
    exact = solved(tables.heun, [start, *(path.marginal_of_ratio(ratio) for ratio in ratios[1:]), CLEAN])
    found: dict[str, dict[str, list[float | None]]] = {}
    for spacing in SPACINGS:
        for name, solver in SOLVERS.items():
            row = found.setdefault(spacing, {}).setdefault(name, [])
            for k in steps:
                try:
                    levels = tables.discretize(path, k, spacing)  # type: ignore[arg-type]
                except UserError:
                    levels = tables.discretize(path, k, spacing, **ENDS)  # type: ignore[arg-type]
                row.append(round((solved(solver, levels) - exact).square().mean().sqrt().item(), 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    args = parse(parser, n=2, steps=[5])
    setup()
    along = mixture()
    rows = {name: errors(path, along(path), args.n, args.steps) for name, path in PATHS.items()}
    print("| path | spacing |" + "".join(f" `{name}` |" for name in SOLVERS))
    print("|---|---|" + "---|" * len(SOLVERS))
    for path, found in rows.items():
        for spacing, row in found.items():
            shown = f"**{spacing}**" if spacing == PATHS[path].spacing else spacing
            cells = (" ".join("-" if e is None else f"{e:.3f}".lstrip("0") for e in row[name]) for name in SOLVERS)
            print(f"| {path} | {shown} |" + "".join(f" {cell} |" for cell in cells))
    if not args.toy:
        result = {"n": args.n, "steps": args.steps, "rms": rows}
        (RESULTS / "solvers.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
