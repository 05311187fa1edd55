"""A split of several corpora: mixed in proportions in training, each as a whole in evaluation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genai.core.protocols import Batch
from genai.data.fingerprint import checksum
from genai.data.token_files import Windows


class Mixture:
    """The windows of several corpora, by name.

    With draws, each window is of a corpus with the probability of its share, and begins at any of its tokens alike: the stream's
    own draws decide, so that training goes on exactly wherever it was stopped. Without, there is each window of each
    corpus once, in an order in which the first ones are a fair sample.

    Args:
        parts: the same split of each corpus.
        proportions: of the corpora, which need not sum to 1.
    """

    def __init__(self, parts: Mapping[str, Windows], proportions: Sequence[float]):
        self.parts, (first, *_) = dict(parts), parts.values()
        self.length, self.overlap, self.augments = first.length, first.overlap, first.augments
        self.tokens, self.characters = (
            sum(getattr(part, key) for part in parts.values()) for key in ("tokens", "characters")
        )
        share = torch.tensor(proportions, dtype=torch.float64)
        self.shares = share / share.sum()
        sizes = [len(part) for part in parts.values()]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        place = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in sizes])
        within = torch.cat([torch.arange(n) for n in sizes])
        order = place.argsort(stable=True)
        self.owner, self.within = owner[order], within[order]
        """The corpus of each item, and the index of its window in that corpus, int64 (N,) both."""

    def __len__(self) -> int:
        return len(self.owner)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        if not self.augments or draws is None:
            return self.gather(self.owner[index], self.within[index], None)
        sizes = torch.tensor([len(part) for part in self.parts.values()])
        u = draws.double()
        owner = torch.searchsorted(self.shares.cumsum(0), u[:, 1].contiguous(), right=True).clamp_max(len(sizes) - 1)
        fine = u[:, 2] + u[:, 3] * 2**-24  # of a draw there are only 2^24 values
        return self.gather(owner, (fine * sizes[owner]).long().minimum(sizes[owner] - 1), draws)

    def gather(self, owner: Tensor, within: Tensor, draws: Tensor | None) -> Batch:
        """Return the windows `within` (B,) of the corpora `owner` (B,)."""
        rows, found = torch.empty(len(owner), dtype=torch.int64), []
        for k, part in enumerate(self.parts.values()):
            at = (owner == k).nonzero()[:, 0]
            if len(at):
                rows[at] = torch.arange(len(at)) + sum(len(batch["tokens"]) for batch in found)
                found.append(part.batch(within[at], None if draws is None else draws[at]))
        return {name: torch.cat([batch[name] for batch in found])[rows] for name in found[0]}

    def fingerprint(self, quick: bool) -> str:
        """Return a checksum of the corpora with their shares."""
        return checksum([part.fingerprint(quick) for part in self.parts.values()], self.shares)
