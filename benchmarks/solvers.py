"""Error of each solver against the exact ODE.

    python -m benchmarks.solvers [--n 128] [--steps 5 10 20 50]

It is given for each path, spacing and number of steps. The data are a mixture of Gaussians, one for each of the ten digits,
with the mean and covariance of the training images (8x8, in [-1, 1]), so the denoiser is exact and the only error is the
solver's: the root mean square over pixels, in x / (alpha + sigma), of its result for a seed minus the result of Heun's method
in 400 steps spaced in log SNR. The default spacing of a path (`spacing` in genai/models/diffusion/process/paths.py and
schedules.py) is the best for most solvers. Heun's method and midpoint call the network twice a step. Flow has spacings other
than trailing only between `sigma_min=0.002 sigma_max=80`.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import parse, report, setup
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
ENDS = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}  # EDM's, for spacings that a path from pure noise to clean data does not have
SMOOTH = 0.01  # variance added to each pixel, since some never change


def mixture() -> Callable[[Path], Denoiser]:
    """A function from a path to the exact denoiser along it, in float64."""
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
    """Root mean square errors by spacing and solver, one for each number of steps."""
    seeds = rng.seed_range(0, n)
    eps, start = rng.normal(seeds, (64,)).double(), path.marginal(path.t_max)

    def solve(solver: tables.Solver, marginals: list) -> Tensor:
        return run_table(denoise, solver(path, marginals), marginals[0].sigma * eps, seeds)

    high = start if start.alpha else path.marginal_of_ratio(1e4)
    low = path.marginal(path.t_min) if path.marginal(path.t_min).sigma else path.marginal_of_ratio(1e-3)
    ratios = [high.ratio * (low.ratio / high.ratio) ** (k / 400) for k in range(401)]
    exact = solve(tables.heun, [start, *(path.marginal_of_ratio(ratio) for ratio in ratios[1:]), CLEAN])
    found: dict[str, dict[str, list[float | None]]] = {}
    for spacing in SPACINGS:
        for name, solver in SOLVERS.items():
            row = found.setdefault(spacing, {}).setdefault(name, [])
            for k in steps:
                try:
                    marginals = tables.discretize(path, k, spacing)  # type: ignore[arg-type]
                except UserError:
                    marginals = tables.discretize(path, k, spacing, **ENDS)  # type: ignore[arg-type]
                row.append(round((solve(solver, marginals) - exact).square().mean().sqrt().item(), 3))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    return parse(parser, n=2, steps=[5])


def main() -> None:
    args = arguments()
    setup()
    along, rows = mixture(), []
    for name, path in PATHS.items():
        for spacing, found in errors(path, along(path), args.n, args.steps).items():
            default = " (default)" if spacing == path.spacing else ""
            rows.append({"path": name, "spacing": spacing + default, **found})
    report("solvers", args, torch.device("cpu"), rows, ("path", "spacing"), n=args.n, steps=args.steps)


if __name__ == "__main__":
    main()
