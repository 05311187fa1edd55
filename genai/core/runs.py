"""Run directories on disk: a folder with a config.yaml."""

from pathlib import Path


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def runs_below(folder: Path) -> list[Path]:
    """The run directories below a folder, sorted; not what a tracker keeps inside a run."""
    found = {path.parent for path in folder.glob("**/config.yaml")}
    return sorted(run for run in found if not found.intersection(run.parents))


def newest_run(folder: Path) -> Path | None:
    """The run below a folder that was written to last; None if there is none."""

    def written(run: Path) -> float:
        last = run / "checkpoints" / "last.ckpt"
        return (last if last.exists() else run / "config.yaml").stat().st_mtime

    return max(runs_below(folder), key=written, default=None)
