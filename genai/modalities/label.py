"""Class labels, given by index or name."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch
from genai.modalities.base import Modality, Request, Texts


class Label(Modality):
    """The class of a sample, int64 (B,).

    Args:
        classes: number of classes.
        names: of the classes, None if they have none.
    """

    field, keys, meaning, comparison = "label", ("label",), "list of classes", None

    def __init__(self, classes: int, names: Sequence[str] | None = None):
        at_least(classes, 1, "classes of labels")
        if names is not None and not (
            isinstance(names, list) and len(names) == classes and all(type(name) is str for name in names)
        ):
            raise UserError(f"the names of {classes} classes must be as many strings, or null")
        self.classes, self.names = classes, names

    def state(self) -> dict[str, Any]:
        return {"classes": self.classes, "names": self.names}

    def condition(self, request: Request, n: int) -> Batch:
        """Return `label`, int64 (n,): the labels asked for, cyclically, or all classes in turn.

        Raises UserError for an unknown class.
        """
        label = request.get("label")
        if label is None:
            return {"label": torch.arange(n) % self.classes}
        wanted = list(label) if isinstance(label, list | tuple) else [label]
        if not wanted:
            raise UserError("label=[] is empty: leave label= out for every class in turn")
        indices = torch.tensor([self.index(value) for value in wanted])
        return {"label": indices.repeat(-(-n // len(indices)))[:n]}

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
            f"label={value} is not a class of this model: give an index from 0 to {self.classes - 1}{shown}"
        )

    def preview(self, batch: Batch, columns: int | None = None) -> Texts:
        """Return the class name of each label."""
        return [self.names[i] if self.names else str(i) for i in batch["label"].tolist()]
