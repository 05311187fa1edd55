"""Quantisers: continuous latents (B, D, ...) to codes and back, with an estimate of the gradient."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, at_least, number
from genai.core.precision import KeepBufferPrecision, no_autocast


class Quantized(NamedTuple):
    """The output of a quantiser for z (B, D, ...)."""

    z: Tensor
    """The quantised latents, of z's shape; their gradient passes to the encoder."""
    index: Tensor
    """Codes, int64 (B, ..., depth)."""
    loss: Tensor
    """The quantiser's own loss, a scalar that is added to the reconstruction error; `Quantizer.loss` names it."""


class Quantizer(KeepBufferPrecision):
    """The base class: z (B, D, ...) -> Quantized, and codes int64 (B, ..., depth) back to (B, D, ...)."""

    loss: str = "commitment"
    """The name of its loss: the mean squared distance of the latents to their codes, or another."""
    codes: int
    """Number of codes to choose from."""
    depth: int = 1
    """Number of codes per position."""
    dim: int
    """D, the number of channels."""

    def forward(self, z: Tensor, step: int = 0) -> Quantized:
        """Quantise z (B, D, ...) in update `step` of a training."""
        raise NotImplementedError

    def decode(self, index: Tensor) -> Tensor:
        """Map codes int64 (B, ..., depth) to vectors (B, D, ...)."""
        raise NotImplementedError


class VectorQuantizer(Quantizer):
    """A codebook whose nearest vector replaces each latent (van den Oord et al., 2017).

    Each code follows the moving average of the latents assigned to it (appendix A.1).

    Args:
        codes: size of the codebook.
        dim: D, the length of a vector.
        decay: decay of the moving averages.
        restart: a code assigned less often than this, in the moving average over batches, restarts at a random latent
            of the batch (Dhariwal et al., 2020, section 3.1); 0 for never.
        gradient: "straight_through" copies the gradient at the code to the latent; "rotation" rotates and scales it as
            the latent is rotated and scaled onto its code (Fifty et al., 2024, eq. 4).

    Raises UserError for an argument out of range.
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

    def forward(self, z: Tensor, step: int = 0) -> Quantized:
        """Quantise z (B, D, ...); in training mode the codebook is updated."""
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
        """Return the index (N,) of the code closest to each x (N, D), in the codebook's own precision."""
        with no_autocast(x.device):
            return (self.book.square().sum(1) - 2 * x.to(self.book) @ self.book.T).argmin(1)

    def decode(self, index: Tensor) -> Tensor:
        """Map codes int64 (B, ..., 1) to vectors (B, D, ...)."""
        return self.book[index[..., 0]].movedim(-1, 1)

    @torch.no_grad()
    def learn(self, x: Tensor, index: Tensor) -> None:
        """Update the moving averages and the codes from latents x (N, D) of all ranks; restart unused codes."""
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
        # The count of a code without assignments decays towards 0; the bound avoids 0 / 0.
        self.book.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])


def occurrences(index: Tensor, codes: int) -> Tensor:
    """Count how often each code occurs in `index` -> float32 (codes,), exact below 2^24.

    torch.bincount would make the host wait for the device.
    """
    flat = index.flatten()
    return torch.zeros(codes, device=flat.device).index_add_(0, flat, torch.ones(flat.shape, device=flat.device))


