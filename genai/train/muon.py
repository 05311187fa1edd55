"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al., 2024)."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from genai.core.precision import no_autocast, upcast

COEFFICIENTS = 3.4445, -4.775, 2.0315  # a, b, c: steep at 0; singular values end between 0.7 and 1.2 after five steps


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Return about U V' for g = U S V' (m, n), by the quintic Newton-Schulz iteration X <- a X + b (X X') X + c (X
    X')^2 X.

    It runs in bfloat16 on a GPU; on a CPU, where that is slower, in g's own precision.
    """
    a, b, c = COEFFICIENTS
    # 1e-7 avoids 0 / 0. The iteration tolerates bfloat16's rounding; on a CPU bfloat16 would only be slower.
    x = (g / (g.norm() + 1e-7)).to(torch.bfloat16 if g.is_cuda else g.dtype)
    x = x.mT if g.shape[0] > g.shape[1] else x
    with no_autocast(x.device):
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if g.shape[0] > g.shape[1] else x).to(g.dtype)


class Muon(Optimizer):
    """Updates W (m, n) by W <- (1 - lr decay) W - lr sqrt(max(1, m/n)) orthogonalize(Nesterov momentum of the
    gradient).

    torch.optim.Muon differs only in its precision on a CPU, where it takes 2.5 times as long. A step does nothing if
    the scalar tensor `found_inf` is set and not 0, which the host need not read.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, params: list, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        bad = None if self.found_inf is None else self.found_inf > 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                # if bad, the average is mixed with itself, which leaves it unchanged
                grad = p.grad if bad is None else torch.where(bad, state["momentum"], p.grad)
                average = state["momentum"].lerp_(grad, 1 - group["momentum"])
                update = orthogonalize(upcast(grad.lerp(average, group["momentum"])))
                kept = 1 - group["lr"] * group["weight_decay"]
                if bad is not None:
                    update, kept = update.masked_fill(bad, 0), torch.where(bad, 1.0, kept)
                p.mul_(kept)
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
