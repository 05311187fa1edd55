"""WaveNet: dilated causal convolutions over the codes of a waveform's samples (van den Oord et al., 2016)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError
from genai.core.precision import upcast
from genai.core.protocols import Batch, Losses
from genai.models.autoregressive.likelihood import mean_loss
from genai.models.autoregressive.wavenet_cpu import ArrayQueues

BOUND = 8.0  # |ln weight| and |ln(1 / scale) - 2| of a component are below it
FIRST_RATE = math.exp(2)  # 1 / scale, in [-1, 1]
UNIFORM = 1e-5  # share of a uniform distribution in a mixture, which bounds -ln p of a sample


class Layer(nn.Module):
    """One gated residual layer (eq. 2): z = tanh(f) sigmoid(g), then separate 1x1 convolutions to the residual and the skip.

    f and g are the causal dilated convolution of x plus a bias by condition, of samples t, t - d, ..., t - (kernel - 1) d; before
    the first sample x is 0.

    Args:
        width: channels of x.
        skip: channels of the skip connection.
        kernel: taps of the convolution.
        dilation: d, samples between two taps.
    """

    def __init__(self, width: int, skip: int, kernel: int, dilation: int):
        super().__init__()
        self.dilation, self.back = dilation, (kernel - 1) * dilation
        self.kernel, self.width, self.skip = kernel, width, skip
        self.gates, self.out = nn.Linear(kernel * width, 2 * width), nn.Linear(width, width + skip)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the next layer's x (B, T, width), the skip (B, T, skip)); bias is (B, T or 1, 2 width)."""
        return self.gated(x, shifted(x, self.kernel, self.dilation), bias)

    def gated(self, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the next x, the skip) of x (..., width), given the taps (..., kernel width), of which x is the last."""
        f, g = (self.gates(taps) + bias).chunk(2, -1)
        residual, skip = self.out(f.tanh() * g.sigmoid()).split([self.width, self.skip], -1)
        return x + residual, skip


def shifted(x: Tensor, kernel: int, dilation: int) -> Tensor:
    """Return x_{t - (kernel - 1) d}, ..., x_{t - d}, x_t side by side (B, T, kernel C) of x (B, T, C); 0 before the first."""
    padded, n = F.pad(x, (0, 0, (kernel - 1) * dilation, 0)), x.shape[1]
    return torch.cat([padded[:, i * dilation :][:, :n] for i in range(kernel)], -1)


class Output(Protocol):
    """A distribution over codes 0, ..., levels - 1, by `outputs` numbers of the network."""

    levels: int
    outputs: int

    def log_probs(self, out: Tensor) -> Tensor:
        """Return ln p (..., levels) of all codes, float32, by out (..., outputs)."""
        ...

    def nats(self, out: Tensor, code: Tensor) -> Tensor:
        """Return -ln p (...) of codes int64 (...), float32."""
        ...


class Categorical:
    """One number for each code, a softmax: the paper's output (section 2.2)."""

    def __init__(self, levels: int):
        self.levels = self.outputs = levels

    def log_probs(self, out: Tensor) -> Tensor:
        return upcast(out).log_softmax(-1)

    def nats(self, out: Tensor, code: Tensor) -> Tensor:
        return F.cross_entropy(upcast(out).flatten(0, -2), code.flatten(), reduction="none").view_as(code)


