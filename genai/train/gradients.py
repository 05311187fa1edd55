"""Gradients of a step: their norm and clipping, their sum over ranks, and the guard against values that are not finite."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.protocols import Losses


class NonFiniteGuard:
    """Collects losses and gradient norms on the device and reports later which was not finite, and at which step.

    `prefix` stands before each name in the report, such as "generator's ".
    """

    def __init__(self, names: Sequence[str], prefix: str = ""):
        self.names = [f"the {prefix}loss", *(f"the {prefix}gradient of {name}" for name in names)]
        self.pending: list[tuple[int, Tensor]] = []

    def check(self, values: Tensor, step: int) -> Tensor:
        """Record a step's values, one per name; returns a scalar, 1 if their sum is not finite, else 0."""
        self.pending.append((step, values))
        # Infinity and nan times 0 are nan, so this needs no comparison that the host would wait for.
        return torch.nan_to_num(values.sum() * 0, nan=1.0)

    def stop_if_bad(self) -> None:
        """Look at what was recorded since the last call, which waits for the device.

        Raises UserError, which names step and tensor, if a value was not finite.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return
        values = torch.stack([values for _, values in pending])  # (steps, names)
        finite = values.sum(1).isfinite()
        if not finite.all():
            first = int(finite.int().argmin())
            name = self.names[int(values[first].nan_to_num(nan=math.inf).argmax())]
            raise UserError(
                f"{name} was not finite at step {pending[first][0]}: that update was skipped and training stopped, the last "
                "good checkpoint is kept (try a smaller optim.lr, a smaller clip_norm, or trainer.precision=32-true)"
            )


class ParameterGroup:
    """Named parameters that are updated together, with the guard of their loss and gradients."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], prefix: str = ""):
        self.named_parameters = [(name, p) for name, p in named if p.requires_grad]
        self.guard = NonFiniteGuard([name for name, _ in self.named_parameters], prefix)

    def clip(self, losses: list[Losses], clip_norm: float | None, step: int) -> tuple[Tensor, Tensor]:
        """Scale the gradients to a norm of at most clip_norm, if it is given.

        Returns two scalars: the norm before, and 1 if a loss or gradient of this step was not finite, else 0.
        """
        grads = [p.grad for _, p in self.named_parameters if p.grad is not None]
        # Norms of half-precision gradients are summed in float32, where the squares do not overflow.
        wide = torch.promote_types(grads[0].dtype, torch.float32) if grads else None
        norms, total = iter(torch._foreach_norm(grads, 2, wide)) if grads else iter(()), losses[0].total
        total = sum((loss.total for loss in losses[1:]), total)
        each = [total.new_zeros(()) if p.grad is None else next(norms) for _, p in self.named_parameters]
        values = torch.stack([total, *each]).float()
        norm = torch.linalg.vector_norm(values[1:])
        if clip_norm is not None and grads:
            # 1e-6 as in torch's clip_grad_norm_; scaling by 1 instead of testing the norm spares the host a wait.
            torch._foreach_mul_(grads, (clip_norm / (norm + 1e-6)).clamp_max(1.0))
        return norm, self.guard.check(values, step)


def sum_over_ranks(grads: Sequence[Tensor]) -> None:
    """Sum gradients over all ranks in place, in one collective."""
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(list(grads), [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
