"""The function `genai.compose`: composes a config from Python, with the checks of the command line."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from genai.cli.compose import compose_config
from genai.cli.errors import nearest
from genai.cli.overrides import refuse_hydra_keys
from genai.cli.resume import prepare_training
from genai.cli.sample import prepare_sampling
from genai.core.errors import UserError

PREPARE = {"train": prepare_training, "sample": prepare_sampling, "evaluate": None, "baselines": None}


def compose(overrides: Sequence[str] = (), config: str = "train", config_dir: str | None = None) -> DictConfig:
    """Return the config that a command would run with, checked as the command line checks it.

    Keys can be set afterwards, `cfg.max_steps = 100`; a key that is not there raises.

    Args:
        overrides: as typed after a command, `["model=edm", "max_steps=100"]`.
        config: the command: train, sample, evaluate or baselines.
        config_dir: a folder of the user's own configs.

    Raises:
        UserError: a key, a choice, a type or a value that does not exist or is out of its range.
    """
    if config not in PREPARE:
        raise UserError(f"config={config!r} must be one of {', '.join(PREPARE)}{nearest(str(config), PREPARE)}")
    if isinstance(overrides, str) or not all(isinstance(override, str) for override in overrides):
        raise UserError(
            f"overrides must be a list of strings such as ['model=edm', 'max_steps=100'], got {overrides!r}"
        )
    refuse_hydra_keys(overrides)
    cfg = compose_config(config, [*overrides], PREPARE[config], config_dir=config_dir)
    if "sweep" in cfg:
        raise UserError("sweep= names several runs, which only the command genai train -m starts: leave it out")
    OmegaConf.set_struct(cfg, True)
    return cfg