class ResidualQuantizer(Quantizer):
    """A chain of codebooks: each stage quantises the residual of those before (Zeghidour et al., 2021, algorithm 1).

    The gradient is straight through. Raises UserError for no stages, or stages that differ in codes or dim, or have
    another gradient.
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

    def forward(self, z: Tensor, step: int = 0) -> Quantized:
        """Quantise z (B, D, ...), with one code per stage."""
        rest, total, index, losses = z, torch.zeros_like(z), [], []
        for stage in self.stages:
            part = stage(rest, step)
            total, rest = total + part.z.detach(), rest - part.z.detach()
            index.append(part.index)
            losses.append(part.loss)
        return Quantized(z + (total - z).detach(), torch.cat(index, -1), torch.stack(losses).mean())

    def decode(self, index: Tensor) -> Tensor:
        """Map codes int64 (B, ..., stages) to vectors (B, D, ...)."""
        parts = [stage.decode(index[..., k : k + 1]) for k, stage in enumerate(self.stages)]  # type: ignore[operator]
        return torch.stack(parts).sum(0)


class FiniteScalarQuantizer(Quantizer):
    """A quantiser without a codebook: each of D numbers is bounded and rounded to a few levels (Mentzer et al., 2023,
    eq. 1).

    The bound is that of the paper's appendix A.1: tanh(z + s) h - o with h = (L - 1) (1 - 1e-3) / 2, and for an even L,
    whose levels lie half a step off, o = 1/2 and s = tan(o / h). h and s are in the state; an older state without them
    means (L - 1) (1 + 1e-3) / 2 and artanh(o / h).

    Args:
        levels: number of levels of each element, odd or even, at least 2; their product is the number of codes.

    Raises UserError for fewer than 2 levels.
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
        """The offset o of each element, (D,)."""
        return torch.where(self.count % 2 == 0, 0.5, 0.0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        if f"{prefix}height" not in state_dict and f"{prefix}shift" not in state_dict:
            half = (self.count - 1) * (1 + 1e-3) / 2
            state_dict |= {f"{prefix}height": half, f"{prefix}shift": torch.atanh(self.offset / half)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, z: Tensor, step: int = 0) -> Quantized:
        """Quantise z (B, D, ...); the gradient of the rounding is straight through."""
        x = z.movedim(1, -1)
        bounded = self.bound(x)
        out = bounded + (bounded.round() - bounded).detach()
        digits = (out.detach() + (self.count / 2).floor()).round().long()
        index = torch.zeros_like(digits[..., 0])
        for k, level in enumerate(self.levels):
            index = index * level + digits[..., k]
        return Quantized((out / (self.count / 2).floor()).movedim(-1, 1), index[..., None], z.new_zeros(()))

    def bound(self, x: Tensor) -> Tensor:
        """Bound x (..., D) to the outer levels; even numbers of levels are shifted by half a level."""
        return torch.tanh(x + self.shift) * self.height - self.offset

    def decode(self, index: Tensor) -> Tensor:
        """Map codes int64 (B, ..., 1) to vectors (B, D, ...)."""
        rest, digits = index[..., 0], []
        for level in reversed(self.levels):
            digits.append(rest % level)
            rest = rest // level
        half = (self.count / 2).floor()
        return ((torch.stack(digits[::-1], -1) - half) / half).movedim(-1, 1)


class GumbelSoftmax(Quantizer):
    """Latents that are the logits of codes; codes are one-hot vectors, relaxed in training (Ramesh et al., 2021, section 2.1).

    In training the decoder gets softmax((z + g) / t) with Gumbel noise g (Jang et al., 2017, eq. 2), whose temperature t falls
    from `start` to `end` along a half cosine (appendix A.2 of the former); else the one-hot vector of the largest logit. The loss
    is the KL divergence of softmax(z) to the uniform distribution, in nats per code.

    Args:
        codes: number of codes, and of channels.
        start, end: the first and the last temperature.
        anneal_steps: updates in which it falls.

    Raises UserError for an argument out of range.
    """

    loss = "kl"

    def __init__(self, codes: int, start: float = 1.0, end: float = 1 / 16, anneal_steps: int = 1):
        super().__init__()
        self.codes = self.dim = at_least(codes, 2, "codes")
        self.start, self.end = (number(t, name, 0, open_low=True) for t, name in ((start, "start"), (end, "end")))
        self.anneal_steps = at_least(anneal_steps, 1, "anneal_steps")

    def temperature(self, step: int) -> float:
        """Return the temperature of an update."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(step / self.anneal_steps, 1))) / 2

    def forward(self, z: Tensor, step: int = 0) -> Quantized:
        """Quantise logits z (B, codes, ...); draws from torch's generator in training mode."""
        log_p = z.log_softmax(1)
        kl = (log_p.exp() * log_p).sum(1).mean() + math.log(self.codes)
        if not self.training:
            index = z.argmax(1)[..., None]
            return Quantized(self.decode(index).to(z), index, kl)
        noisy = z - torch.empty_like(z).exponential_().log()
        return Quantized((noisy / self.temperature(step)).softmax(1), noisy.argmax(1)[..., None], kl)

    def decode(self, index: Tensor) -> Tensor:
        """Map codes int64 (B, ..., 1) to one-hot vectors (B, codes, ...)."""
        return F.one_hot(index[..., 0], self.codes).movedim(-1, 1).float()


def rotate_gradient(x: Tensor, code: Tensor) -> Tensor:
    """Return the codes (N, D) as a constant rotation and scaling of x (N, D), so that gradients are rotated back."""
    length, target = x.norm(dim=-1, keepdim=True), code.norm(dim=-1, keepdim=True)
    e, q = (x / length.clamp_min(1e-6)).detach(), (code / target.clamp_min(1e-6)).detach()
    r = F.normalize(e + q, dim=-1)
    scale = (target / length.clamp_min(1e-6)).detach()
    turned = x - 2 * r * (r * x).sum(-1, keepdim=True) + 2 * q * (e * x).sum(-1, keepdim=True)
    return scale * turned
