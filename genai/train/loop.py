"""The training loop of a run, with its optimisers."""

from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from genai.core.errors import UserError
from genai.core.stored import PRETRAINED
from genai.data.base import Data
from genai.train.lit import LitModel
from genai.train.optim import idle_from
from genai.train.record import Record


def build_loop(
    cfg: DictConfig,
    config: dict[str, Any],
    build: Any,
    model: torch.nn.Module,
    data: Data,
    record: Record,
    resumed: dict | None,
) -> LitModel:
    """Return the training loop. Its optimisers are built once, so that a wrong key is found before anything is written.

    Args:
        config: `cfg` as plain values.
        build: instantiates a config node.
        resumed: content of the checkpoint to resume from; None in a new run.

    Raises:
        UserError: an argument that the loop or an optimiser does not take, or a schedule that ends before the run does.
    """
    for key in ("optim", "discriminator_optim", "ema"):
        # Called with the model, `pretrained` would take it for the name of a checkpoint.
        if (config.get(key) or {}).get("_target_") == PRETRAINED:
            raise UserError(
                f"{key}._target_={PRETRAINED} makes a model of a checkpoint: choose another {key}._target_="
            )
    optim, ema = build(config["optim"]), build(config["ema"])
    loop = build({**config["loop"], "_partial_": True})
    if not (isinstance(loop.func, type) and issubclass(loop.func, L.LightningModule)):
        raise UserError(f"loop._target_={cfg.loop._target_} is not a training loop: leave loop._target_= out")
    try:
        lit = loop(
            model,
            data,
            optim,
            ema,
            record,
            seed=cfg.seed,
            accumulate=cfg.accumulate,
            clip_norm=cfg.clip_norm,
            log_every_steps=cfg.log_every_steps,
        )
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(f"loop._target_={cfg.loop._target_} cannot be built: {error}") from error
    _check_decay(lit.configure_optimizers(), cfg.max_steps, resumed)
    return lit


def _check_decay(optimizers: Any, steps: int, resumed: dict | None) -> None:
    """Raise UserError if an optimiser's learning rate would be 0 for the last steps of a run.

    A resumed run whose max_steps is as before only gets a warning, since older versions accepted such a schedule.
    """
    for name, optimizer in zip(
        ("optim", "discriminator_optim"), optimizers if isinstance(optimizers, list) else [optimizers], strict=False
    ):
        first = idle_from(optimizer, steps)
        if first is None:
            continue
        what = f"the learning rate would be 0 from step {first} to max_steps={steps}"
        if resumed is not None and resumed["config"].get("max_steps") == steps:
            print(f"warning: {what}: stop the run there, or give a larger {name}.decay_steps=", flush=True)
        else:
            raise UserError(
                f"{what}, since {name}.decay_steps={first}: give {name}.decay_steps={steps} for a longer decay, "
                f"{name}.lr_min= for its floor, or {name}.schedule=constant"
            )
