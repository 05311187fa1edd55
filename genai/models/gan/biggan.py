"""BigGAN (Brock et al., "Large Scale GAN Training for High Fidelity Natural Image Synthesis", 2019, appendix B)."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, number
from genai.core.precision import downcast, no_autocast, upcast
from genai.core.protocols import Batch, Losses
from genai.losses.adversarial import Adversarial
from genai.models.gan.gan import GAN
from genai.models.gan.nets import Projection, halve_shape
from genai.models.gan.spectral import SpectralConv2d, SpectralEmbedding, SpectralLinear
from genai.nn.attention import resolve_attention_depths
from genai.nn.norm import BatchNorm


class BigGAN(GAN):
    """A GAN whose generator is penalised for filters that are not orthogonal.

    Args:
        orthogonal: beta of `orthogonal_penalty` (eq. 3; 1e-4 in the paper), which makes a generator amenable to
            truncation.
        others: see `GAN`.

    Raises UserError as `GAN` does.
    """

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        latents: int,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: Adversarial,
        classes: int | None = None,
        r1: float = 0.0,
        r2: float = 0.0,
        gradient_penalty: float = 0.0,
        share_fake: bool = True,
        orthogonal: float = 1e-4,
    ):
        super().__init__(
            field, shape, latents, generator, discriminator, loss, classes, r1, r2, gradient_penalty, share_fake
        )
        self.orthogonal = number(orthogonal, "model.orthogonal", 0)

    def generator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return the generator's loss plus the weighted orthogonal penalty."""
        losses = super().generator_loss(batch, fake, step)
        if not self.orthogonal:
            return losses
        penalty = orthogonal_penalty(self.generator)
        logs = {**losses.logs, "orthogonal": (penalty.detach(), losses.weight)}
        return losses._replace(total=losses.total + self.orthogonal * penalty, logs=logs)


def orthogonal_penalty(net: nn.Module) -> Tensor:
    """Return the sum over weights W, rows being filters, of ||W W^T * (1 - I)||_F^2 (eq. 3), a scalar.

    It penalises products of filters, not their lengths. Embeddings are left out.
    """
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with no_autocast(layers[0].weight.device):
        weights = [upcast(m.weight).flatten(1) for m in layers]
        return torch.stack([(p - p.diag().diag()).square().sum() for p in (w @ w.T for w in weights)]).sum()


class ConditionalBatchNorm(nn.Module):
    """Batch norm with gain 1 + W c and bias V c of a condition c (appendix B).

    Args:
        channels: channels of the maps.
        width: width of the condition.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm = BatchNorm(channels, affine=False)
        self.gain, self.bias = (SpectralLinear(width, channels, bias=False) for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Normalise x (B, channels, H, W) under c (B, width) -> as x."""
        return torch.addcmul(self.bias(c)[:, :, None, None], self.norm(x), 1 + self.gain(c)[:, :, None, None])


class SelfAttention(nn.Module):
    """The block x + gamma attention(x) over positions (Zhang et al., "Self-Attention GANs", 2019, eq. 1 to 3).

    gamma is 0 at first; keys and values have half the size. Attention is written out, since fused kernels have no
    second derivative, which penalties on gradients need.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key = (SpectralConv2d(channels, inner, 1, bias=False) for _ in range(2))
        self.value = SpectralConv2d(channels, max(channels // 2, 1), 1, bias=False)
        self.out = SpectralConv2d(max(channels // 2, 1), channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the same shape."""
        keys, values = self.key(x), self.value(x)
        if min(x.shape[2:]) > 1:
            keys, values = F.max_pool2d(keys, 2), F.max_pool2d(values, 2)
        weights = (self.query(x).flatten(2).mT @ keys.flatten(2)).softmax(-1)  # (B, HW, HW / 4)
        h = (values.flatten(2) @ weights.mT).unflatten(2, x.shape[2:])
        return x + self.gamma * self.out(h)


class UpBlock(nn.Module):
    """Two convolutions after conditional batch norms, at twice the size, plus the input (figure 15b)."""

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(inputs, width), ConditionalBatchNorm(outputs, width)
        self.conv1, self.conv2 = SpectralConv2d(inputs, outputs, 3), SpectralConv2d(outputs, outputs, 3)
        self.skip = SpectralConv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map x (B, inputs, H, W) under c (B, width) to (B, outputs, 2 H, 2 W)."""
        h = self.conv1(_upsample(F.relu(self.norm1(x, c))))
        h = self.conv2(F.relu(self.norm2(h, c)))
        return h + _upsample(self.skip(x))  # a 1x1 convolution and doubling commute


class DownBlock(nn.Module):
    """Two convolutions, then half the size, plus the input (figure 15c).

    Args:
        inputs, outputs: channels.
        halve: halve the size.
        first: the input is an image, so no ReLU is applied to it.
    """

    def __init__(self, inputs: int, outputs: int, halve: bool, first: bool = False):
        super().__init__()
        self.conv1, self.conv2 = SpectralConv2d(inputs, outputs, 3), SpectralConv2d(outputs, outputs, 3)
        self.skip = SpectralConv2d(inputs, outputs, 1) if halve or inputs != outputs else nn.Identity()
        self.halve, self.first = halve, first

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, inputs, H, W) to (B, outputs, H / 2, W / 2), or to its own size."""
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.halve:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # a 1x1 convolution and averaging commute
        return h + self.skip(x)


