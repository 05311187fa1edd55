"""`python -m genai.evaluation.baselines data=digits [baseline=] [key=value ...]`: the trivial baselines of a data set."""

from genai.core import interrupt, streams

if __name__ == "__main__":
    interrupt.exit_on_signal()  # before the imports, which take long
    streams.protect_output()

from omegaconf import DictConfig

from genai import cli


def main() -> None:
    """Run the command with sys.argv."""

    def task(cfg: DictConfig) -> None:
        from genai.evaluation.baselines.run import run

        run(cfg)

    cli.main(task, "baselines")


if __name__ == "__main__":
    main()