class Logistics:
    """A mixture of logistic distributions, discretised to codes (Salimans et al., 2017, eq. 2), and a little of a uniform one.

    Code c stands for y = 2 c / (levels - 1) - 1. Its probability under a component is the mass between y - 1 / (levels - 1) and
    y + 1 / (levels - 1); the first and the last code also get what lies outside.

    Args:
        levels: number of codes.
        components: of the mixture.
    """

    def __init__(self, levels: int, components: int):
        self.levels, self.components, self.outputs = levels, components, 3 * components
        self.edges = self.edges_on(torch.device("cpu")).numpy()

    def edges_on(self, device: torch.device) -> Tensor:
        """Return the edges of the codes' intervals, float64 (levels + 1,), the outermost far away."""
        k = torch.arange(self.levels + 1, device=device)
        return (2.0 * k.double() - self.levels) / (self.levels - 1) * (1 + 1e9 * ((k == 0) | (k == self.levels)))

    def log_probs(self, out: Tensor) -> Tensor:
        # In float64, for the difference of two nearly equal numbers, and by NumPy on a CPU, where a call costs less.
        on_cpu, out = out.device.type == "cpu", out.detach().double()
        xp, found, y = (np, out.numpy(), self.edges) if on_cpu else (torch, out, self.edges_on(out.device))
        weight, mean, rate = self.parameters(xp, found)
        z = y - mean[..., None]
        z *= rate[..., None] / 2
        cdf = (weight[..., None, :] @ xp.tanh(z, out=z))[..., 0, :]
        p = cdf[..., 1:] - cdf[..., :-1]
        p *= (1 - UNIFORM) / (cdf[..., -1:] - cdf[..., :1])
        p += UNIFORM / self.levels
        return torch.as_tensor(xp.log(p, out=p)).float()

    def nats(self, out: Tensor, code: Tensor) -> Tensor:
        weight, mean, rate = self.parameters(torch, upcast(out))
        y, half = (code.float() * 2 / (self.levels - 1) - 1)[..., None], 1 / (self.levels - 1)
        above, below = (y + half - mean) * rate, (y - half - mean) * rate
        first, last = (code == 0)[..., None], (code == self.levels - 1)[..., None]
        # ln(F(above) - F(below)) = ln F(above) + ln F(-below) + ln(1 - e^(below - above)), without cancellation
        inside = log1mexp(2 * half * rate).masked_fill(first | last, 0)
        log_p = F.logsigmoid(above).masked_fill(last, 0) + F.logsigmoid(-below).masked_fill(first, 0) + inside
        mixture = (weight.log() + log_p).logsumexp(-1) - weight.sum(-1).log() + math.log1p(-UNIFORM)
        return -torch.logaddexp(mixture, torch.full_like(mixture, math.log(UNIFORM / self.levels)))

    def parameters(self, xp: Any, out: Any) -> tuple[Any, Any, Any]:
        """Return weight, mean and 1 / scale of the components (..., components) of out (..., outputs), arrays of xp.

        The weights sum to no fixed number.
        """
        parts = out.reshape(*out.shape[:-1], 3, self.components)
        bounded = xp.exp(xp.tanh(parts[..., ::2, :] / BOUND) * BOUND)
        return bounded[..., 0, :], parts[..., 1, :], bounded[..., 1, :] * FIRST_RATE


def log1mexp(x: Tensor) -> Tensor:
    """Return ln(1 - e^-x) of x > 0, exact for small and large x (Maechler, 2012)."""
    return torch.where(x < math.log(2), (-torch.expm1(-x)).log(), torch.log1p(-(-x).exp()))


