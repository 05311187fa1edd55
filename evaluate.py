"""Likelihood of a checkpoint: python evaluate.py [ckpt=] [split=test] [n=] [key=value ...]."""

from omegaconf import DictConfig

from genai.cli import main


def task(cfg: DictConfig) -> None:
    from genai.evaluation import run

    run(cfg)


if __name__ == "__main__":
    main(task, "evaluate")
