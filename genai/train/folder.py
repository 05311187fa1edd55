"""The run directory: which one a run writes to, and what it writes there before the first step."""

import subprocess
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from genai import checkpoint
from genai.cli import check_unchanged
from genai.core import files
from genai.core.errors import UserError
from genai.train.lock import ELSEWHERE
from genai.train.resume import check_state
from genai.train.strategy import Ranks


def choose_folder(cfg: DictConfig, ranks: Ranks) -> tuple[Path, tuple[dict, Path] | None]:
    """Return the run directory, which may not exist yet, and the content and path of the checkpoint to resume from, if any.

    Raises:
        UserError: the directory holds another run or cannot be written, or the run to resume is damaged, changed or finished.
    """
    if cfg.resume is not None:
        folder = Path(cfg.resume)
        found = checkpoint.newest(folder)
        if found is None:
            print(f"{folder} has no checkpoint yet: training starts from step 0")
            return folder, None
        check_state(*found)
        check_unchanged(OmegaConf.to_container(cfg, resolve=True), found[0]["config"], folder)  # type: ignore[arg-type]
        if found[0]["step"] >= cfg.max_steps:
            raise UserError(f"{folder} is finished, at step {found[0]['step']}: give a larger max_steps= to continue")
        return folder, found
    return Path(ranks.agree(lambda: str(_new_folder(cfg)))), None


def _new_folder(cfg: DictConfig) -> Path:
    """Return the directory of a new run: run_dir=, or a new one below runs/ named after the run and the time."""
    if cfg.run_dir is None:
        stamp = Path("runs") / cfg.name / time.strftime("%Y-%m-%d_%H-%M-%S")
        numbered = (stamp.with_name(f"{stamp.name}_{n}") for n in range(2, 1000))
        files.check_folder(stamp, "run_dir")
        return next(path for path in (stamp, *numbered) if not path.exists())
    folder = Path(cfg.run_dir)
    files.check_folder(folder, "run_dir")
    check_unused(folder)
    return folder


def check_unused(folder: Path) -> None:
    """Raise UserError if a folder holds a run."""
    if any((folder / name).exists() for name in ("config.yaml", "checkpoints")):
        raise UserError(
            f"run_dir={folder} already holds a run: continue it with resume={folder}, or name another run_dir="
        )


def write_config(folder: Path, config: dict) -> None:
    """Write config.yaml into the run directory and, in a git checkout, git.diff, whose first line is the commit."""
    files.write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)), hint=ELSEWHERE)
    source = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, timeout=10).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        if commit:
            files.write_text(folder / "git.diff", f"# commit {commit}\n{git('diff', 'HEAD')}", hint=ELSEWHERE)
    except (OSError, subprocess.TimeoutExpired):
        pass  # no git here, nothing to describe
