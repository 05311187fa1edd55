"""Likelihoods p(x | z) of data in [-1, 1]: distributions whose parameters are the output of a decoder.

Each takes `out` (B, outputs * C, ...), the decoder's output for data x (B, C, ...), and returns nats of whole samples.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, at_least
from genai.core.precision import KeepPrecision, no_autocast, upcast


class Likelihood(KeepPrecision):
    """The base class. `outputs` parameters describe each element of the data, which has `levels` values, None for a
    density."""

    outputs: int
    levels: int | None
    stochastic = False
    """True if `prepare` draws the data anew each time from what the batch holds."""

    def prepare(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the data to model, given a batch's x and uniforms u of the same shape."""
        return x

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        """Return ln p(x | z) in nats, (B,)."""
        raise NotImplementedError

    def mean(self, out: Tensor) -> Tensor:
        """Return E[x | z] (B, C, ...), or the location if the mean has no closed form."""
        raise NotImplementedError

    def draw(self, out: Tensor, u: Tensor) -> Tensor:
        """Draw x ~ p(x | z) (B, C, ...) by inverse CDF of uniforms u (B, C, ...)."""
        raise NotImplementedError

    def parts(self, out: Tensor) -> Tensor:
        """Reshape out (B, outputs * C, ...) to (outputs, B, C, ...), float32 or wider."""
        return upcast(out).unflatten(1, (self.outputs, -1)).transpose(0, 1)


def _grey_levels(levels: int | None) -> int:
    """Return levels. Raises UserError unless there are at least 2."""
    if levels is None:
        raise UserError("model.likelihood is of grey levels, but this data has none: choose images with data=")
    return at_least(levels, 2, "model.likelihood.levels")


class LogSigmoid(torch.autograd.Function):
    """The function ln sigmoid(a) as min(a, 0) + ln sigmoid(|a|), accurate to a rounding of its absolute value.

    On a CPU torch's own takes more than twice as long: exp and log1p are slow there, sigmoid and log are not.
    """

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        """Return ln sigmoid(a) for a of any shape."""
        ctx.save_for_backward(a)
        return a.abs().sigmoid_().log_().add_(a.clamp_max(0))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Return the gradient sigmoid(-a) grad."""
        return grad * ctx.saved_tensors[0].neg().sigmoid_()


class Categorical(Likelihood):
    """An arbitrary distribution over `levels` grey levels, evenly spaced over [-1, 1], independent per element."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = self.outputs = _grey_levels(levels)
        self.register_buffer("values", torch.linspace(-1, 1, levels), persistent=False)

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        """See `Likelihood`; x must lie on the grey levels."""
        index = ((x + 1) * (self.outputs - 1) / 2).round().long()
        return -F.cross_entropy(self.parts(out).transpose(0, 1), index, reduction="none").flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        with no_autocast(out.device):
            return torch.einsum("l...,l->...", self.parts(out).softmax(0), self.values)

    def draw(self, out: Tensor, u: Tensor) -> Tensor:
        below = self.parts(out).softmax(0).cumsum(0)[:-1] <= u
        return below.sum(0) * (2 / (self.outputs - 1)) - 1


class Bernoulli(Likelihood):
    """The likelihood of binary data, -1 or 1. Grey data are made binary first.

    binarize: "dynamic" draws a 1 with probability (x + 1) / 2 anew each time (Salakhutdinov and Murray, 2008),
    "threshold" cuts at 0. Raises UserError for another value.
    """

    outputs, levels = 1, 2

    def __init__(self, binarize: str = "dynamic"):
        super().__init__()
        if binarize not in ("dynamic", "threshold"):
            raise UserError(f"model.likelihood.binarize={binarize} is neither dynamic nor threshold")
        self.stochastic = binarize == "dynamic"

    def prepare(self, x: Tensor, u: Tensor) -> Tensor:
        return ((u if self.stochastic else 0.5) < (x + 1) / 2) * 2.0 - 1

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        return LogSigmoid.apply(upcast(out) * x).flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        return 2 * upcast(out).sigmoid() - 1

    def draw(self, out: Tensor, u: Tensor) -> Tensor:
        return (u < upcast(out).sigmoid()) * 2.0 - 1


class DiscretizedLogistic(Likelihood):
    """The mass of a logistic between the midpoints of `levels` grey levels; the outer two extend to infinity.

    Kingma et al., 2016, appendix; Salimans et al., "PixelCNN++", 2017, section 2.1.
    """

    outputs = 2

    def __init__(self, levels: int):
        super().__init__()
        self.levels = _grey_levels(levels)
        self.half_bin = 1 / (levels - 1)

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        location, log_scale = self.parts(out)
        # A scale below e^-7 is far below one grey level; smaller ones would overflow.
        inverse = torch.exp(-log_scale.clamp_min(-7))
        upper, lower = (x + self.half_bin - location) * inverse, (x - self.half_bin - location) * inverse
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), whose logarithm underflows nowhere
        inner = torch.log(-torch.expm1(lower - upper))
        below = torch.where(x > 1 - self.half_bin, 0.0, F.logsigmoid(upper))
        above = torch.where(x < -1 + self.half_bin, 0.0, F.logsigmoid(-lower))
        return (below + above + torch.where(x.abs() > 1 - self.half_bin, 0.0, inner)).flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        return self.parts(out)[0].clamp(-1, 1)

    def draw(self, out: Tensor, u: Tensor) -> Tensor:
        location, log_scale = self.parts(out)
        # torch.logit clamps u to [1e-6, 1 - 1e-6], since the logistic quantile of 0 or 1 is infinite.
        x = location + log_scale.clamp_min(-7).exp() * torch.logit(u, 1e-6)
        return ((x.clamp(-1, 1) + 1) / (2 * self.half_bin)).round() * (2 * self.half_bin) - 1


class Gaussian(Likelihood):
    """The density N(out, sigma^2) with one learned sigma, for continuous data only."""

    outputs, levels = 1, None

    def __init__(self, sigma: float = 1.0):
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(float(sigma)).log())

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        z = (x - self.parts(out)[0]) * torch.exp(-self.log_sigma)
        return (-0.5 * (z**2 + LOG_2PI) - self.log_sigma).flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        return self.parts(out)[0]

    def draw(self, out: Tensor, u: Tensor) -> Tensor:
        # The normal quantile of 0 or 1 is infinite.
        return self.parts(out)[0] + self.log_sigma.exp() * torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))


LOG_2PI = 1.8378770664093453
