"""Figures of a checkpoint: python evaluate.py [ckpt=] [metrics=] [split=test] [n=] [key=value ...]."""

from genai.core import interrupt

if __name__ == "__main__":
    interrupt.exit_on_signal()  # before the imports, which take long

from omegaconf import DictConfig

from genai.cli import main


def task(cfg: DictConfig) -> None:
    from genai.evaluation.run import run, tracked_run

    result = run(cfg)
    folder = tracked_run(result["cards"]) if cfg.track else None
    if folder is not None:
        from genai.train.trackers import log_cards

        log_cards(folder, result["cards"])


if __name__ == "__main__":
    main(task, "evaluate")
