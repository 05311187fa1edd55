"""Adaptive discriminator augmentation: Karras et al., "Training Generative Adversarial Networks with Limited Data", 2020.

Real and generated images are augmented alike, each transformation with probability p < 1, so the generator has no reason to
produce augmented images; p follows how much the discriminator overfits.
"""

import math

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, at_least, number
from genai.core.precision import KeepBufferPrecision, full_precision, upcast


class Augment(nn.Module):
    """The pixel blitting, geometric and colour transformations of appendix B, images (B, C, H, W) -> the same shape.

    Each argument is a factor of that transformation's probability: 0 never, 1 with probability p. All movements are
    combined into one bilinear lookup, mirrored beyond the edges (the paper filters at twice the resolution). It is
    linear in the image, so its gradient is differentiable.

    Args:
        flip: left to right, half of the time.
        quarter_turns: by 0, 90, 180 or 270 degrees.
        shift: by whole pixels, up to 1/8 of the side.
        scale, stretch: by 2^N(0, 0.2^2), in both directions, or one against the other.
        rotate: by any angle.
        fraction: a shift of N(0, (1/8)^2) of the side.
        brightness: plus N(0, 0.2^2).
        contrast: times 2^N(0, 0.5^2).
        luma_flip: light to dark with the colours kept, half of the time.
        hue, saturation: rotation about the grey axis, and distance from it times 2^N(0, 1); grey images have neither.
    """

    def __init__(
        self,
        flip: float = 1.0,
        quarter_turns: float = 1.0,
        shift: float = 1.0,
        scale: float = 1.0,
        rotate: float = 1.0,
        stretch: float = 1.0,
        fraction: float = 1.0,
        brightness: float = 1.0,
        contrast: float = 1.0,
        luma_flip: float = 1.0,
        hue: float = 1.0,
        saturation: float = 1.0,
    ):
        super().__init__()
        self.factors = {
            "flip": flip,
            "quarter_turns": quarter_turns,
            "shift": shift,
            "scale": scale,
            "rotate": rotate,
            "stretch": stretch,
            "fraction": fraction,
            "brightness": brightness,
            "contrast": contrast,
            "luma_flip": luma_flip,
            "hue": hue,
            "saturation": saturation,
        }
        for name, factor in self.factors.items():
            number(factor, f"model.augment.augment.{name}", 0, 1)

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        """Augment images x (B, C, H, W), each transformation with probability p, a scalar."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UserError(f"model.augment takes images of 1 or 3 channels, got shape {list(x.shape[1:])}")
        with full_precision(x.device):  # positions need more than bfloat16's eight bits
            x = upcast(x)
            x = warp(x, self.movement(x, p))
            matrix, offset = self.colour(x, p)
            return (matrix @ x.flatten(2) + offset).view_as(x)

    def movement(self, x: Tensor, p: Tensor) -> Tensor:
        """Draw where each sample takes its pixels from: (B, 3, 3) on homogeneous (x, y, 1) in pixels about the
        centre."""
        n, (height, width) = len(x), x.shape[2:]
        side = torch.stack([x.new_full((), n) for n in (width, height)])  # a tensor of a list would come from the host
        one = x.new_ones(n)
        where = torch.eye(3, device=x.device, dtype=x.dtype)

        mirrored = self.choose("flip", p, 1 - 2 * torch.randint_like(one, 2), 1.0)
        where = where @ linear(mirrored, 0 * one, 0 * one, one)
        turn = self.choose("quarter_turns", p, torch.randint_like(one, 4), 0.0) * (math.pi / 2)
        where = where @ linear(*(a.round() for a in rotation(turn)))
        whole = (x.new_empty(n, 2).uniform_(-0.125, 0.125) * side).round()
        where = where @ translation(self.choose("shift", p, whole, 0.0))

        size = self.choose("scale", p, torch.exp2(0.2 * torch.randn_like(one)), 1.0)
        where = where @ linear(1 / size, 0 * one, 0 * one, 1 / size)
        # Before or after the stretch, each so that one of them happens with probability p.
        either = 1 - (1 - self.factors["rotate"] * p).sqrt()
        before, after = (
            choose_with_probability(either, torch.empty_like(one).uniform_(-math.pi, math.pi), 0.0) for _ in range(2)
        )
        ratio = self.choose("stretch", p, torch.exp2(0.2 * torch.randn_like(one)), 1.0)
        where = (
            where @ linear(*rotation(before)) @ linear(1 / ratio, 0 * one, 0 * one, ratio) @ linear(*rotation(after))
        )
        return where @ translation(self.choose("fraction", p, 0.125 * torch.randn_like(whole) * side, 0.0))

    def colour(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the colour transformations: matrices (B, C, C) to multiply by and offsets (B, C, 1) to add.

        All of them scale or rotate the grey axis and its complement, so they commute and combine into one formula.
        """
        channels, one = x.shape[1], x.new_ones(len(x), 1, 1)
        brightness = self.choose("brightness", p, 0.2 * torch.randn_like(one), 0.0)
        contrast = self.choose("contrast", p, torch.exp2(0.5 * torch.randn_like(one)), 1.0)
        luma = self.choose("luma_flip", p, 1 - 2 * torch.randint_like(one, 2), 1.0)
        angle = self.choose("hue", p, torch.empty_like(one).uniform_(-math.pi, math.pi), 0.0)
        saturation = self.choose("saturation", p, torch.exp2(torch.randn_like(one)), 1.0)

        identity = torch.eye(channels, device=x.device, dtype=x.dtype)
        grey = torch.full_like(identity, 1 / channels)  # the projection on the grey axis
        matrix = identity + (luma - 1) * grey
        if channels == 3:
            turn = (identity.roll(1, 0) - identity.roll(-1, 0)) / math.sqrt(3)  # the cross product with that axis
            matrix = matrix + (saturation * angle.cos() - 1) * (identity - grey) + saturation * angle.sin() * turn
        return contrast * matrix, (contrast * luma * brightness).expand(-1, channels, -1)

    def choose(self, name: str, p: Tensor, value: Tensor, neutral: float) -> Tensor:
        """Return value (B, ...) with the probability of the named transformation, else `neutral`."""
        return choose_with_probability(self.factors[name] * p, value, neutral)


