"""The two networks of StyleGAN2: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.precision import KeepBufferPrecision, downcast, upcast
from genai.models.gan.equalized import GAIN, EqualizedConv, EqualizedLinear, leaky, unit
from genai.models.gan.resample import FIR, downsample, upsample

Noise = Callable[[int, tuple[int, int]], Tensor] | Sequence[Tensor]
"""`noise(layer, (h, w))`, or one tensor per layer: standard normal, (B, 1, h, w), or (1, 1, h, w) for all samples."""


def seeded_noise(seeds: Tensor) -> Noise:
    """Return noise as a function of each sample's seed, int64 (B,); a single seed gives all samples the same."""
    return lambda layer, size: rng.normal(seeds, (1, *size), row=layer, stream=rng.MODEL)


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """Return the factors (B, O) that bring each output map to variance 1 (eq. 3): weight (O, I, k, k), style (B, I)."""
    # 1e-8 keeps the root finite where all weights of a channel are 0.
    return (F.linear(style.square(), weight.square().sum((2, 3))) + 1e-8).rsqrt()


class StyledConv(nn.Module):
    """A 3x3 convolution whose weights are modulated by the style and demodulated; then noise, bias, activation (figure
    2d).

    Modulating the weights of each sample (eq. 1 and 3) equals scaling its maps before and after one convolution shared
    by all.
    """

    def __init__(self, inputs: int, outputs: int, style: int):
        super().__init__()
        self.affine = EqualizedLinear(style, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))  # demodulation makes its scale irrelevant
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.strength = nn.Parameter(torch.zeros(()))

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve x (B, I, H, W) with the shared weight."""
        return F.conv2d(x, self.weight, padding=1)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """Map x (B, I, H, W) under w (B, D) and noise (B, 1, H', W') to (B, O, H', W')."""
        style = self.affine(w)
        scale = GAIN * demodulation(self.weight, style)
        y = self.convolve(x * style[:, :, None, None])
        y = torch.addcmul(GAIN * self.bias[:, None, None], y, scale[:, :, None, None])
        return leaky(y + (GAIN * self.strength) * noise)


class StyledUpConv(StyledConv):
    """A StyledConv at twice the size, H' = 2 H: a zero after each row and column, convolution, filter."""

    def __init__(self, inputs: int, outputs: int, style: int):
        super().__init__(inputs, outputs, style)
        self.filter = FIR(padding=1, gain=4.0)

    def convolve(self, x: Tensor) -> Tensor:
        """Upsample and convolve x (B, I, H, W) -> (B, O, 2 H, 2 W)."""
        return self.filter(F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2))


