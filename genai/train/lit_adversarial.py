"""The adversarial training loop. One Lightning batch is one round, which counts as one step: several updates of the
discriminator, then one of the generator."""

import contextlib
import re
from collections.abc import Callable
from typing import cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from genai.core.errors import UserError, at_least
from genai.core.protocols import AdversarialModel, Batch, Losses
from genai.data.base import Data
from genai.data.stream import train_loader
from genai.train.ema import EMA
from genai.train.gradients import ParameterGroup
from genai.train.lit import LitModel
from genai.train.optim import set_lr
from genai.train.record import Record

DISCRIMINATOR, GENERATOR = 1, 2  # mixed into the seeds of a round's draws


class LitAdversarial(LitModel):
    """Trains any generator-discriminator pair (an AdversarialModel) by alternating updates.

    A round holds critic_steps * accumulate micro-batches; the generator's update reuses the last `accumulate` of them.
    The moving average is of the generator, and only its update counts as a step.

    Args:
        model, data, ema, record, seed, accumulate, clip_norm, log_every_steps: see `LitModel`.
        optim: optimiser of the generator, `optim(named parameters)`.
        discriminator_optim: optimiser of the discriminator, likewise.
        critic_steps: updates of the discriminator per round.

    Raises UserError if the model is not an AdversarialModel, or critic_steps is below 1.
    """

    overlaps = False

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optim: Callable[..., Optimizer],
        ema: Callable[..., EMA],
        record: Record,
        discriminator_optim: Callable[..., Optimizer],
        seed: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = None,
        log_every_steps: int = 50,
        critic_steps: int = 1,
    ):
        if not isinstance(model, AdversarialModel):
            raise UserError(
                f"loop=LitAdversarial must train an AdversarialModel, got {type(model).__name__}: use loop=LitModel"
            )
        # The average is the generator's; its discriminator is the one in training, for evaluation losses.
        averaged = lambda whole: ema(whole, named_parameters=model.generator_parameters())  # noqa: E731
        super().__init__(model, data, optim, averaged, record, seed, accumulate, clip_norm, log_every_steps)
        self.discriminator_optim = discriminator_optim
        self.critic_steps = at_least(critic_steps, 1, "loop.critic_steps")

    @property
    def adversarial(self) -> AdversarialModel:
        """The model, typed as an AdversarialModel."""
        return cast(AdversarialModel, self.model)

    def configure_optimizers(self) -> list[Optimizer]:  # type: ignore[override]
        """Return the optimisers of generator and discriminator, as Lightning asks for them."""
        generator = self.optim(self.adversarial.generator_parameters())
        try:
            return [generator, self.discriminator_optim(self.adversarial.discriminator_parameters())]
        except UserError as error:
            # Errors of an optimiser name the keys of `optim`; here the user has to change those of discriminator_optim.
            message = re.sub(r"\boptim=", "optim@discriminator_optim=", str(error))
            raise UserError(re.sub(r"\boptim\.", "discriminator_optim.", message)) from None

    def make_groups(self) -> list[ParameterGroup]:
        """Return the parameter groups of generator and discriminator."""
        return [
            ParameterGroup(self.adversarial.generator_parameters(), "generator's "),
            ParameterGroup(self.adversarial.discriminator_parameters(), "discriminator's "),
        ]

    def train_dataloader(self):
        """Return the stream of rounds from the current step on, as Lightning asks for it."""
        t, micro_batches = self.trainer, self.critic_steps * self.accumulate
        return train_loader(self.data, micro_batches, self.seed, t.global_step, t.global_rank, t.world_size)

    def on_fit_start(self) -> None:
        """Prepare as `LitModel` does, and set the model's `images_per_step`."""
        super().on_fit_start()
        self.adversarial.images_per_step = self.data.batch_size * self.accumulate * self.trainer.world_size

    def training_step(self, micro_batches: list[Batch], index: int) -> None:
        """Run one round: `critic_steps` updates of the discriminator, then one of the generator."""
        step, (generator, discriminator) = self.trainer.global_step, self.groups
        optimizers = (cast(LightningOptimizer, o) for o in self.optimizers())  # type: ignore[union-attr]
        optimizer, discriminator_optimizer = optimizers
        lr = set_lr(optimizer.optimizer, step)
        set_lr(discriminator_optimizer.optimizer, step)
        fakes: list[Batch] = []
        for k in range(self.critic_steps):
            part = micro_batches[k * self.accumulate : (k + 1) * self.accumulate]
            keep = fakes if self.adversarial.share_fake and k == self.critic_steps - 1 else None
            loss_of = self.discriminator_loss_of(step, keep)
            losses = self.accumulate_gradients(discriminator, part, loss_of, step, DISCRIMINATOR, k)
            norm, bad = discriminator.clip(losses, self.clip_norm, step)
            self.skip_step_if_bad(discriminator_optimizer.optimizer, discriminator, bad)
            discriminator_optimizer.optimizer.step()  # not through Lightning, which would count it as a step
            self.add_losses(losses, norm, "discriminator_")

        def generator_loss_of(batch: Batch) -> Losses:
            fake = fakes.pop(0) if self.adversarial.share_fake else self.adversarial.generate(batch, step)
            return self.adversarial.generator_loss(batch, fake, step)

        # The generator's gradient passes through the discriminator, whose own parameters need none. `part` holds the
        # micro-batches of the last discriminator update, which the generator reuses.
        with frozen(discriminator):
            losses = self.accumulate_gradients(generator, part, generator_loss_of, step, GENERATOR)
        norm, bad = generator.clip(losses, self.clip_norm, step)
        self.skip_step_if_bad(optimizer.optimizer, generator, bad)
        optimizer.step()
        self.add_losses(losses, norm)
        self.finish_step(step, lr)

    def discriminator_loss_of(self, step: int, keep: list[Batch] | None) -> Callable[[Batch], Losses]:
        """Return a function that draws fakes for a batch and returns the discriminator's loss.

        With `keep` the fakes are appended to it along with their graph, which the generator's gradient needs.
        """

        def loss_of(batch: Batch) -> Losses:
            with torch.set_grad_enabled(keep is not None):
                fake = self.adversarial.generate(batch, step)
            if keep is not None:
                keep.append(fake)
            return self.adversarial.discriminator_loss(batch, {name: x.detach() for name, x in fake.items()}, step)

        return loss_of

    def losses(self, average: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Return the losses of generator and discriminator on a batch, name -> (mean, weight), for the averaged
        generator.

        GAN losses do not track sample quality, so they are not called `loss`, and a run has no best.ckpt.
        """
        step = self.trainer.global_step
        model = cast(AdversarialModel, average)
        fake = model.generate(batch, step)
        discriminator = model.discriminator_loss(batch, fake, step)
        generator = model.generator_loss(batch, fake, step)
        return {
            "discriminator_loss": (discriminator.total, discriminator.weight),
            "generator_loss": (generator.total, generator.weight),
            **discriminator.logs,
            **generator.logs,
        }


@contextlib.contextmanager
def frozen(group: ParameterGroup):
    """Return a context in which a group's parameters take no gradients."""
    for _, p in group.named_parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for _, p in group.named_parameters:
            p.requires_grad_(True)
