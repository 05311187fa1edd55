"""The endless stream of training batches: a pure function of seed and position, for any number of workers and ranks.

A run is therefore resumed exactly from its step alone.
"""

import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.data.base import Data, Split

ORDER, AUGMENT = 1, 2  # purposes that the seed is mixed with
POOL = 50  # batches whose items are sorted by length together
DRAW_CHUNK = 4096  # positions drawn at once: one by one, Philox in eager torch takes half a millisecond a step


class Table:
    """An endless table of rows in pages of n, where `page(k)` computes page k; only one page is kept."""

    def __init__(self, n: int, page: Callable[[int], torch.Tensor]):
        self.n, self.page, self.k = n, page, -1

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the rows (B, ...) at ascending positions, int64 (B,)."""
        parts = []
        for k in range(int(positions[0]) // self.n, int(positions[-1]) // self.n + 1):
            if k != self.k:
                self.k, self.open = k, self.page(k)
            parts.append(self.open[positions[positions // self.n == k] % self.n])
        return torch.cat(parts)


class Stream(IterableDataset):
    """Yield one training step at a time, from step `start` on: a list of `accumulate` micro-batches for this rank.

    Micro-batch m of step s on rank r of W holds positions ((s A + m) W + r) B, ..., + B - 1. Augmentation of the item
    at a position draws from Philox with that position as its counter. A split with `lengths` (N,) of its items gives batches of
    items of about one length.
    """

    def __init__(self, split: Split, batch_size: int, accumulate: int, seed: int, start: int, rank: int, world: int):
        self.split, self.batch_size, self.accumulate = split, batch_size, accumulate
        self.seed, self.start, self.rank, self.world = seed, start, rank, world

    def __iter__(self) -> Iterator[list[Batch]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        items, draws = Table(len(self.split), self.order), Table(DRAW_CHUNK, self.draw)
        step = self.start + first  # the loader takes one step from each worker in turn
        while True:
            yield [self.micro_batch(items, draws, step * self.accumulate + m) for m in range(self.accumulate)]
            step += stride

    def order(self, epoch: int) -> torch.Tensor:
        """Return the permutation of the items in one epoch, int64 (N,)."""
        n, size, lengths = len(self.split), self.batch_size, getattr(self.split, "lengths", None)
        generator = torch.Generator().manual_seed(rng.mix(self.seed, ORDER, epoch))
        order = torch.randperm(n, generator=generator)
        if lengths is None:
            return order
        begun = min(-epoch * n % size, n)  # items that end the last batch of the epoch before
        return torch.cat([order[:begun], *by_length(order[begun:], lengths, size, generator)])

    def draw(self, k: int) -> torch.Tensor:
        """Return the draws (DRAW_CHUNK, 4) in [0, 1) of the positions on page k."""
        key = torch.tensor([rng.mix(self.seed, AUGMENT)])
        at = torch.arange(k * DRAW_CHUNK, (k + 1) * DRAW_CHUNK)
        return (rng.words(key, at, 0, rng.MODEL)[0] / 2**32).clamp_max(1 - 2**-24)  # rounding to float32 may give 1

    def micro_batch(self, items: Table, draws: Table, m: int) -> Batch:
        """Return micro-batch m of this rank, counted from the start of training."""
        first = (m * self.world + self.rank) * self.batch_size
        at = torch.arange(first, first + self.batch_size)
        return self.split.batch(items.rows(at), draws.rows(at) if self.split.augments else None)


def by_length(
    order: torch.Tensor, lengths: torch.Tensor, size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield a permutation (N,) in batches of `size` items of about one length, so that little of a batch is padding.

    The items of each POOL batches are sorted by length, those of one length in their order, and the batches put in random
    order. A last batch that is not full stays the last.
    """
    for pool in order.split(POOL * size):
        batches = pool[lengths[pool].argsort(stable=True)].split(size)
        full = len(pool) // size
        for i in torch.randperm(full, generator=generator).tolist():
            yield batches[i]
        yield from batches[full:]


class Loader(DataLoader):
    """A DataLoader that passes on a worker's UserError as one sentence, without the worker's traceback."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


def _ignore_signals(worker: int) -> None:
    """Leave a signal to the whole process group to the training process, which needs its workers to finish the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def train_loader(data: Data, accumulate: int, seed: int, start: int, rank: int = 0, world: int = 1) -> DataLoader:
    """Build the loader of the training stream from step `start`; it yields one step at a time, see `Stream`."""
    stream = Stream(data.splits["train"], data.batch_size, accumulate, seed, start, rank, world)
    workers = data.num_workers
    return Loader(
        stream,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )


def batches(split: Split, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Yield the first `limit` items of a split (default all) in batches, in order, without augmentation."""
    n = len(split) if limit is None else min(limit, len(split))
    for first in range(0, n, batch_size):
        yield split.batch(torch.arange(first, min(first + batch_size, n)), None)