class ToImage(nn.Module):
    """A 1x1 convolution to the image's channels, modulated by the style without demodulation (figure 7b)."""

    def __init__(self, inputs: int, outputs: int, style: int):
        super().__init__()
        self.affine = EqualizedLinear(style, inputs, bias=1.0)
        self.conv = EqualizedConv(inputs, outputs, 1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Map x (B, I, H, W) under w (B, D) to (B, C, H, W)."""
        return self.conv(x * self.affine(w)[:, :, None, None])


class Mapping(KeepBufferPrecision):
    """The mapping network z (B, latents) -> w (B, style): `layers` layers that learn at a hundredth of the rate.

    `average` tracks the mean of w in training (StyleGAN, 2019, appendix B: decay 0.995), see `track`.
    """

    average: Tensor

    def __init__(self, latents: int, style: int, layers: int = 8, classes: int | None = None):
        super().__init__()
        self.label = None if classes is None else nn.Embedding(classes, style)
        inputs = latents if classes is None else latents + style
        widths = [inputs, *[style] * at_least(layers, 1, "model.generator.layers")]
        self.layers = nn.ModuleList(EqualizedLinear(a, b, rate=0.01, gain=GAIN) for a, b in itertools.pairwise(widths))
        self.register_buffer("average", torch.zeros(style))

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Map z (B, latents) and label int64 (B,) to w (B, style)."""
        x = unit(downcast(z, self))
        if self.label is not None:
            assert label is not None, "a conditional generator needs labels"
            x = torch.cat([x, unit(self.label(label))], 1)
        for layer in self.layers:
            x = leaky(layer(x))
        return x

    @torch.no_grad()
    def track(self, w: Tensor) -> None:
        """Update the average by w (B, style)."""
        self.average.lerp_(w.float().mean(0), 0.005)

    def truncate(self, w: Tensor, psi: float) -> Tensor:
        """Return average + psi (w - average), (B, style) (StyleGAN, 2019, appendix B)."""
        return self.average + psi * (w - self.average)


class Synthesis(nn.Module):
    """The skip generator (figure 7b): w of each layer (B, L, style) -> images (B, *shape), L = 2 len(widths).

    Each image output uses the w of the next convolution, as in the published code.
    """

    def __init__(self, shape: Sequence[int], widths: Sequence[int], style: int):
        super().__init__()
        size = start_size(shape, widths, "model.generator.widths")
        self.sizes = [size, *((size[0] << k, size[1] << k) for k in range(1, len(widths)) for _ in range(2))]
        self.start = nn.Parameter(torch.randn(1, widths[0], *size))
        self.convs = nn.ModuleList([StyledConv(widths[0], widths[0], style)])
        for a, b in itertools.pairwise(widths):
            self.convs += [StyledUpConv(a, b, style), StyledConv(b, b, style)]
        self.images = nn.ModuleList(ToImage(width, shape[0], style) for width in widths)
        self.enlarge = upsample()
        self.to(memory_format=torch.channels_last)

    def forward(self, w: Tensor, noise: Noise | None = None) -> Tensor:
        """Generate images (B, *shape) from w (B, L, style); `noise` None draws it anew."""
        w = downcast(w, self)
        x = self.start.expand(len(w), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        image = None
        for i, conv in enumerate(self.convs):
            x = conv(x, w[:, i], self.noise_of(i, noise, w))
            if i % 2 == 0:
                rgb = upcast(self.images[i // 2](x, w[:, i + 1]))
                image = rgb if image is None else self.enlarge(image) + rgb
        assert image is not None
        return image.contiguous()

    def noise_of(self, layer: int, noise: Noise | None, w: Tensor) -> Tensor:
        """Return a layer's noise (B or 1, 1, h, w)."""
        if noise is None:
            return torch.randn(len(w), 1, *self.sizes[layer], device=w.device, dtype=w.dtype)
        drawn = noise(layer, self.sizes[layer]) if callable(noise) else noise[layer]
        return drawn.to(w)


class Generator(nn.Module):
    """The mapping and synthesis networks.

    Args:
        shape: (C, H, W) of the images; 2^(len(widths) - 1) must divide H and W.
        latents: number of latents.
        widths: channels of each resolution from the smallest up, each twice the size of the one before.
        style: width of w.
        layers: layers of the mapping.
        classes: number of labels, None for none.

    Raises UserError if the size cannot be generated.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latents: int,
        widths: Sequence[int],
        style: int = 128,
        layers: int = 8,
        classes: int | None = None,
    ):
        super().__init__()
        self.mapping = Mapping(latents, style, layers, classes)
        self.synthesis = Synthesis(shape, widths, style)
        self.layers = 2 * len(widths)

    def forward(
        self,
        z: Tensor,
        label: Tensor | None = None,
        second: Tensor | None = None,
        cut: Tensor | None = None,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map z (B, latents) to images (B, *shape) and w (B, L, style).

        From layer `cut` int64 (B,) on, w is that of a second z (style mixing, StyleGAN, 2019, section 3.1).
        """
        w = self.mapping(z, label)[:, None].expand(-1, self.layers, -1)
        if second is not None:
            assert cut is not None
            first = torch.arange(self.layers, device=w.device) < cut[:, None]
            w = torch.where(first[:, :, None], w, self.mapping(second, label)[:, None])
        return self.synthesis(w, noise), w


class DownBlock(nn.Module):
    """Two convolutions and a halving: (B, I, 2H, 2W) -> (B, O, H, W)."""

    def __init__(self, inputs: int, outputs: int, gain: float = GAIN):
        super().__init__()
        self.conv = EqualizedConv(inputs, inputs, 3, padding=1, gain=GAIN)
        self.filter = FIR(padding=2)
        self.down = EqualizedConv(inputs, outputs, 3, stride=2, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, I, 2H, 2W) to (B, O, H, W)."""
        return leaky(self.down(self.filter(leaky(self.conv(x)))))


class ResidualDownBlock(DownBlock):
    """A DownBlock plus a 1x1 convolution of the downsampled input, their sum scaled by 1 / sqrt(2) (figure 7c)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, gain=1.0)  # the activation's sqrt(2) and the sum's 1 / sqrt(2) cancel
        self.halve = downsample()
        self.skip = EqualizedConv(inputs, outputs, 1, gain=1 / GAIN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, I, 2H, 2W) to (B, O, H, W)."""
        return super().forward(x) + self.skip(self.halve(x))


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """Append a channel to x (B, C, H, W): the standard deviation within each `group` consecutive samples, averaged over
    C, H, W.

    Progressive Growing, 2018, section 3. Raises UserError if the batch does not divide into groups.
    """
    if len(x) % group:
        raise UserError(
            f"data.batch_size={len(x)} must be a multiple of {group}, as the discriminator looks at that many samples "
            "together (model.discriminator.group)"
        )
    grouped = x.unflatten(0, (-1, group))  # (B / group, group, C, H, W)
    # 1e-8 keeps the gradient of the root finite where a group's samples are equal.
    deviation = (grouped.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    deviation = deviation.repeat_interleave(group)[:, None, None, None]
    return torch.cat([x, deviation.expand(-1, 1, *x.shape[2:])], 1)


class Discriminator(nn.Module):
    """The residual discriminator (figure 7c), or the plain one of StyleGAN: images (B, *shape) -> logits (B,).

    With labels the inner product of features and the label's embedding is added (Miyato and Koyama, "cGANs with
    Projection Discriminator", 2018, eq. 5).

    Args:
        shape, widths: as for the generator, widths in the same order.
        classes: number of labels, None for none.
        group: samples whose standard deviation is appended, see `minibatch_std`.
        residual: use residual blocks.

    Raises UserError if it cannot take the size.
    """

    def __init__(
        self,
        shape: Sequence[int],
        widths: Sequence[int],
        classes: int | None = None,
        group: int = 4,
        residual: bool = True,
    ):
        super().__init__()
        size = start_size(shape, widths, "model.discriminator.widths")
        self.group = at_least(group, 1, "model.discriminator.group")
        last = widths[0]
        self.image = EqualizedConv(shape[0], widths[-1], 1, gain=GAIN)
        block = ResidualDownBlock if residual else DownBlock
        self.blocks = nn.Sequential(*(block(a, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True)))
        self.conv = EqualizedConv(last + 1, last, 3, padding=1, gain=GAIN)
        self.linear = EqualizedLinear(last * math.prod(size), last, gain=GAIN)
        self.logit = EqualizedLinear(last, 1)
        self.label = None if classes is None else nn.Embedding(classes, last)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Return logits (B,) of images (B, *shape) with label int64 (B,)."""
        x = self.blocks(leaky(self.image(downcast(x, self).contiguous(memory_format=torch.channels_last))))
        group = self.group if self.training else math.gcd(len(x), self.group)  # a last batch may be short
        x = leaky(self.conv(minibatch_std(x, group)))
        x = leaky(self.linear(x.flatten(1)))
        logit = self.logit(x)[:, 0]
        if self.label is None:
            return logit
        assert label is not None, "a conditional discriminator needs labels"
        return logit + (self.label(label) * x).sum(1) / math.sqrt(x.shape[1])


def start_size(shape: Sequence[int], widths: Sequence[int], key: str) -> tuple[int, int]:
    """Return (h, w) of the smallest maps. Raises UserError if the size does not divide."""
    if len(shape) != 3 or not widths:
        raise UserError(
            f"StyleGAN2 makes images of shape [C, H, W], got {list(shape)}: choose another data=, and at least one of {key}"
        )
    multiple = 2 ** (len(widths) - 1)
    if shape[1] % multiple or shape[2] % multiple:
        raise UserError(
            f"{len(widths)} widths double a size {len(widths) - 1} times, so height and width must be multiples of "
            f"{multiple}, got {shape[1]}x{shape[2]} (data.size, or fewer {key})"
        )
    return shape[1] // multiple, shape[2] // multiple
