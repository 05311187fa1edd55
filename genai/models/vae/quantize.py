"""Quantisers: continuous latents (B, D, ...) to codes and back, with a gradient that passes through."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, at_least, number
from genai.core.precision import KeepBufferPrecision, no_autocast


class Quantized(NamedTuple):
    """What a quantiser makes of z (B, D, ...)."""

    z: Tensor
    """The nearest that the book holds, of z's shape; its gradient goes to the encoder."""
    index: Tensor
    """Codes, int64 (B, ..., levels of the quantiser)."""
    commitment: Tensor
    """Squared distance of the encoder's answer to its code, mean over all numbers: a loss of the encoder alone."""


class Quantizer(KeepBufferPrecision):
    """What all are: z (B, D, ...) -> Quantized, and codes (B, ..., depth) back to (B, D, ...)."""

    codes: int
    """How many there are to choose from."""
    depth: int = 1
    """How many are chosen at each place."""
    dim: int
    """D."""

    def forward(self, z: Tensor) -> Quantized:
        raise NotImplementedError

    def decode(self, index: Tensor) -> Tensor:
        raise NotImplementedError


class VectorQuantizer(Quantizer):
    """The nearest of `codes` vectors (van den Oord et al., 2017), which follow the mean of what chose them (appendix A.1).

    Args:
        codes: in the book.
        dim: D.
        decay: of the moving averages that make the book.
        restart: a code chosen less often than this, in the moving average of a batch, begins anew at a random latent of
            the batch (Dhariwal et al., 2020, section 3.1); 0 never.
        gradient: "straight_through" copies the gradient at the code to the latent; "rotation" turns and scales it as the
            latent is turned and scaled onto its code (Fifty et al., 2024, eq. 4).
    """

    book: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self, codes: int, dim: int, decay: float = 0.99, restart: float = 1.0, gradient: str = "straight_through"
    ):
        super().__init__()
        at_least(codes, 2, "codes")
        number(decay, "decay", 0, 1)
        number(restart, "restart", 0)
        if gradient not in ("straight_through", "rotation"):
            raise UserError(f"gradient={gradient} is neither straight_through nor rotation")
        self.codes, self.dim, self.decay, self.restart, self.gradient = codes, dim, decay, restart, gradient
        book = torch.randn(codes, dim) / dim**0.5
        self.register_buffer("book", book)
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", book.clone())

    def forward(self, z: Tensor) -> Quantized:
        flat = z.movedim(1, -1).flatten(0, -2)  # (N, D)
        index = self.nearest(flat.detach())
        code = self.book[index]
        if self.training:
            self.learn(flat.detach(), index)
        commitment = (flat - code).square().mean()
        out = rotate_gradient(flat, code) if self.gradient == "rotation" else flat + (code - flat).detach()
        shape = z.movedim(1, -1).shape
        return Quantized(out.view(shape).movedim(-1, 1), index.view(*shape[:-1], 1), commitment)

    def nearest(self, x: Tensor) -> Tensor:
        """(N, D) -> the index of the closest code (N,), in the book's own precision."""
        with no_autocast(x.device):
            return (self.book.square().sum(1) - 2 * x.to(self.book) @ self.book.T).argmin(1)

    def decode(self, index: Tensor) -> Tensor:
        """Codes (B, ..., 1) -> (B, D, ...)."""
        return self.book[index[..., 0]].movedim(-1, 1)

    @torch.no_grad()
    def learn(self, x: Tensor, index: Tensor) -> None:
        """Move counts, sums and their quotients, the codes, towards this batch of all ranks; restart the dead."""
        chosen = occurrences(index, self.codes).to(self.counts)
        total = torch.zeros_like(self.sums).index_add_(0, index, x.to(self.sums))
        fresh = x[torch.randint(len(x), (self.codes,), device=x.device)].contiguous()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(chosen)
            torch.distributed.all_reduce(total)
            torch.distributed.broadcast(fresh, 0)
        self.counts.lerp_(chosen, 1 - self.decay)
        self.sums.lerp_(total, 1 - self.decay)
        dead = self.counts < self.restart
        self.counts.masked_fill_(dead, max(self.restart, 1.0))
        self.sums.copy_(torch.where(dead[:, None], fresh * max(self.restart, 1.0), self.sums))
        self.book.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])


def occurrences(index: Tensor, codes: int) -> Tensor:
    """How often each code occurs in `index`, float32 (codes,), exact below 2^24; torch.bincount waits for the device."""
    flat = index.flatten()
    return torch.zeros(codes, device=flat.device).index_add_(0, flat, torch.ones(flat.shape, device=flat.device))