class Generator(nn.Module):
    """The generator: z (B, latents) -> images (B, *shape) in [-1, 1].

    z is split into chunks, one for the smallest maps and one per block; a block's conditional batch norms see its chunk
    and the label's embedding, which all blocks share.

    Args:
        shape: (C, H, W), H and W multiples of 2^(len(multipliers) - 1).
        latents: number of latents, a multiple of len(multipliers).
        classes: number of labels, None for none.
        channels: width of the largest maps.
        multipliers: multiples of `channels`, from the largest maps to the smallest.
        attention: heights at which blocks are followed by self-attention; superseded by attention_depths, kept for
            stored configs.
        label_width: width of a label's embedding.
        attention_depths: halvings of the images' size at which blocks are followed by self-attention; -1 at the
            smallest size.

    Raises UserError for sizes that do not divide, and for a depth that does not exist.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latents: int,
        classes: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        attention: Sequence[int] | None = None,
        label_width: int = 128,
        attention_depths: Sequence[int] | None = None,
    ):
        super().__init__()
        widths = [channels * m for m in reversed(multipliers)]
        height, width = halve_shape(shape, len(widths) - 1)
        if latents % len(widths):
            raise UserError(
                f"model.latents={latents} must be a multiple of {len(widths)}: one chunk for each of "
                "model.generator.multipliers"
            )
        self.chunks, self.start = len(widths), (widths[0], height, width)
        self.embed = None if classes is None else nn.Embedding(classes, label_width)
        condition = latents // len(widths) + (0 if classes is None else label_width)
        self.flat = SpectralLinear(latents // len(widths), math.prod(self.start))
        self.blocks, self.attention = nn.ModuleList(), nn.ModuleDict()
        last = len(widths) - 1
        heights = {depth: shape[1] >> depth for depth in range(last)}
        depths = resolve_attention_depths(heights, attention_depths, attention, "model.generator")
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            self.blocks.append(UpBlock(a, b, condition))
            if last - 1 - k in depths:
                self.attention[str(k)] = SelfAttention(b)
        self.norm, self.out = BatchNorm(widths[-1]), SpectralConv2d(widths[-1], shape[0], 3)
        self.apply(initialise)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Return images (B, *shape) in [-1, 1] of z (B, latents) and label int64 (B,)."""
        first, *rest = downcast(z, self).chunk(self.chunks, 1)
        h = self.flat(first).view(-1, *self.start)
        shared = []
        if self.embed is not None:
            assert label is not None
            shared = [self.embed(label)]
        for k, (block, chunk) in enumerate(zip(self.blocks, rest, strict=True)):
            h = block(h, torch.cat([*shared, chunk], 1))
            if str(k) in self.attention:
                h = self.attention[str(k)](h)
        return torch.tanh(self.out(F.relu(self.norm(h))))


class Discriminator(nn.Module):
    """The discriminator: images (B, *shape) -> logits (B,) by residual blocks, ReLU, a sum over positions, and
    `Projection`.

    Only the weights are normalised.

    Args:
        shape: (C, H, W), H and W multiples of 2^(len(multipliers) - 1).
        classes: number of labels, None for none.
        channels: width of the largest maps.
        multipliers: multiples of `channels`, one per block; all blocks but the last halve the size.
        attention, attention_depths: as for the generator.

    Raises UserError for sizes that do not divide, and for a depth that does not exist.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        attention: Sequence[int] | None = None,
        attention_depths: Sequence[int] | None = None,
    ):
        super().__init__()
        halve_shape(shape, len(multipliers) - 1)
        widths = [shape[0], *(channels * m for m in multipliers)]
        net: list[nn.Module] = []
        last = len(multipliers) - 1
        heights = {depth: shape[1] >> depth for depth in range(min(1, last), last + 1)}
        depths = resolve_attention_depths(heights, attention_depths, attention, "model.discriminator")
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            net.append(DownBlock(a, b, k < last, first=k == 0))
            if min(k + 1, last) in depths:
                net.append(SelfAttention(b))
        self.net = nn.Sequential(*net)
        embed = None if classes is None else SpectralEmbedding(classes, widths[-1])
        self.head = Projection(SpectralLinear(widths[-1], 1), embed)
        self.apply(initialise)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Return logits (B,) of images (B, *shape) with label int64 (B,)."""
        return self.head(F.relu(self.net(downcast(x, self))).sum((2, 3)), label)


def initialise(module: nn.Module) -> None:
    """Set weights to orthogonal matrices (Saxe et al., 2014) and biases to 0."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        nn.init.orthogonal_(module.weight)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
