"""A WaveNet's step on a CPU in NumPy: on arrays this small, launching an operation of torch takes longer than computing it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ArrayQueues:
    """The decoding state of a WaveNet on a CPU: ring buffers of the layers' inputs, and the weights as arrays (channels, B).

    What a step needs of earlier samples is known before it begins, so it is one product for all layers. The rest is rewritten
    to take few operations: with s = tanh(g / 2), a layer's z = tanh(f) sigmoid(g) is (t + t s) / 2, whose two terms the next
    product adds up; and x is kept without the biases of the residual connections, which the biases of the gates take over.

    Args:
        model: a WaveNet.
        queues: (B, (first_kernel - 1), embedding) and (B, (kernel - 1) d, width), the last embedded codes and the last inputs of
            each layer, oldest first.
        biases: of all layers by the conditions, (B, 2 width layers).
    """

    def __init__(self, model: Any, queues: Sequence[Tensor], biases: Tensor):
        codes, *queues = queues
        self.embed, self.causal = array(model.embed.weight), array(model.causal.weight)
        batch, kind, n, width = len(codes), self.embed.dtype, len(queues), queues[0].shape[2]
        self.embedding = codes.shape[2]
        self.codes = np.zeros((self.causal.shape[1], batch), kind)
        self.codes[self.embedding :] = array(codes).reshape(batch, -1).T
        shift = array(model.causal.bias)[:, None]  # what x lacks
        half = np.repeat(np.array([1, 0.5], kind), width)[:, None]  # of the rows of g
        self.half = half
        gates, starts, rings, outs, skips = [], [], [], [], []
        for layer, queue, bias in zip(model.layers, queues, biases.chunk(n, -1), strict=True):
            weight = array(layer.gates.weight) * half
            gates.append(weight)
            starts.append((array(layer.gates.bias) + array(bias)).T * half + weight @ np.tile(shift, (layer.kernel, 1)))
            rings.append(array(queue).transpose(1, 2, 0) - shift)  # (rows, width, B)
            out = array(layer.out.weight) / 2
            outs.append(np.concatenate([out[:width]] * 2, 1))
            skips.append(np.concatenate([out[width:]] * 2, 1))
            shift = shift + array(layer.out.bias)[:width, None]
        self.starts, self.ring = np.stack(starts), np.ascontiguousarray(np.concatenate(rings))
        stacked = np.stack(gates)  # (layers, 2 width, kernel width)
        self.past, self.now = (
            np.ascontiguousarray(stacked[..., :-width]),
            [*np.ascontiguousarray(stacked[..., -width:])],
        )
        self.outs, self.skip = outs, np.concatenate(skips, 1)
        _, first, _, last = model.head
        self.head = [(array(m.weight), array(m.bias)[:, None]) for m in (first, last)]
        self.skip_bias = sum(array(layer.out.bias)[width:, None] for layer in model.layers)
        sizes = np.array([len(ring) for ring in rings])
        self.begin, self.sizes, self.read = np.cumsum(sizes) - sizes, sizes, 0
        steps = np.arange(model.layers[0].kernel - 1)
        self.taps = np.array([layer.dilation for layer in model.layers])[:, None] * steps  # (layers, kernel - 1)
        self.x, self.h = np.empty((n + 1, width, batch), kind), np.empty((n, 2 * width, batch), kind)
        self.calls = [  # methods of the weights, which are called faster than functions of NumPy
            (now.dot, out.dot, self.h[i], self.h[i, :width], self.h[i, width:], self.x[i], self.x[i + 1])
            for i, (now, out) in enumerate(zip(self.now, self.outs, strict=True))
        ]

    @staticmethod
    def suits(model: Any) -> bool:
        """Return True for a model on a CPU that computes in float32 or float64, as NumPy can, and whose layers look back."""
        weight = model.embed.weight
        exact = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        return weight.device.type == "cpu" and exact and model.layers[0].back > 0

    def step(self, token: Tensor, local: Tensor | None = None) -> Tensor:
        """Read one code of each clip, int64 (B,) -> the head's outputs (B, outputs).

        `local` (B, 2 width layers) are further biases of this step.
        """
        at = self.read % self.sizes
        rows = self.begin[:, None] + (at[:, None] + self.taps) % self.sizes[:, None]
        past = self.ring.take(rows, 0).reshape(len(self.h), -1, self.h.shape[2])
        before, tanh = np.matmul(self.past, past), np.tanh
        before += self.starts
        if local is not None:
            before += array(local).T.reshape(before.shape) * self.half
        self.codes[: -self.embedding] = self.codes[self.embedding :]
        self.codes[-self.embedding :] = self.embed.take(token.numpy(), 0).T
        self.causal.dot(self.codes, self.x[0])
        for (now, out, h, t, s, x, following), early in zip(self.calls, before, strict=True):
            now(x, h)
            h += early
            tanh(h, h)
            s *= t
            out(h, following)
            following += x
        self.ring[self.begin + at] = self.x[:-1]
        self.read += 1
        y = self.skip.dot(self.h.reshape(-1, self.h.shape[2]))
        y += self.skip_bias
        for weight, bias in self.head:
            y = weight.dot(np.maximum(y, 0, out=y))
            y += bias
        return torch.from_numpy(y.T)


def array(x: Tensor) -> np.ndarray:
    """Return a tensor's values as an array."""
    return x.detach().numpy()
