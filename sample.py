"""Sample from a checkpoint: python sample.py [ckpt=] [n=] [seed=] [label=] [sampler=] [key=value ...]."""

from genai.core import interrupt

if __name__ == "__main__":
    interrupt.exit_on_signal()  # before the imports, which take long

from omegaconf import DictConfig

from genai.cli import main, with_sampler


def task(cfg: DictConfig) -> None:
    from genai.sampling import run

    run(cfg)


if __name__ == "__main__":
    main(task, "sample", with_sampler)
