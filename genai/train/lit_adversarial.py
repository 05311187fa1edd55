"""The loop of two players: one Lightning batch is one round of the game, and a round is one step."""

import contextlib
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from genai.core.errors import UserError, at_least
from genai.core.protocols import AdversarialModel, Batch, Losses
from genai.data.base import Data
from genai.data.stream import train_loader
from genai.train.ema import EMA
from genai.train.lit import LitModel, ParameterGroup
from genai.train.optim import set_lr
from genai.train.record import Record

DISCRIMINATOR, GENERATOR = 1, 2  # what a round's draws are mixed for


class LitAdversarial(LitModel):
    """Trains any AdversarialModel: in each round the discriminator learns `critic_steps` times, then the generator once.

    A round holds critic_steps * accumulate micro-batches of data, of which the generator sees the last `accumulate` again. The
    average is of the generator, and the generator's update alone counts as the step.

    Args:
        model, data, ema, record, seed, accumulate, clip_norm, log_every_steps: see `LitModel`.
        optim: of the generator, `optim(named parameters)`.
        discriminator_optim: of the discriminator, likewise.
        critic_steps: updates of the discriminator in a round.
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
            raise UserError(f"loop=LitAdversarial needs two players, and a {type(model).__name__} is one: use LitModel")
        averaged = lambda whole: ema(whole, named_parameters=model.generator_parameters())  # noqa: E731
        super().__init__(model, data, optim, averaged, record, seed, accumulate, clip_norm, log_every_steps)
        self.discriminator_optim = discriminator_optim
        self.critic_steps = at_least(critic_steps, 1, "loop.critic_steps")

    @property
    def adversarial(self) -> AdversarialModel:
        return cast(AdversarialModel, self.model)

    def configure_optimizers(self) -> list[Optimizer]:  # type: ignore[override]
        generator = self.optim(self.adversarial.generator_parameters())
        try:
            return [generator, self.discriminator_optim(self.adversarial.discriminator_parameters())]
        except UserError as error:
            message = re.sub(r"\boptim=", "optim@discriminator_optim=", str(error))
            raise UserError(re.sub(r"\boptim\.", "discriminator_optim.", message)) from None

    def make_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(self.adversarial.generator_parameters(), "generator's "),
            ParameterGroup(self.adversarial.discriminator_parameters(), "discriminator's "),
        ]

    def train_dataloader(self):
        t, micro_batches = self.trainer, self.critic_steps * self.accumulate
        return train_loader(self.data, micro_batches, self.seed, t.global_step, t.global_rank, t.world_size)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.adversarial.images_per_step = self.data.batch_size * self.accumulate * self.trainer.world_size

    def training_step(self, micro_batches: list[Batch], index: int) -> None:
        step, (generator, discriminator) = self.trainer.global_step, self.groups
        optimizer, other = (cast(LightningOptimizer, o) for o in self.optimizers())  # type: ignore[union-attr]
        lr = set_lr(optimizer.optimizer, step)
        set_lr(other.optimizer, step)
        fakes: list[Batch] = []
        for k in range(self.critic_steps):
            part = micro_batches[k * self.accumulate : (k + 1) * self.accumulate]
            keep = fakes if self.adversarial.share_fake and k == self.critic_steps - 1 else None
            loss_of = self.discriminator_loss_of(step, keep)
            losses = self.accumulate_gradients(discriminator, part, loss_of, step, DISCRIMINATOR, k)
            norm, bad = discriminator.clip(losses, self.clip_norm, step)
            self.skip_step_if_bad(other.optimizer, discriminator, bad)
            other.optimizer.step()  # past Lightning, which would count it as a step
            self.add_losses(losses, norm, "discriminator_")

        def generator_loss_of(batch: Batch) -> Losses:
            fake = fakes.pop(0) if self.adversarial.share_fake else self.adversarial.generate(batch, step)
            return self.adversarial.generator_loss(batch, fake, step)

        with frozen(discriminator):
            losses = self.accumulate_gradients(generator, part, generator_loss_of, step, GENERATOR)
        norm, bad = generator.clip(losses, self.clip_norm, step)
        self.skip_step_if_bad(optimizer.optimizer, generator, bad)
        optimizer.step()
        self.add_losses(losses, norm)
        self.finish_step(step, lr)

    def discriminator_loss_of(self, step: int, keep: list[Batch] | None) -> Callable[[Batch], Losses]:
        """The discriminator's loss on fresh fakes; with `keep` they go there, with what the generator's gradient needs."""

        def loss_of(batch: Batch) -> Losses:
            with torch.set_grad_enabled(keep is not None):
                fake = self.adversarial.generate(batch, step)
            if keep is not None:
                keep.append(fake)
            return self.adversarial.discriminator_loss(batch, {name: x.detach() for name, x in fake.items()}, step)

        return loss_of

    def losses(self, average: Any, batch: Batch) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Those of both groups, the averaged generator against the discriminator as it is; a game has no one loss that falls
        as it gets better, so there is none called so, and no best checkpoint."""
        step = self.trainer.global_step
        fake = average.generate(batch, step)
        theirs: Losses = average.discriminator_loss(batch, fake, step)
        ours: Losses = average.generator_loss(batch, fake, step)
        losses = {"discriminator_loss": (theirs.total, theirs.weight), "generator_loss": (ours.total, ours.weight)}
        return {**losses, **theirs.logs, **ours.logs}


@contextlib.contextmanager
def frozen(group: ParameterGroup):
    """No gradients for a player's parameters meanwhile."""
    for _, p in group.named_parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for _, p in group.named_parameters:
            p.requires_grad_(True)
