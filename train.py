"""Train a model: python train.py [model=] [data=] [experiment=] [key=value ...]; --help lists every key."""

from genai.core import interrupt

if __name__ == "__main__":
    interrupt.exit_on_signal()  # before the imports, which take long

from omegaconf import DictConfig

from genai import sweeps
from genai.cli import main


def task(cfg: DictConfig) -> None:
    from genai.train.run import run

    sweeps.refuse_alone(cfg)
    run(cfg)


if __name__ == "__main__":
    sweeps.register()
    main(task, "train", sweeps.prepare)
