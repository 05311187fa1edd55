"""The one generic training loop, the only place where Lightning is imported, and itself the function `genai.train(cfg)`.

The package and the function share one name, and so one attribute of `genai`: this module can be called.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Train(ModuleType):
    """A module that trains when it is called."""

    def __call__(self, cfg: "DictConfig | Sequence[str]") -> Path:
        """Train as a config of `genai.compose` says, or as a list of overrides does, and return the run directory.

        It trains in this process, which it leaves as it was; `cfg` stays as it is.

        Raises:
            UserError: the config is wrong, or training had to stop, as with a loss that is not finite.
            KeyboardInterrupt: Ctrl-C, after the step is finished and the checkpoint is saved.
        """
        from genai.train.run import train

        return train(cfg)


# Lightning imports tqdm, whose bars are not used here, and tqdm warns in a notebook that lacks their widget.
warnings.filterwarnings("ignore", ".*IProgress not found.*")

sys.modules[__name__].__class__ = Train
