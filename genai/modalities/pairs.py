"""Pairs of texts: the source, a condition that `prompt=` gives, and the target that a model writes of it."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genai.core.errors import UserError
from genai.core.protocols import Batch, OnStep
from genai.core.runs import Facts
from genai.metrics import likelihood
from genai.modalities import tokenizers
from genai.modalities.base import Modality, Request, Texts, repeat_strings
from genai.modalities.text import Text
from genai.modalities.tokenizers import Tokenizer

SOURCE_PAD = -1
"""The id that pads a source at its end."""


class Source(Modality):
    """A source: int64 (B, S), the ids of a text and the end of document, then `SOURCE_PAD`.

    Args:
        tokenizer: with an end of document.
        examples: sources that are taken in turn where none is asked for.
    """

    field, keys, meaning, comparison = "source", ("prompt",), "source's vocabulary", None

    def __init__(self, tokenizer: Tokenizer, examples: Sequence[str]):
        super().__init__()
        if tokenizer.end is None or not examples or not all(type(text) is str for text in examples):
            raise UserError("a source has a tokenizer with an end of document, and examples, which are strings")
        self.tokenizer, self.examples = tokenizer, list(examples)

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.state(), "examples": self.examples}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Source":
        if state.keys() != {"tokenizer", "examples"} or not isinstance(state["examples"], list):
            raise UserError("a source is described by its tokenizer and a list of examples alone")
        return cls(tokenizers.from_state(state["tokenizer"]), state["examples"])

    def completed(self, request: Request, n: int) -> Request:
        if request.get("prompt") is not None:
            return request
        return {**request, "prompt": repeat_strings(self.examples[:n], n, "prompt")}

    def condition(self, request: Request, n: int) -> Batch:
        """Return `source` of the prompts, or of examples in turn. Raises UserError for what the tokenizer does not have."""
        texts = repeat_strings(self.completed(request, n)["prompt"], n, "prompt")
        return {"source": pad_sources([self.encode(text) for text in texts])}

    def encode(self, text: str) -> Tensor:
        """Return the ids of a source, int64 (S,), with the end of document."""
        return with_end(self.tokenizer, text)

    def preview(self, batch: Batch, columns: int | None = None) -> Texts:
        return [self.tokenizer.decode([i for i in row if i >= 0]) for row in batch[self.field].tolist()]


class Target(Text):
    """A text that a model writes of a source: token ids int64 (B, T), each of `length` (B,) tokens if a batch has that."""

    keys, comparison, windowed = ("stop",), "answers", False
    likelihoods = ("nats_per_token", "bits_per_character")

    def condition(self, request: Request, n: int) -> Batch:
        """Return the id before a target as the beginning of n samples; the prompt of a request is the source's."""
        return super().condition({"stop": request.get("stop")}, n)

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write samples.txt, a line for each with source and target, and samples.jsonl as of texts, with the source as prompt."""
        written = super().write(folder, batch, names, {}, columns)
        texts, lines = self.preview(batch), (folder / "samples.jsonl").read_text().splitlines()
        sources = (
            repeat_strings(request["prompt"], len(texts), "prompt") if request.get("prompt") else [""] * len(texts)
        )
        plain = (f"{source} -> {text}\n" for source, text in zip(sources, texts, strict=True))
        (folder / "samples.txt").write_text("".join(plain), encoding="utf-8")
        facts = ({**json.loads(line), "prompt": source} for line, source in zip(lines, sources, strict=True))
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
        return written

    def units(self, nats: Tensor, targets: int | None, part: Any, shape: Sequence[int], values: int | None) -> Facts:
        """Convert -ln p in nats (N,) of targets to nats per token and bits per character; the end of a target is a token."""
        tokens = len(nats) * shape[0] if targets is None else targets
        characters = tokens * part.characters / part.tokens
        return likelihood.per_token(nats, tokens, characters) | {"vocabulary": self.tokenizer.vocab_size}

    @contextlib.contextmanager
    def watch(self, request: Request) -> Iterator[OnStep]:
        """Print the first source, and its target while that is generated."""
        prompt = request.get("prompt")
        print("" if prompt is None else f"{repeat_strings(prompt, 1, 'prompt')[0]} -> ", end="", flush=True)
        with super().watch({"stop": request.get("stop")}) as on_step:
            yield on_step


def with_end(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the ids of a text, int64 (T,), followed by the end of document."""
    assert tokenizer.end is not None
    return torch.tensor([*tokenizer.encode(text).tolist(), tokenizer.end])


def pad_sources(rows: Sequence[Tensor]) -> Tensor:
    """Return sources (S_i,) as int64 (n, S), padded at the end."""
    return pad_sequence([*rows], batch_first=True, padding_value=SOURCE_PAD)
