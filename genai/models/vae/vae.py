"""The variational autoencoder: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, Losses, batch_losses
from genai.core.shapes import check_shape
from genai.models.vae.likelihoods import Likelihood


class VAE(nn.Module):
    """z ~ N(0, I), x ~ p(x | z); the encoder guesses q(z | x), a diagonal Gaussian.

    Args:
        field, shape, levels: of the data; `levels` None for continuous data.
        latents: numbers in z.
        encoder: x (B, *shape) -> (B, 2 latents), means and log variances.
        decoder: z (B, latents) -> what the likelihood reads, its `outputs` for each number of x.
        likelihood: p(x | z).
        beta: weight of the KL term (Higgins et al., 2017); only 1 trains the bound.
        free_bits: nats of each latent's KL, mean over the batch, below which it costs nothing more (Kingma et al., 2016,
            eq. 15).
        kl_warmup_steps: over which beta grows from 0.
        importance_samples: K of `log_prob`.
    """

    bound = "lower bound"

    def __init__(
        self,
        field: str,
        shape: Sequence[int],
        levels: int | None,
        latents: int,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        beta: float = 1.0,
        free_bits: float = 0.0,
        kl_warmup_steps: int = 0,
        importance_samples: int = 64,
    ):
        super().__init__()
        if likelihood.levels is None and levels is not None:
            raise UserError(
                f"model.likelihood is a density, but this data takes {levels} values: their probability is not its "
                "integral; choose categorical, logistic or bernoulli"
            )
        if likelihood.levels is not None and levels is None:
            raise UserError(
                f"model.likelihood counts {likelihood.levels} values, but this data is continuous: choose gaussian"
            )
        if likelihood.levels not in (levels, 2):
            raise UserError(f"model.likelihood counts {likelihood.levels} values, but this data takes {levels}")
        for key, value in (("beta", beta), ("free_bits", free_bits)):
            if value < 0:
                raise UserError(f"model.{key}={value} must be at least 0")
        self.field, self.shape, self.latents = field, tuple(shape), at_least(latents, 1, "model.latents")
        self.encoder, self.decoder, self.likelihood, self.levels = encoder, decoder, likelihood, likelihood.levels
        self.beta, self.free_bits = beta, free_bits
        self.kl_warmup_steps = at_least(kl_warmup_steps, 0, "model.kl_warmup_steps")
        self.importance_samples = at_least(importance_samples, 1, "model.importance_samples")

    @property
    def objective(self) -> str | None:
        """Why its likelihood is not the best it could have, None if it is trained for that."""
        other = {
            name: getattr(self, name) for name, plain in (("beta", 1), ("free_bits", 0)) if getattr(self, name) != plain
        }
        if not other:
            return None
        given = ", ".join(f"model.{name}={value:g}" for name, value in other.items())
        return f"its loss is not the bound, by {given}; model.beta=1 model.free_bits=0 trains for likelihood"

    def nets(self) -> Mapping[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances (B, latents) of q(z | x)."""
        mean, log_variance = check_shape(self.encoder(x), (2 * self.latents,), "model.encoder").float().chunk(2, 1)
        return mean, log_variance.clamp(-14, 14)

    def out(self, z: Tensor) -> Tensor:
        """What the likelihood reads of latents (B, latents): its `outputs` for each number of x."""
        channels, *rest = self.shape
        return check_shape(self.decoder(z), (self.likelihood.outputs * channels, *rest), "model.decoder")

    def forward(self, batch: Batch, step: int) -> Losses:
        """-E_q[ln p(x | z)] + beta KL(q || p), nats of a sample (eq. 10, the Gaussian KL in closed form)."""
        x = batch[self.field]
        if self.likelihood.stochastic:
            x = self.likelihood.prepare(x, torch.rand_like(x))
        mean, log_variance = self.encode(x)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        distortion = -self.likelihood.log_prob(self.out(z), x).mean()
        kl = gaussian_kl(mean, log_variance).mean(0)  # of each latent
        warm = self.training and step + 1 < self.kl_warmup_steps
        beta = self.beta * (step + 1) / self.kl_warmup_steps if warm else self.beta
        rate = kl.sum()
        paid = kl.clamp_min(self.free_bits).sum() if self.free_bits else rate
        logs = {"rate": rate, "distortion": distortion, "elbo": -distortion - rate, "active": (kl > 0.01).float().sum()}
        return batch_losses(distortion + beta * paid, logs, len(x))

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """Mean latents (B, latents) of items; what is binary at random is cut in the middle here."""
        x = x.to(next(self.parameters()).device)
        return self.encode(self.likelihood.prepare(x, torch.full_like(x, 0.5)))[0]

    @torch.no_grad()
    def decode(self, latent: Tensor, label: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """E[x | z] (B, *shape)."""
        return self.likelihood.mean(self.out(latent))

    def reconstruct(self, batch: Batch) -> Tensor:
        """E[x | z] at the mean latents of the data."""
        return self.decode(self.infer(batch[self.field]))

    def latent(self, seeds: Tensor, label: Tensor | None = None, truncation: float | None = None) -> Tensor:
        """z (B, latents) of the prior, from Philox stream 0."""
        if truncation is not None:
            raise UserError(
                f"sampler.truncation={truncation}: a VAE has none, lower sampler.temperature of sampler=prior"
            )
        return rng.normal(seeds.to(next(self.parameters()).device), (self.latents,), stream=rng.INITIAL)

    def interpolate_latents(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """On the straight line from a to b, share (B,)."""
        return torch.lerp(a, b, share[:, None])

    def label(self, batch: Batch | None) -> None:
        """It has no classes."""

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Lower bound on ln p(x), nats (B,): ln of the mean of K importance weights p(x, z) / q(z | x) (Burda et al.,
        2016, eq. 8), draws of sample i from seed + i. K = 1 is the evidence lower bound."""
        x, k = batch[self.field], self.importance_samples
        seeds = rng.seed_range(seed, len(x)).to(x.device)
        if self.likelihood.stochastic:
            x = self.likelihood.prepare(x, rng.uniform(seeds, self.shape, row=1))
        with torch.no_grad():
            mean, log_variance = self.encode(x)
            eps = rng.normal(seeds, (k, self.latents), stream=rng.MODEL)
            weights = []
            for e in eps.unbind(1):
                z = mean + torch.exp(0.5 * log_variance) * e
                prior_over_q = 0.5 * (e**2 - z**2 + log_variance).sum(1)
                weights.append(self.likelihood.log_prob(self.out(z), x) + prior_over_q)
        return torch.stack(weights).logsumexp(0) - math.log(k)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(0, 1)) of each number, nats (appendix B)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
