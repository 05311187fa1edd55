"""Baselines of sound: a Gaussian of spectrograms for each class, and adaptive linear prediction of samples."""

import numpy as np
import torch
from torch import Tensor

from genai.core import rng
from genai.core.errors import at_least, number
from genai.core.protocols import Batch
from genai.evaluation.baselines.base import Baseline, TrainingData
from genai.evaluation.baselines.pixels import inverse
from genai.nn.vocoder import LogMelCodec

SCALES = tuple(2.0**k for k in range(-4, 5))  # of residuals, times their mean size of late


class LogMelGaussian(Baseline):
    """A Gaussian of the log-mel spectrograms of each label and speaker, along their principal components, and Griffin-Lim.

    A label and speaker with fewer than two recordings has no Gaussian of its own; its samples come from that of all.

    Args:
        components: number of principal components, at most one less than there are recordings of a label and speaker.
    """

    field, needs = "audio", ("classes",)

    def __init__(self, components: int = 10):
        self.components = at_least(components, 1, "baseline.components")
        self.what = f"Gaussian of log-mels for each class, {components} components"

    def fit(self, data: TrainingData, seed: int) -> "LogMelGaussian":
        """Fit mean (D,) and components times their deviations (K, D) of each label and speaker, and of all as (-1, -1)."""
        self.codec = LogMelCodec(data.field, data.shape, data.modality.sr_hz)
        z = torch.cat([self.codec.encode(part) for part in data.x.split(256)]).flatten(1).double()
        speaker = torch.zeros(len(z), dtype=torch.int64) if data.speaker is None else data.speaker
        kinds = list(zip((speaker if data.label is None else data.label).tolist(), speaker.tolist(), strict=True))
        self.parts = {(-1, -1): self.gaussian(z)}
        for kind in sorted(set(kinds)):
            mine = z[[k == kind for k in kinds]]
            if len(mine) > 1:
                self.parts[kind] = self.gaussian(mine)
        return self

    def gaussian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (D,) and deviations (K, D) along the principal components of z (N, D)."""
        mean = z.mean(0)
        _, s, v = torch.linalg.svd(z - mean, full_matrices=False)
        return mean, (s[:, None] * v)[: min(self.components, len(z) - 1)] / (len(z) - 1) ** 0.5

    def draw(self, n: int, seed: int, label: Tensor | None, speaker: Tensor | None) -> Tensor:
        """Draw spectrograms (n, *latent_shape)."""
        noise, found = rng.normal(rng.seed_range(seed, n), (self.components,), stream=rng.INITIAL).double(), []
        none = torch.zeros(n, dtype=torch.int64)
        asked = zip(*((none if kind is None else kind).tolist() for kind in (label, speaker)), strict=True)
        for kind, normal in zip(asked, noise, strict=True):
            mean, deviations = self.parts.get(kind, self.parts[-1, -1])
            found.append(mean + normal[: len(deviations)] @ deviations)
        return torch.stack(found).float().view(n, *self.codec.latent_shape)

    def sample(self, n: int, seed: int, label: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        return self.codec.decode(self.draw(n, seed, label, speaker))


class LinearPrediction(Baseline):
    """Linear prediction of each sample from those before it, which adapts as a recording goes on, of audio as codes.

    The weights are those of recursive least squares with exponential forgetting (Haykin 2002, table 9.1). The residual is a
    mixture of logistic distributions whose scales are multiples of its mean absolute value of late; their shares are fitted
    to the training split by EM. The probability of a code is that of the values that are rounded to it, so all codes have 1.

    Args:
        order: number of samples that predict the next.
        forgetting: weight of a sample relative to the next one.
    """

    field, needs = "tokens", ("companding",)

    def __init__(self, order: int = 24, forgetting: float = 0.998):
        self.order = at_least(order, 1, "baseline.order")
        self.forgetting = number(forgetting, "baseline.forgetting", 0, 1, open_low=True)
        self.what = f"adaptive linear prediction of order {order}"

    def fit(self, data: TrainingData, seed: int) -> "LinearPrediction":
        """Fit the shares (K,) of the scales, on at most 100 recordings."""
        kind = data.modality
        self.values = kind.companding.decode(torch.arange(kind.levels)).double().numpy()  # (L,)
        middle = (self.values[1:] + self.values[:-1]) / 2
        self.low, self.high = np.append(-np.inf, middle), np.append(middle, np.inf)
        self.shares = np.full(len(SCALES), 1 / len(SCALES))
        chosen = np.random.default_rng(seed).permutation(len(data.x))[:100]
        tokens = data.x[chosen].numpy()
        counted = np.ones(tokens.shape, bool) if data.mask is None else data.mask[chosen].numpy()
        each = self.likelihoods(tokens)[counted[:, 1:]]  # (N, K)
        for _ in range(50):
            joint = each * self.shares
            self.shares = (joint / joint.sum(1, keepdims=True).clip(1e-300)).mean(0)
        return self

    def predictions(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the prediction of each token but the first, and the mean absolute residual of late, both (B, T)."""
        x = self.values[tokens]
        n, length = x.shape
        past, weights = np.zeros((n, self.order)), np.zeros((n, self.order))
        inverse = np.broadcast_to(np.eye(self.order) * 10, (n, self.order, self.order)).copy()  # of the correlations
        size = np.full(n, 0.01)
        predicted, sizes = np.empty((n, length - 1)), np.empty((n, length - 1))
        past[:, 0] = x[:, 0]
        for t in range(1, length):
            predicted[:, t - 1] = np.clip((weights * past).sum(1), -1, 1)
            sizes[:, t - 1] = size
            gain = (inverse @ past[:, :, None])[:, :, 0]
            gain /= self.forgetting + (past * gain).sum(1, keepdims=True)
            error = x[:, t] - (weights * past).sum(1)
            weights += gain * error[:, None]
            row = (past[:, None] @ inverse)[:, 0]
            inverse = (inverse - gain[:, :, None] * row[:, None]) / self.forgetting
            trace = np.einsum("bii->b", inverse)
            inverse[trace > 1e6] = np.eye(self.order) * 10  # in silence it would grow without bound
            size = 0.97 * size + 0.03 * np.minimum(np.abs(error), 2) + 1e-6
            past = np.roll(past, 1, 1)
            past[:, 0] = x[:, t]
        return predicted, sizes

    def likelihoods(self, tokens: np.ndarray) -> np.ndarray:
        """Return the probability of each token but the first by each scale, (B, T, K), of tokens (B, 1 + T)."""
        predicted, sizes = self.predictions(tokens)
        return self.mass(tokens[:, 1:], predicted, sizes)

    def mass(self, codes: np.ndarray, predicted: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return the probability of codes (...) by logistics of each scale around a prediction, (..., K)."""
        scale = sizes[..., None] * np.array(SCALES)
        with np.errstate(over="ignore"):
            low, high = (
                1 / (1 + np.exp(-(edge[codes] - predicted)[..., None] / scale)) for edge in (self.low, self.high)
            )
        return high - low

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return ln p (B,) in nats of tokens (B, 1 + T), all but the first, or of those in `mask`."""
        tokens = batch["tokens"].numpy()
        p = self.mix(self.likelihoods(tokens))
        nats = torch.from_numpy(np.log(p))
        return (nats * batch["mask"][:, 1:] if "mask" in batch else nats).sum(1)

    def mix(self, each: np.ndarray) -> np.ndarray:
        """Return the probability (...) of codes by the mixture of scales (..., K); a thousandth is the uniform distribution."""
        return 0.999 * (each @ self.shares) + 0.001 / len(self.values)


class GriffinLim(Baseline):
    """The way from sound to log-mel spectrograms and back, which bounds models of these; samples are training recordings."""

    field, what = "audio", "recordings by way of log-mels and Griffin-Lim"

    def fit(self, data: TrainingData, seed: int) -> "GriffinLim":
        self.codec = LogMelCodec(data.field, data.shape, data.modality.sr_hz)
        self.x, self.kinds = data.x, {"label": data.label, "speaker": data.speaker}
        return self

    def sample(self, n: int, seed: int, label: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """Decode training recordings of the label and speaker asked for, drawn at random."""
        fits = torch.ones(n, len(self.x), dtype=torch.bool)
        for asked, kind in ((label, self.kinds["label"]), (speaker, self.kinds["speaker"])):
            if asked is not None and kind is not None:
                fits &= asked[:, None] == kind
        fits |= ~fits.any(1, keepdim=True)  # none: any recording
        u = rng.uniform(rng.seed_range(seed, n), (1,))[:, 0].double()
        chosen = inverse(fits.double().cumsum(1), u)
        return self.codec.decode(self.codec.encode(self.x[chosen]))

    def reconstruct(self, batch: Batch) -> Tensor:
        return self.codec.reconstruct(batch)