class ResidualQuantizer(Quantizer):
    """Each stage quantises what those before left over (Zeghidour et al., 2021, algorithm 1); the gradient is straight through.

    Raises UserError for no stages, or such with different numbers of codes, of another dim or another gradient.
    """

    def __init__(self, stages: Sequence[VectorQuantizer]):
        super().__init__()
        same = len({(stage.codes, stage.dim) for stage in stages}) == 1
        if not same or any(s.gradient != "straight_through" for s in stages):
            raise UserError(
                "stages of a residual quantiser need as many codes and the same dim each, and gradient=straight_through"
            )
        self.stages = nn.ModuleList(stages)
        self.codes, self.dim, self.depth = stages[0].codes, stages[0].dim, len(stages)

    def forward(self, z: Tensor) -> Quantized:
        rest, total, index, commitment = z, torch.zeros_like(z), [], []
        for stage in self.stages:
            part = stage(rest)
            total, rest = total + part.z.detach(), rest - part.z.detach()
            index.append(part.index)
            commitment.append(part.commitment)
        return Quantized(z + (total - z).detach(), torch.cat(index, -1), torch.stack(commitment).mean())

    def decode(self, index: Tensor) -> Tensor:
        parts = [stage.decode(index[..., k : k + 1]) for k, stage in enumerate(self.stages)]  # type: ignore[operator]
        return torch.stack(parts).sum(0)


class FiniteScalarQuantizer(Quantizer):
    """Each of D numbers is bounded and rounded to one of its few levels; no book to learn (Mentzer et al., 2023, eq. 1).

    As the paper's appendix A.1 bounds them: tanh(z + s) h - o with h = (L - 1) (1 - 1e-3) / 2, and for an even L, whose
    levels lie half a step off, o = 1/2 and s = tan(o / h). h and s are in the state; one without them is of a time at
    which they were (L - 1) (1 + 1e-3) / 2 and artanh(o / h), and keeps that meaning.

    Args:
        levels: of each number, odd or even, at least 2; the codes are their product.
    """

    count: Tensor
    height: Tensor
    shift: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        for level in levels:
            at_least(level, 2, "levels")
        self.levels, self.codes, self.dim = list(levels), math.prod(levels), len(levels)
        count = torch.tensor(levels, dtype=torch.float32)
        half = (count - 1) * (1 - 1e-3) / 2
        self.register_buffer("count", count, persistent=False)
        self.register_buffer("height", half)
        self.register_buffer("shift", torch.tan(self.offset / half))

    @property
    def offset(self) -> Tensor:
        return torch.where(self.count % 2 == 0, 0.5, 0.0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}height" not in state_dict and f"{prefix}shift" not in state_dict:
            half = (self.count - 1) * (1 + 1e-3) / 2
            state_dict |= {f"{prefix}height": half, f"{prefix}shift": torch.atanh(self.offset / half)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, z: Tensor) -> Quantized:
        x = z.movedim(1, -1)
        bounded = self.bound(x)
        out = bounded + (bounded.round() - bounded).detach()
        digits = (out.detach() + (self.count / 2).floor()).round().long()
        index = torch.zeros_like(digits[..., 0])
        for k, level in enumerate(self.levels):
            index = index * level + digits[..., k]
        return Quantized((out / (self.count / 2).floor()).movedim(-1, 1), index[..., None], z.new_zeros(()))

    def bound(self, x: Tensor) -> Tensor:
        """Numbers between the outer levels; even counts are shifted by half a level, so that rounding has as many."""
        return torch.tanh(x + self.shift) * self.height - self.offset

    def decode(self, index: Tensor) -> Tensor:
        rest, digits = index[..., 0], []
        for level in reversed(self.levels):
            digits.append(rest % level)
            rest = rest // level
        half = (self.count / 2).floor()
        return ((torch.stack(digits[::-1], -1) - half) / half).movedim(-1, 1)


def rotate_gradient(x: Tensor, code: Tensor) -> Tensor:
    """The codes (N, D) as a rotation and scaling of x, held constant: gradients turn back by the same angle."""
    length, target = x.norm(dim=-1, keepdim=True), code.norm(dim=-1, keepdim=True)
    e, q = (x / length.clamp_min(1e-6)).detach(), (code / target.clamp_min(1e-6)).detach()
    r = torch.nn.functional.normalize(e + q, dim=-1)
    scale = (target / length.clamp_min(1e-6)).detach()
    turned = x - 2 * r * (r * x).sum(-1, keepdim=True) + 2 * q * (e * x).sum(-1, keepdim=True)
    return scale * turned
