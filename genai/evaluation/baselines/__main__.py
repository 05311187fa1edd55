"""`python -m genai.evaluation.baselines data=digits [baseline=] [key=value ...]`: the trivial baselines of a data set."""

from genai.core import interrupt

if __name__ == "__main__":
    interrupt.exit_on_signal()  # before the imports, which take long

from omegaconf import DictConfig

from genai.cli import main


def task(cfg: DictConfig) -> None:
    from genai.evaluation.baselines.run import run

    run(cfg)


if __name__ == "__main__":
    main(task, "baselines")