class WaveNet(nn.Module):
    """A model of each sample of a waveform given those before it and its conditions, trained by maximum likelihood.

    Args:
        field: field of the data; must be `tokens`.
        vocab_size: number of codes.
        length: samples of a clip.
        classes, speakers: number of each; None without that condition.
        mels, hop: bands of the log-mel spectrogram `mel` (B, mels, frames) that clips follow, and samples from one frame to the
            next (section 2.5, local conditioning); None without one.
        label_dropout: probability of training a clip without a condition, of each separately; 0 trains no null condition.
        width, skip: channels of a layer and of the skip connections.
        embedding: dimensions that a code is embedded in.
        first_kernel: taps of the first causal convolution, which maps embedded codes to the first layer's channels.
        kernel: taps of a layer's convolution.
        dilations: of the layers, in samples.
        output: distribution of a code.

    Raises UserError for another field, no layers, an output of other codes, and for one of mels and hop without the other.
    """

    field = "tokens"
    bound = "exact"
    """The kind of likelihood that `log_prob` returns: ln p itself, not a bound."""

    def __init__(
        self,
        field: str,
        vocab_size: int,
        length: int,
        classes: int | None,
        speakers: int | None,
        mels: int | None,
        hop: int | None,
        label_dropout: float,
        width: int,
        skip: int,
        embedding: int,
        first_kernel: int,
        kernel: int,
        dilations: Sequence[int],
        output: Output,
    ):
        super().__init__()
        if field != self.field or vocab_size is None:
            raise UserError(
                f"a WaveNet takes {self.field}, but this data has {field}: choose codes of audio with data=, such as tones_codes"
            )
        if not dilations:
            raise UserError("model.dilations=[] must have at least one layer: give such as [1,2,4]")
        if output.levels != vocab_size:
            raise UserError(
                f"model.output.levels={output.levels} must be {vocab_size}, the number of codes: leave it ${{data.levels}}"
            )
        if (mels is None) != (hop is None):
            raise UserError(f"model.mels={mels} and model.hop={hop} belong together: set both, or neither")
        self.vocab_size, self.length, self.output, self.label_dropout = vocab_size, length, output, label_dropout
        self.first_kernel, self.first = first_kernel, vocab_size // 2
        """Silence, the code of 0."""
        self.embed = nn.Embedding(vocab_size, embedding)
        self.causal = nn.Linear(first_kernel * embedding, width)
        self.layers: Any = nn.ModuleList(Layer(width, skip, kernel, d) for d in dilations)
        self.kinds = {name: n for name, n in {"label": classes, "speaker": speakers}.items() if n is not None}
        self.conditions = nn.ModuleDict(
            {name: nn.Embedding(n + 1, 2 * width * len(dilations)) for name, n in self.kinds.items()}
        )
        self.hop: Any = hop
        self.local = None
        if mels is not None:
            self.local = nn.Linear(mels, 2 * width * len(dilations), bias=False)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(skip, skip), nn.ReLU(), nn.Linear(skip, output.outputs))
        self.reset()

    def reset(self) -> None:
        """Set the first weights: codes are embedded as their values times a vector, and conditions begin with no effect."""
        with torch.no_grad():
            value = torch.linspace(-1, 1, self.vocab_size)[:, None]
            self.embed.weight.copy_(value * torch.randn(1, self.embed.embedding_dim))
            for table in [*self.conditions.values(), *([] if self.local is None else [self.local])]:
                nn.init.zeros_(table.weight)  # type: ignore[arg-type]

    @property
    def receptive_field(self) -> int:
        """Number of samples that the distribution of the next one depends on."""
        return self.first_kernel + sum(layer.back for layer in self.layers)

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {**{f"layer {i}": layer for i, layer in enumerate(self.layers)}, "head": self.head}

    def null(self) -> Batch:
        """Return the null conditions, an index after the last one of each, and a spectrogram's frame of zeros."""
        device = self.embed.weight.device
        kinds = {name: torch.full((), n, device=device) for name, n in self.kinds.items()}
        return kinds if self.local is None else {**kinds, "mel": self.local.weight.new_zeros(self.local.in_features)}

    def frames(self, cond: Batch | None) -> Tensor | None:
        """Return the biases of all layers (B, frames, 2 width layers) by the frames of a spectrogram; None without one.

        In training mode each clip loses its spectrogram with probability `label_dropout`.
        """
        if self.local is None or cond is None or "mel" not in cond:
            return None
        found = self.local(cond["mel"].mT)
        if self.training and self.label_dropout > 0:
            found = found * (torch.rand(len(found), 1, 1, device=found.device) >= self.label_dropout)
        return found

    def at(self, frames: Tensor, t: Tensor) -> Tensor:
        """Return the biases (B, T, 2 width layers) at samples t, int64 (B or 1, T), interpolated between two of the frames."""
        t, last = t.clamp_min(0), frames.shape[1] - 1
        before, share = (t // self.hop).clamp_max(last), (t % self.hop).to(frames)[..., None] / self.hop
        rows = torch.arange(len(frames), device=t.device)[:, None]
        return torch.lerp(frames[rows, before], frames[rows, (before + 1).clamp_max(last)], share)

    def biases(self, cond: Batch | None, n: int) -> Tensor:
        """Return the biases of all layers (n, 2 width layers) by the kinds of clips, the null condition where one is not given.

        In training mode each clip loses each of its conditions with probability `label_dropout`.
        """
        total, kinds = self.embed.weight.new_zeros(n, 2 * self.causal.out_features * len(self.layers)), self.null()
        for name in self.kinds:
            null = kinds[name]
            index = null.expand(n) if cond is None or name not in cond else cond[name]
            if self.training and self.label_dropout > 0:
                index = torch.where(torch.rand(n, device=index.device) < self.label_dropout, null, index)
            total = total + self.conditions[name](index)
        return total

    def outputs(self, tokens: Tensor, biases: Tensor, real: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return (the head's outputs (B, T, outputs) after each of tokens int64 (B, T), the input of each layer).

        `biases` are those of all layers, (B, T or 1, 2 width layers). Where `real`, bool (B, T), is false, every layer sees 0, as
        before the first sample.
        """
        codes, total = self.embed(tokens), 0
        codes = codes if real is None else codes * real[..., None]
        inputs, x = [codes], self.causal(shifted(codes, self.first_kernel, 1))
        for layer, bias in zip(self.layers, biases.chunk(len(self.layers), -1), strict=True):
            x = x if real is None else x * real[..., None]
            inputs.append(x)
            x, skip = layer(x, bias)
            total = total + skip
        return self.head(total), inputs

    def nats(self, batch: Batch) -> Tensor:
        """Return -ln p of each of batch[tokens] (B, 1 + T) given those before it, 0 where `mask` is false: (B, T)."""
        tokens = batch[self.field]
        biases, frames = self.biases(batch, len(tokens))[:, None], self.frames(batch)
        if frames is not None:
            biases = biases + self.at(frames, torch.arange(tokens.shape[1] - 1, device=tokens.device)[None])
        out, _ = self.outputs(tokens[:, :-1], biases)
        nats = self.output.nats(out, tokens[:, 1:])
        return nats * batch["mask"][:, 1:] if "mask" in batch else nats

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of `nats` over all real samples, 0 if there are none; the weight is their number."""
        return mean_loss(self.nats(batch), batch)

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p(codes after the first | first, conditions) in nats, (B,), over `mask`; exact, so the seed is not used."""
        return -self.nats(batch).sum(1)

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> Any:
        """Return the state of `batch` clips before their first sample, see `Autoregressive.start`."""
        return {"biases": self.biases(cond, batch), "frames": self.frames(cond), "pad": pad, "queues": None}

    def next(self, tokens: Tensor, state: Any) -> Tensor:
        """Read codes int64 (B, T) and return ln p float32 (B, vocab_size) of the sample after them."""
        out = self.read(tokens, state) if state["queues"] is None else self.step(tokens[:, 0], state)
        return self.output.log_probs(out).float()

    def read(self, tokens: Tensor, state: Any) -> Tensor:
        """Read the beginning of clips, int64 (B, T), padded on the left -> (B, outputs); fills the queues."""
        pad = state["pad"]
        t = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        t = t if pad is None else t - pad[:, None]
        biases, frames = state["biases"][:, None], state["frames"]
        biases = biases if frames is None else biases + self.at(frames, t)
        out, inputs = self.outputs(tokens, biases, None if pad is None else t >= 0)
        state["t"] = t[:, -1:] + 1
        backs = [self.first_kernel - 1, *(layer.back for layer in self.layers)]
        queues = [
            F.pad(x, (0, 0, back, 0))[:, x.shape[1] :].contiguous() for x, back in zip(inputs, backs, strict=True)
        ]
        state["queues"] = ArrayQueues(self, queues, state["biases"]) if ArrayQueues.suits(self) else queues
        return out[:, -1]

    def step(self, token: Tensor, state: Any) -> Tensor:
        """Read one code of each clip, int64 (B,) -> (B, outputs)."""
        local = None
        if state["frames"] is not None:
            local = self.at(state["frames"], state["t"])[:, 0]
            state["t"].add_(1)
        if isinstance(state["queues"], ArrayQueues):
            return state["queues"].step(token, local)
        biases = state["biases"] if local is None else state["biases"] + local
        codes, *queues = state["queues"]
        x, total = self.causal(taken(codes, self.embed(token), 1)), 0
        for layer, queue, bias in zip(self.layers, queues, biases.chunk(len(self.layers), -1), strict=True):
            x, skip = layer.gated(x, taken(queue, x, layer.dilation), bias)
            total = total + skip
        return self.head(total)

    def fix(self, state: Any) -> bool:
        """Return True: every step is the same work on the same memory."""
        return True


def taken(queue: Tensor, x: Tensor, dilation: int) -> Tensor:
    """Return the taps (B, kernel C) of a convolution at x (B, C), which enters the queue (B, (kernel - 1) d, C)."""
    taps = torch.cat([queue[:, ::dilation].flatten(1), x], -1)
    queue.copy_(torch.cat([queue[:, 1:], x[:, None]], 1))
    return taps
