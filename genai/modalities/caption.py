"""Captions as conditions of a model, as bytes of UTF-8."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai.core.errors import UserError, at_least
from genai.core.protocols import PAD, Batch
from genai.modalities.base import Modality, Request, Texts, repeat_strings

MAX_LENGTH = 2**20  # bytes of a caption


class Caption(Modality):
    """A caption: its bytes, int64 (B, length), then `PAD`.

    Args:
        length: bytes of the longest caption.
    """

    field, keys, meaning, comparison = "caption", ("prompt", "negative_prompt"), "caption's length", None

    def __init__(self, length: int):
        if at_least(length, 1, "length of a caption") > MAX_LENGTH:
            raise UserError(f"length={length} bytes of a caption are more than {MAX_LENGTH}")
        self.length = length

    def state(self) -> dict[str, Any]:
        return {"length": self.length}

    def condition(self, request: Request, n: int) -> Batch:
        """Return `caption`, the prompts, and `negative`, those that samples are guided away from; empty without a prompt.

        Raises UserError for a prompt that is too long, and for a negative prompt without a prompt.
        """
        prompt, negative = (request.get(key) for key in self.keys)
        if negative is not None and prompt is None:
            raise UserError(
                f"negative_prompt={negative!r} was given, but there is no prompt= to guide towards: leave negative_prompt= out"
            )
        given = {"caption": ("prompt", prompt), "negative": ("negative_prompt", negative)}
        return {
            name: encode(repeat_strings(text, n, key), self.length, "data.length of this model")
            for name, (key, text) in given.items()
            if text is not None
        }

    def preview(self, batch: Batch, columns: int | None = None) -> Texts:
        return [bytes(i for i in row if i != PAD).decode(errors="replace") for row in batch["caption"].tolist()]

    def note(self, folder: Path, names: list[str], request: Request) -> None:
        """Write the prompts of images to captions.jsonl, which `data.captions.Captioned` reads."""
        if request.get("prompt") is not None:
            texts = repeat_strings(request["prompt"], len(names), "prompt")
            pairs = zip(names, texts, strict=True)
            lines = (json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in pairs)
            (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def encode(texts: Sequence[str], length: int, key: str) -> Tensor:
    """Encode texts as bytes, int64 (B, length), then `PAD`. Raises UserError for a longer text."""
    rows = torch.full((len(texts), length), PAD)
    for row, text in zip(rows, texts, strict=True):
        data = text.encode(errors="surrogatepass")
        if len(data) > length:
            raise UserError(
                f"{text[:60]!r} is {len(data)} bytes long, but {key} is {length}: shorten it or train with more"
            )
        row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() if data else row[:0]
    return rows
