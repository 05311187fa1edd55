"""The training loop of a Model with one loss and one optimiser. One Lightning batch is one step, and one optimiser update."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from genai.core import rng
from genai.core.errors import at_least
from genai.core.protocols import Batch, Losses
from genai.data.base import Data
from genai.data.stream import batches, train_loader
from genai.train.ema import EMA
from genai.train.gradients import ParameterGroup, sum_over_ranks
from genai.train.optim import reschedule, set_lr
from genai.train.record import Means, Record

EVALUATION = 7  # mixed into the seeds of evaluation, so that they differ from those of training


class LitModel(L.LightningModule):
    """Trains any Model.

    Args:
        model: its `forward(batch, step)` is the loss.
        data: the data to train and evaluate on.
        optim: `optim(model)` returns one Optimizer.
        ema: `ema(model)` returns an EMA.
        record: receives the metrics.
        seed: seeds the order of the data and every random draw.
        accumulate: micro-batches per step.
        clip_norm: upper bound of the gradient's norm, None for no clipping.
        log_every_steps: steps between two reads of the running means, for which the host waits for the device.

    Raises UserError if accumulate or log_every_steps is below 1.
    """

    # Lightning calls these every step unless they are None; a subclass may define them.
    on_train_batch_start = on_train_batch_end = on_before_zero_grad = None  # type: ignore[assignment]
    on_before_backward = on_after_backward = on_before_optimizer_step = None  # type: ignore[assignment]

    overlaps = True
    """True if DDP may sum gradients over ranks during the last backward pass; it supports only one such pass per step."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optim: Callable[..., Optimizer],
        ema: Callable[[nn.Module], EMA],
        record: Record,
        seed: int = 0,
        accumulate: int = 1,
        clip_norm: float | None = 1.0,
        log_every_steps: int = 50,
    ):
        super().__init__()
        at_least(accumulate, 1, "accumulate")
        at_least(log_every_steps, 1, "log_every_steps")
        self.automatic_optimization = False
        self.model, self.data, self.optim, self.record = model, data, optim, record
        self.ema = ema(model)
        self.seed, self.accumulate, self.clip_norm, self.log_every_steps = seed, accumulate, clip_norm, log_every_steps
        self.means = Means()

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the running hook's name some thirty times a step; nn.Module would look for tensors in each.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_optimizers(self) -> Optimizer:
        """Return the optimiser, as Lightning asks for it."""
        return self.optim(self.model)

    def train_dataloader(self):
        """Return the stream of micro-batches from the current step on, as Lightning asks for it."""
        t = self.trainer
        return train_loader(self.data, self.accumulate, self.seed, t.global_step, t.global_rank, t.world_size)

    def on_fit_start(self) -> None:
        """Move the EMA and the running means to the model's device, and make the parameter groups, before the first step."""
        self.ema.to(self.device, self.model)
        self.means.to(self.device)
        self.groups = self.make_groups()
        if self.device.type == "cpu":
            # Lightning sets this to 1, and then torch looks for the GPU driver's library at every optimiser step.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"

    def make_groups(self) -> list[ParameterGroup]:
        """Return the parameter groups, one per optimiser."""
        return [ParameterGroup(self.model.named_parameters())]

    def training_step(self, micro_batches: list[Batch], index: int) -> None:
        """Make one update from its micro-batches: gradients, clipping, optimiser, EMA, logs."""
        step, (group,) = self.trainer.global_step, self.groups
        optimizer = cast(LightningOptimizer, self.optimizers())
        lr = set_lr(optimizer.optimizer, step)
        losses = self.accumulate_gradients(group, micro_batches, lambda batch: self.model(batch, step), step)
        norm, bad = group.clip(losses, self.clip_norm, step)
        self.skip_step_if_bad(optimizer.optimizer, group, bad)
        optimizer.step()
        self.add_losses(losses, norm)
        self.finish_step(step, lr)

    def add_losses(self, losses: Sequence[Losses], norm: Tensor, prefix: str = "") -> None:
        """Add the losses of one group's update, their logs and the gradient's norm to the running means."""
        for loss in losses:
            self.means.add({f"train/{prefix}loss": (loss.total, loss.weight)})
            self.means.add({f"train/{name}": value for name, value in loss.logs.items()})
        self.means.add({f"train/{prefix}grad_norm": (norm, 1.0)})

    def finish_step(self, step: int, lr: float | None) -> None:
        """Update the EMA after a step; on logging steps check for values that are not finite, and log."""
        self.ema.update()
        if (step + 1) % self.log_every_steps == 0:
            self.stop_if_bad()
            values = self.means.reduce().read()
            self.record.log(step + 1, values if lr is None else {**values, "train/lr": lr})

    def accumulate_gradients(
        self, group: ParameterGroup, micro_batches: list[Batch], loss_of: Callable[[Batch], Losses], *counters: int
    ) -> list[Losses]:
        """Leave in .grad the gradient of the mean over all targets of all micro-batches and ranks.

        A single micro-batch on a single rank yields that directly. Otherwise each loss is weighted by its number of
        targets, and the sum over micro-batches and ranks is divided once. Micro-batch m draws from the seed
        rng.mix(seed, rank, *counters, m).
        """
        alone = len(micro_batches) == 1 and self.trainer.world_size == 1
        losses = []
        for _, p in group.named_parameters:
            p.grad = None
        for m, batch in enumerate(micro_batches):
            rng.seed_torch(rng.mix(self.seed, self.global_rank, *counters, m), self.device)
            last = m == len(micro_batches) - 1
            with contextlib.nullcontext() if last and self.overlaps else self.no_sync():
                loss = loss_of(batch)
                self.manual_backward(loss.total if alone else loss.total * loss.weight)
            losses.append(loss._replace(total=loss.total.detach()))
        if not alone:
            total = sum(loss.weight for loss in losses)
            # torch.full fills on the device; a copy from the host would wait for it
            weight = total if isinstance(total, Tensor) else torch.full((), total, device=self.device)
            grads, ranks = [p.grad for _, p in group.named_parameters if p.grad is not None], 1
            if self.trainer.world_size > 1:
                torch.distributed.all_reduce(weight)
                # DDP has averaged over ranks; the factor turns its mean back into the sum.
                ranks = self.trainer.world_size if self.overlaps else 1
                if not self.overlaps:
                    sum_over_ranks(grads)
            if grads:  # without any target the sum is divided by 1: the gradient is then 0 and not nan
                torch._foreach_mul_(grads, ranks / torch.where(weight.gt(0), weight, 1))
        return losses

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Return a context in which gradients stay on their rank, for all but the last micro-batch of a step."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else contextlib.nullcontext()

    def skip_step_if_bad(self, optimizer: Optimizer, group: ParameterGroup, bad: Tensor) -> None:
        """Make the optimiser's next step do nothing if `bad` is 1.

        Optimisers that take `found_inf` decide that on the device; for others the host waits and raises, see
        `stop_if_bad`.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
        else:
            group.guard.stop_if_bad()

    def stop_if_bad(self) -> None:
        """Raise UserError if a loss or gradient was not finite since the last call."""
        for group in self.groups:
            group.guard.stop_if_bad()

    def state_dict(self, *args: object, **kwargs: object) -> Mapping[str, Any]:
        """Return the model's state alone: the EMA, the optimiser and the running means have keys of their own in a
        checkpoint."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state: Mapping[str, object], strict: bool = True, assign: bool = False):
        """Load the state of the model alone, see `state_dict`."""
        return self.model.load_state_dict(state, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the EMA and the running means to a checkpoint; never saves a state that is not finite."""
        self.stop_if_bad()
        checkpoint["ema"] = self.ema.state_dict()
        checkpoint["ema_updates"] = self.ema.updates
        checkpoint["means"] = self.means.reduce(keep=self.global_rank == 0).sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the EMA and the running means, and take learning rates from the present config.

        The optimisers of `fresh` are built only to be read: Lightning restores the stored state into its own.
        """
        fresh = cast(Optimizer | list[Optimizer], self.configure_optimizers())
        pairs = zip(checkpoint["optimizer_states"], fresh if isinstance(fresh, list) else [fresh], strict=False)
        for stored, optimizer in pairs:
            reschedule(stored["param_groups"], optimizer.param_groups)
        self.ema.load_state_dict(checkpoint["ema"], checkpoint["ema_updates"])
        if self.trainer.global_rank == 0:
            self.means.sums = dict(checkpoint["means"])

    def evaluate(self, split: str = "val", limit: int | None = None) -> dict[str, float]:
        """Return the means of the averaged (EMA) model's `losses` on a split, over at most `limit` batches.

        Batch i draws from the seed rng.mix(EVALUATION, i), so the noise is the same every time and on any number of ranks,
        which share the batches.
        """
        means = Means().to(self.device)
        for i, batch in enumerate(batches(self.data.splits[split], self.data.batch_size, limit)):
            if i % self.trainer.world_size == self.trainer.global_rank:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                rng.seed_torch(rng.mix(EVALUATION, i), self.device)  # training reseeds at each step
                with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                    values = self.losses(self.ema.module, batch)
                means.add(values)
        return means.reduce().read()

    def losses(self, average: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Return what an evaluation logs for a batch, name -> (mean, weight): the loss and the model's own logs.

        `average` is the averaged model.
        """
        loss: Losses = average(batch, self.trainer.global_step)
        return {"loss": (loss.total, loss.weight), **loss.logs}
