"""The records of a run: always metrics.csv, and a tracker's run if there is one."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from genai import checkpoint
from genai.core import files, metrics_csv
from genai.core.runs import Card
from genai.evaluation.cards import table
from genai.modalities.base import Clips, Shown, save


class Record:
    """Writes metrics to `metrics.csv` (columns step, name, value) and samples below `samples/`; passes both to a
    tracker.

    The tracker is a Lightning Logger. Only rank zero writes. Raises UserError if a file cannot be written.
    """

    def __init__(self, folder: Path, tracker: Logger | None = None, writes: bool = True):
        self.folder, self.tracker, self.writes = folder, tracker, writes
        self.csv = folder / "metrics.csv"
        self.latest: dict[str, float] = {}

    def cut(self, step: int | None) -> None:
        """Drop the rows after `step`, or all if it is None, as well as damaged rows and a half-written last line."""
        if not self.writes:
            return
        kept = [] if step is None else [row.line for row in metrics_csv.rows(self.csv) if row.step <= step]
        files.write_text(self.csv, metrics_csv.HEAD + "".join(kept), within=self.folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row per value."""
        self.latest.update(values)
        if not self.writes:
            return
        with files.check_writable(self.csv, checkpoint.DISK_HINT), self.csv.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows((step, name, value) for name, value in values.items())
        self._track("log_metrics", dict(values), step)

    def samples(self, step: int, name: str, shown: Shown, caption: str = "") -> None:
        """Write samples to samples/<name>_<step>, see `modalities.base.save`, and pass them to the tracker with their
        caption."""
        if not self.writes:
            return
        folder = self.folder / "samples"
        paths = [str(folder / file) for file in save(shown, folder / f"{name}_{step:07d}", self.folder)]
        if isinstance(shown, list):
            self._track("log_text", name, ["sample", "text"], [[i, text] for i, text in enumerate(shown)], step=step)
            self._track("add_text", name, "\n\n".join(shown), step)
        else:
            below = f"step {step}" + (f", {caption}" if caption else "")
            picture = shown.picture if isinstance(shown, Clips) else shown
            self._track("log_image", name, paths[:1], step=step, caption=[below])
            self._track("add_image", name, picture, step)
            if isinstance(shown, Clips):
                heard = f"{name}_sound"
                self._track("log_audio", heard, paths[1:], step=step, caption=[below], sample_rate=[shown.sr_hz])
                self._track("add_audio", heard, shown.waves[0].mean(0), step, shown.sr_hz)

    def cards(self, step: int, found: list[Card]) -> None:
        """Log the figures of an evaluation as `card/<metric>`, and all of them as a table of the tracker."""
        self.log(step, {f"card/{card['metric']}": card["value"] for card in found})
        if self.writes:
            self._track("log_table", "cards", *table(found), step=step)

    def _track(self, method: str, *arguments: object, **more: object) -> None:
        """Call a method of the tracker, or of its experiment, if it exists; a tracker that raises is dropped."""
        try:
            for owner in (self.tracker, getattr(self.tracker, "experiment", None)):
                if callable(call := getattr(owner, method, None)):
                    call(*arguments, **more)
                    return
        except Exception as error:
            print(f"the tracker failed, the run goes on without it ({type(error).__name__}: {error})", flush=True)
            self.tracker = None


class Means:
    """Running weighted means on the device; the host waits only when they are read."""

    def __init__(self):
        self.zero = torch.zeros(())
        self.sums: dict[str, tuple[Tensor, Tensor | float]] = {}  # name -> sums of value * weight (float64), of weight

    def to(self, device: torch.device) -> "Means":
        """Move the sums to a device and return self."""
        self.zero = torch.zeros((), device=device)
        self.sums = {name: (total.to(device), weight) for name, (total, weight) in self.sums.items()}
        return self

    def add(self, values: Mapping[str, tuple[Tensor, Tensor | float]]) -> None:
        """Add values, name -> (mean, weight), each mean a scalar tensor."""
        for name, (value, weight) in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=value.device), 0.0
            total, weights = self.sums[name]
            if isinstance(weight, Tensor):
                total += value.detach() * weight
            else:
                total.add_(value.detach(), alpha=weight)
            self.sums[name] = total, weights + weight

    def reduce(self, keep: bool = True) -> "Means":
        """Sum over ranks in place and return self; ranks that do not `keep` the sum start again from zero.

        A rank may lack names that others have, for instance if it had nothing to evaluate.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            names: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(names, list(self.sums))
            for name in sorted({name for part in names for name in part}):
                self.add({name: (self.zero, 0.0)})
                total, weight = self.sums[name]
                pair = torch.stack([total, torch.as_tensor(weight).to(total)])
                torch.distributed.all_reduce(pair)
                self.sums[name] = pair[0], pair[1]
        if not keep:
            self.sums = {}
        return self

    def read(self) -> dict[str, float]:
        """Return the means so far, without names of no weight, and start again from zero. Waits for the device once."""
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        totals, weights = zip(*sums.values(), strict=True)
        weights = [
            w.to(t) if isinstance(w, Tensor) else torch.full_like(t, w) for t, w in zip(totals, weights, strict=True)
        ]
        read = torch.stack([*totals, *weights]).cpu().tolist()
        pairs = zip(sums, read, read[len(sums) :], strict=False)
        return {name: total / weight for name, total, weight in pairs if weight > 0}
