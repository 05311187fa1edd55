"""Class labels, given by index or name."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.modalities.base import Modality, Request, Texts


class Label(Modality):
    """The class of a sample, int64 (B,).

    Args:
        classes: number of classes.
        names: of the classes, None if they have none.
        field: of a batch, and the key of a request: `label`, or what else a sample is classified by, such as `speaker`.
        turn: samples in a row of one class where the classes are taken in turn.
    """

    field, meaning, comparison = "label", "list of classes", None

    def __init__(self, classes: int, names: Sequence[str] | None = None, field: str = "label", turn: int = 1):
        super().__init__(field)
        self.keys = (self.field,)
        at_least(classes, 1, "classes of labels")
        if names is not None and not (
            isinstance(names, list) and len(names) == classes and all(type(name) is str for name in names)
        ):
            raise UserError(f"the names of {classes} classes must be as many strings, or null")
        self.classes, self.names, self.turn = classes, names, at_least(turn, 1, "turn")

    def state(self) -> dict[str, Any]:
        other = {} if self.field == "label" else {"field": self.field, "turn": self.turn}  # older files have no field
        return {"classes": self.classes, "names": self.names, **other}

    def condition(self, request: Request, n: int) -> Batch:
        """Return the labels asked for, cyclically, or all classes in turn: int64 (n,).

        Raises UserError for an unknown class.
        """
        label = request.get(self.field)
        if label is None:
            return {self.field: self._in_turn(0, n)}
        wanted = list(label) if isinstance(label, list | tuple) else [label]
        if not wanted:
            raise UserError(f"{self.field}=[] is empty: leave {self.field}= out for every class in turn")
        indices = torch.tensor([self.index(value) for value in wanted])
        return {self.field: indices.repeat(-(-n // len(indices)))[:n]}

    def in_turn(self, start: int, stop: int) -> Texts:
        return self.preview({self.field: self._in_turn(start, stop)})

    def _in_turn(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop) // self.turn % self.classes

    def index(self, value: object) -> int:
        """Return the index of a class given by name or index. Raises UserError for an unknown one."""
        if self.names and not isinstance(value, bool) and str(value) in self.names:
            return self.names.index(str(value))
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.classes:
            return value
        shown = f", or one of {', '.join(self.names[:20])}" if self.names else ""
        raise UserError(
            f"{self.field}={value} is not a class of this model: give an index from 0 to {self.classes - 1}{shown}"
        )

    def preview(self, batch: Batch, columns: int | None = None) -> Texts:
        """Return the class name of each label."""
        return [self.names[i] if self.names else str(i) for i in batch[self.field].tolist()]
