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
    """The model z ~ N(0, I), x ~ p(x | z), with an encoder that approximates the posterior by a diagonal Gaussian q(z |
    x).

    Args:
        field, shape, levels: field of the data, shape of a sample, and its number of grey levels, None for continuous
            data.
        latents: number of latents.
        encoder: x (B, *shape) -> (B, 2 latents), means and log variances.
        decoder: z (B, latents) -> parameters of the likelihood, `outputs` for each element of x.
        likelihood: p(x | z).
        beta: weight of the KL term (Higgins et al., 2017); only 1 trains the bound.
        free_bits: nats of each latent's KL, averaged over the batch, below which it costs nothing (Kingma et al., 2016,
            eq. 15).
        kl_warmup_steps: steps over which beta grows from 0.
        importance_samples: K of `log_prob`.

    Raises UserError if likelihood and data do not fit, or an argument is out of range.
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
                f"model.likelihood counts {likelihood.levels} values, but this data is continuous: choose images "
                "with data=, or gaussian"
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
        """The reason why the model's likelihood is not the best it could have; None if it is trained for likelihood."""
        other = {
            name: getattr(self, name) for name, plain in (("beta", 1), ("free_bits", 0)) if getattr(self, name) != plain
        }
        if not other:
            return None
        given = ", ".join(f"model.{name}={value:g}" for name, value in other.items())
        return f"its loss is not the bound, by {given}; model.beta=1 model.free_bits=0 trains for likelihood"

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances (B, latents) of q(z | x) for x (B, *shape)."""
        mean, log_variance = check_shape(self.encoder(x), (2 * self.latents,), "model.encoder").float().chunk(2, 1)
        return mean, log_variance.clamp(-14, 14)

    def out(self, z: Tensor) -> Tensor:
        """Decode z (B, latents) to the parameters of the likelihood, (B, outputs * C, ...)."""
        channels, *rest = self.shape
        return check_shape(self.decoder(z), (self.likelihood.outputs * channels, *rest), "model.decoder")

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return -E_q[ln p(x | z)] + beta KL(q || p) in nats per sample (eq. 10, the KL in closed form)."""
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
        """Return the mean latents (B, latents) of items; dynamic binarisation is replaced by a threshold."""
        x = x.to(next(self.parameters()).device)
        return self.encode(self.likelihood.prepare(x, torch.full_like(x, 0.5)))[0]

    @torch.no_grad()
    def decode(self, latent: Tensor, label: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """Return E[x | z] (B, *shape) of latents (B, latents)."""
        return self.likelihood.mean(self.out(latent))

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return E[x | z] (B, *shape) at the mean latents of batch[field]."""
        return self.decode(self.infer(batch[self.field]))

    def latent(self, seeds: Tensor, label: Tensor | None = None, truncation: float | None = None) -> Tensor:
        """Draw z (B, latents) from the prior by Philox stream 0. Raises UserError for a truncation."""
        if truncation is not None:
            raise UserError(
                f"sampler.truncation={truncation}: a VAE has none, lower sampler.temperature of sampler=prior"
            )
        return rng.normal(seeds.to(next(self.parameters()).device), (self.latents,), stream=rng.INITIAL)

    def interpolate_latents(self, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
        """Interpolate linearly from a to b (B, latents), share (B,)."""
        return torch.lerp(a, b, share[:, None])

    def label(self, batch: Batch | None) -> None:
        """Return None: a VAE has no classes."""

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return a lower bound on ln p(x) in nats, (B,): ln of the mean of K importance weights p(x, z) / q(z | x).

        Burda et al., 2016, eq. 8; the draws of sample i come from seed + i. K = 1 is the evidence lower bound.
        """
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
    """Return KL(N(mean, e^log_variance) || N(0, 1)) of each element in nats (appendix B), shaped like mean."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
