"""An endless stream of steps, a pure function of (seed, position), whatever the number of workers and ranks."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.data.base import Data, Split

ORDER, AUGMENT = 1, 2  # what a seed is mixed for


class Positions:
    """Position -> index of the item there: each pass over the n items is a fresh permutation."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.epoch = n, seed, -1

    def index(self, positions: torch.Tensor) -> torch.Tensor:
        """Ascending positions int64 (B,) -> indices (B,)."""
        parts = []
        for epoch in range(int(positions[0]) // self.n, int(positions[-1]) // self.n + 1):
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(rng.mix(self.seed, ORDER, epoch))
                self.epoch, self.order = epoch, torch.randperm(self.n, generator=generator)
            parts.append(self.order[positions[positions // self.n == epoch] % self.n])
        return torch.cat(parts)


class Stream(IterableDataset):
    """Yields one step at a time, from step `start`: a list of `accumulate` micro-batches for this rank.

    Micro-batch m of step s on rank r of W holds positions ((s A + m) W + r) B, ..., + B - 1. Augmentation of the item
    at a position draws from Philox with that position as its counter.
    """

    def __init__(self, split: Split, batch_size: int, accumulate: int, seed: int, start: int, rank: int, world: int):
        self.split, self.batch_size, self.accumulate = split, batch_size, accumulate
        self.seed, self.start, self.rank, self.world = seed, start, rank, world

    def __iter__(self) -> Iterator[list[Batch]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        positions = Positions(len(self.split), self.seed)
        step = self.start + first  # the loader takes whole steps from its workers in turn
        while True:
            yield [self.micro_batch(positions, step * self.accumulate + m) for m in range(self.accumulate)]
            step += stride

    def micro_batch(self, positions: Positions, m: int) -> Batch:
        first = (m * self.world + self.rank) * self.batch_size
        at = torch.arange(first, first + self.batch_size)
        draws = None
        if self.split.augments:
            key = torch.tensor([rng.mix(self.seed, AUGMENT)])
            draws = rng.words(key, at, 0, rng.MODEL)[0] / 2**32  # (B, 4)
        return self.split.batch(positions.index(at), draws)


class Loader(DataLoader):
    """A DataLoader in which a worker's UserError stays the one sentence it was, without the worker's traceback."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


def train_loader(data: Data, accumulate: int, seed: int, start: int, rank: int = 0, world: int = 1) -> DataLoader:
    """The training stream of `data` from step `start`; one item is one step."""
    stream = Stream(data.splits["train"], data.batch_size, accumulate, seed, start, rank, world)
    workers = data.num_workers
    return Loader(
        stream,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def batches(split: Split, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The first `limit` items of a split (default all) in order, without augmentation; the last batch may be short."""
    n = len(split) if limit is None else min(limit, len(split))
    for first in range(0, n, batch_size):
        yield split.batch(torch.arange(first, min(first + batch_size, n)), None)
