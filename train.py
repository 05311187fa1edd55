"""Train a model: python train.py [model=] [data=] [experiment=] [key=value ...]; --help lists every key."""

from omegaconf import DictConfig

from genai.cli import main, resumed


def task(cfg: DictConfig) -> None:
    from genai.train.run import run

    run(cfg)


if __name__ == "__main__":
    main(task, "train", resumed)
