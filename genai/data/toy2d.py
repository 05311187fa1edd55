"""Two-dimensional toy distributions, on which a model's samples can be inspected by eye."""

from collections.abc import Callable, Sequence

import numpy as np

from genai.core.errors import UserError, at_least
from genai.data.base import Arrays, Data


def moons(n: int, generator: np.random.Generator) -> np.ndarray:
    """Draw n points (n, 2) of two interleaved half circles."""
    angle, side = generator.uniform(0, np.pi, n), generator.integers(0, 2, n)
    x = np.stack([np.cos(angle) * (1 - 2 * side) + side - 0.5, np.sin(angle) * (1 - 2 * side) + side * 0.5 - 0.25], 1)
    return 1.5 * x + generator.normal(0, 0.1, (n, 2))


def swiss_roll(n: int, generator: np.random.Generator) -> np.ndarray:
    """Draw n points (n, 2) of a spiral of one and a half turns."""
    angle = 1.5 * np.pi * (1 + 2 * np.sqrt(generator.uniform(0, 1, n)))
    return angle[:, None] / 5 * np.stack([np.cos(angle), np.sin(angle)], 1) + generator.normal(0, 0.1, (n, 2))


def checkerboard(n: int, generator: np.random.Generator) -> np.ndarray:
    """Draw n points (n, 2) of the dark squares of a 4x4 board on [-2, 2]^2."""
    x, row = generator.uniform(-2, 2, n), generator.integers(0, 2, n)
    y = generator.uniform(0, 1, n) + 2 * row - 2 + np.floor(x) % 2
    return np.stack([x, y], 1)


def eight_gaussians(n: int, generator: np.random.Generator) -> np.ndarray:
    """Draw n points (n, 2) of eight narrow Gaussians on a circle of radius 2."""
    angle = generator.integers(0, 8, n) * np.pi / 4
    return 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + generator.normal(0, 0.15, (n, 2))


SHAPES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "moons": moons,
    "swiss_roll": swiss_roll,
    "checkerboard": checkerboard,
    "eight_gaussians": eight_gaussians,
}


class Toy2D(Data):
    """A data set of `n` training points of one of SHAPES, and a tenth as many for validation and test each; no labels.

    Raises UserError for a distribution that is not in SHAPES.
    """

    def __init__(
        self,
        distribution: str,
        n: int,
        field: str,
        shape: Sequence[int],
        classes: None,
        levels: None,
        batch_size: int,
        num_workers: int = 0,
    ):
        if distribution not in SHAPES:
            raise UserError(f"data.distribution={distribution!r} must be one of {', '.join(SHAPES)}")
        at_least(n, 1, "data.n")
        generator = np.random.default_rng(0)
        draw = SHAPES[distribution]
        sizes = {"train": n, "val": max(n // 10, 1), "test": max(n // 10, 1)}
        super().__init__(
            field=field,
            shape=shape,
            classes=classes,
            levels=levels,
            batch_size=batch_size,
            num_workers=num_workers,
            splits={k: Arrays(field, draw(size, generator).astype(np.float32), None) for k, size in sizes.items()},
            found_shape=[2],
            class_names=None,
            found_levels=None,
        )