def choose_with_probability(p: Tensor, value: Tensor, neutral: float) -> Tensor:
    """Return value (B, ...) for each sample with probability p, else `neutral`."""
    picked = torch.rand(len(value), *[1] * (value.ndim - 1), device=value.device) < p
    return value.where(picked, neutral)


def rotation(angle: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four entries, row by row, of the rotation matrix back by an angle (B,)."""
    return angle.cos(), angle.sin(), -angle.sin(), angle.cos()


def linear(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return the homogeneous matrices (B, 3, 3) of [[a, b], [c, d]], entries (B,)."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([a, b, zero, c, d, zero, zero, zero, one], 1).view(-1, 3, 3)


def translation(by: Tensor) -> Tensor:
    """Return the homogeneous matrices (B, 3, 3) of the translation back by (B, 2)."""
    zero, one = torch.zeros_like(by[:, 0]), torch.ones_like(by[:, 0])
    return torch.stack([one, zero, -by[:, 0], zero, one, -by[:, 1], zero, zero, one], 1).view(-1, 3, 3)


def warp(x: Tensor, where: Tensor) -> Tensor:
    """Resample x (B, C, H, W) at the positions that `where` (B, 3, 3) maps each pixel to, bilinear, mirrored at the
    edges.

    It takes four gathers, since the gradient of `grid_sample` is not differentiable.
    """
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2
    columns = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    positions = torch.stack([column.flatten(), row.flatten(), torch.ones_like(row.flatten())])  # (3, HW)
    source = where[:, :2] @ positions
    left, right, u = neighbours(source[:, 0] + (width - 1) / 2, width)
    top, bottom, v = neighbours(source[:, 1] + (height - 1) / 2, height)
    flat = x.flatten(2)

    def take(row: Tensor, column: Tensor) -> Tensor:
        return flat.gather(2, (row * width + column)[:, None].expand(-1, x.shape[1], -1))

    above = take(top, left) * (1 - u) + take(top, right) * u
    below = take(bottom, left) * (1 - u) + take(bottom, right) * u
    return (above * (1 - v) + below * v).view_as(x)


def neighbours(place: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices (B, P) of the pixels on both sides of positions in a mirrored row of n, and the second's
    weight (B, 1, P)."""
    last = n - 1
    place = last - (place.abs() % max(2 * last, 1) - last).abs()
    low = place.floor().clamp(0, last)
    return low.long(), (low + 1).clamp_max(last).long(), (place - low)[:, None]


class ADA(KeepBufferPrecision):
    """Augmentation whose probability p rises while the discriminator overfits, and falls while it does not (section 3).

    Args:
        augment: the transformations.
        p: initial probability.
        target: target of r_t, the mean sign of the discriminator's logits of real images.
        interval_steps: steps between two updates of p.
        ramp_images: real images over which p can go from 0 to 1.

    Raises UserError for an argument out of range.
    """

    p: Tensor
    signs: Tensor
    """The sum of signs since p was last updated, and their number, (2,)."""

    def __init__(
        self, augment: Augment, p: float = 0.0, target: float = 0.6, interval_steps: int = 4, ramp_images: int = 500_000
    ):
        super().__init__()
        self.augment, self.target = augment, number(target, "model.augment.target", -1, 1)
        self.interval_steps = at_least(interval_steps, 1, "model.augment.interval_steps")
        self.ramp_images = at_least(ramp_images, 1, "model.augment.ramp_images")
        self.register_buffer("p", torch.tensor(float(number(p, "model.augment.p", 0, 1))))
        self.register_buffer("signs", torch.zeros(2))
        self.step: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Augment images (B, C, H, W) with the present p."""
        return self.augment(x, self.p)

    @torch.no_grad()
    def update(self, real_logits: Tensor, step: int) -> None:
        """Count the signs of a micro-batch of logits (B,); the first one of every interval updates p from the last
        interval."""
        if step % self.interval_steps == 0 and step != self.step:
            self.move()
        self.step = step
        self.signs += torch.stack([real_logits.sign().sum(), torch.full_like(self.p, len(real_logits))])

    def move(self) -> None:
        """Update p += sign(r_t - target) images / ramp within [0, 1]; no images, no update."""
        signs = self.signs.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(signs)
        # Without real images since the last move both are 0, and so is r.
        r = signs[0] / signs[1].clamp_min(1)
        self.p.add_((r - self.target).sign() * signs[1] / self.ramp_images).clamp_(0, 1)
        self.signs.zero_()
