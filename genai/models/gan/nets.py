"""Building blocks of several GANs, and MLPs for small images.

A generator is `net(z, label) -> x`, a discriminator `net(x, label) -> logits (B,)`; label int64 (B,) or None.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError, at_least
from genai.core.precision import downcast
from genai.core.protocols import Batch


def labels(batch: Batch | None, classes: int | None, device: torch.device) -> Tensor | None:
    """Return the labels int64 (B,) of a batch, None for an unconditional model. Raises UserError for a batch without
    labels."""
    if classes is None or batch is None:
        return None
    if "label" not in batch:
        raise UserError(
            f"this model takes label, one of {classes} classes, and was given {', '.join(batch) or 'nothing'}"
        )
    return batch["label"].to(device)


class Projection(nn.Module):
    """The output linear(phi) + <embed(label), phi> (Miyato and Koyama, "cGANs with Projection Discriminator", 2018,
    section 3).

    Args:
        linear: features (B, D) -> (B, 1).
        embed: labels (B,) -> (B, D), None for a discriminator without classes.
    """

    def __init__(self, linear: nn.Module, embed: nn.Module | None = None):
        super().__init__()
        self.linear, self.embed = linear, embed

    def forward(self, phi: Tensor, label: Tensor | None) -> Tensor:
        """Return logits (B,) of features phi (B, D) with label int64 (B,)."""
        logits = self.linear(phi)[:, 0]
        if self.embed is None:
            return logits
        assert label is not None
        return logits + (self.embed(label) * phi).sum(1)


def projection(features: int, classes: int | None) -> Projection:
    """Return a Projection of `features` features, with an embedding if there are classes."""
    embed = None if classes is None else nn.Embedding(classes, features)
    if embed is not None:
        nn.init.normal_(embed.weight, std=features**-0.5)
    return Projection(nn.Linear(features, 1), embed)


class LabelledLatents(nn.Module):
    """Latents z (B, latents) concatenated with an embedding of the label -> (B, `outputs`).

    Args:
        latents: number of latents.
        classes: number of labels, None for none.
        label_width: width of the embedding.
    """

    def __init__(self, latents: int, classes: int | None, label_width: int):
        super().__init__()
        self.embed = None if classes is None else nn.Embedding(classes, at_least(label_width, 1, "label_width"))
        self.outputs = latents + (0 if classes is None else label_width)

    def forward(self, z: Tensor, label: Tensor | None) -> Tensor:
        """Concatenate z (B, latents) and the embedding of label int64 (B,)."""
        if self.embed is None:
            return z
        assert label is not None
        return torch.cat([z, self.embed(label)], 1)


class MLPGenerator(nn.Module):
    """An MLP from z (B, latents) to (B, *shape) in [-1, 1]."""

    def __init__(
        self,
        shape: Sequence[int],
        latents: int,
        classes: int | None = None,
        width: int = 256,
        layers: int = 3,
        label_width: int = 32,
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.inputs = LabelledLatents(latents, classes, label_width)
        out = nn.Linear(width, math.prod(shape))
        self.net = nn.Sequential(*hidden_layers(self.inputs.outputs, width, layers), out, nn.Tanh())

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Return images (B, *shape) in [-1, 1] of z (B, latents) and label int64 (B,)."""
        return self.net(downcast(self.inputs(z, label), self)).view(-1, *self.shape)


class MLPDiscriminator(nn.Module):
    """An MLP from x (B, *shape) to logits (B,)."""

    def __init__(self, shape: Sequence[int], classes: int | None = None, width: int = 256, layers: int = 3):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), *hidden_layers(math.prod(shape), width, layers))
        self.head = projection(width, classes)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Return logits (B,) of images (B, *shape) with label int64 (B,)."""
        return self.head(self.net(downcast(x, self)), label)


def hidden_layers(inputs: int, width: int, layers: int) -> list[nn.Module]:
    """Return `layers` hidden layers with leaky ReLUs, without normalisation, which penalties on gradients rule out."""
    at_least(layers, 1, "layers")
    net: list[nn.Module] = []
    for i in range(layers):
        net += [nn.Linear(inputs if i == 0 else width, width), nn.LeakyReLU(0.2)]
    return net


def halve_shape(shape: Sequence[int], times: int) -> tuple[int, int]:
    """Return height and width of images (C, H, W) halved `times` times. Raises UserError if they do not divide."""
    multiple = 2**times
    if len(shape) != 3:
        raise UserError(f"this network makes images of shape [C, H, W], got {list(shape)}: choose another data=")
    if shape[1] % multiple or shape[2] % multiple:
        raise UserError(
            f"this network halves images {times} times, so height and width must be multiples of {multiple}, got "
            f"{shape[1]}x{shape[2]}: change data.size, or give model.generator and model.discriminator other multipliers"
        )
    return shape[1] // multiple, shape[2] // multiple
