"""Text as token ids: the prompts of a language model, and its output."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError
from genai.core.protocols import Batch, OnStep
from genai.core.rng import RNG_VERSION
from genai.core.runs import Facts
from genai.metrics import likelihood
from genai.modalities import tokenizers
from genai.modalities.base import Modality, Request, Texts, pad_prompts, repeat_strings
from genai.modalities.tokenizers import Tokenizer


class Text(Modality):
    """Texts as token ids, int64 (B, T), each of `length` (B,) tokens if a batch has that."""

    field, keys, meaning = "tokens", ("prompt", "stop"), "vocabulary"
    comparison, windowed, likelihoods = "texts", True, ("nats_per_token", "bits_per_character")

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Text":
        if state.keys() != {"tokenizer"}:
            raise UserError("a text is described by its tokenizer alone")
        return cls(tokenizers.from_state(state["tokenizer"]))

    def condition(self, request: Request, n: int) -> Batch:
        """Return the conditions of n samples, see `encode_prompts`; `stop`, one token, overrides the id that ends a sample.

        Raises UserError for a stop that is not one token, and for characters that the tokenizer does not have.
        """
        prompt, stop = (request.get(key) for key in self.keys)
        cond = encode_prompts(self.tokenizer, repeat_strings("" if prompt is None else prompt, n, "prompt"))
        if stop is not None:
            if not isinstance(stop, str | int | float):
                raise UserError(f"stop={stop} must be a string of one token")
            ids = self.tokenizer.encode(str(stop))
            if len(ids) != 1:
                raise UserError(
                    f"stop={stop!r} is {len(ids)} tokens of this model's tokenizer: give a string that is one"
                )
            cond["stop"] = torch.full((n,), int(ids[0]))
        return cond

    def preview(self, batch: Batch, columns: int | None = None) -> Texts:
        rows = batch[self.field]
        lengths = batch["length"].tolist() if "length" in batch else [rows.shape[1]] * len(rows)
        return [self.tokenizer.decode(row[:n]) for row, n in zip(rows.tolist(), lengths, strict=True)]

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write samples.txt to read, and samples.jsonl with seed, prompt, text, ids and ln p of the text and of each token."""
        folder.mkdir(parents=True, exist_ok=True)
        given = self.condition({"prompt": request.get("prompt")}, len(batch["seeds"]))
        begun = [row[pad:] for row, pad in zip(given["tokens"].tolist(), given["pad"].tolist(), strict=True)]
        each = batch["seeds"].tolist(), begun, self.preview(batch), batch["tokens"], batch["log_prob"]
        plain, lines = [], []
        for seed, start, text, tokens, log_prob in zip(*each, strict=True):
            prompt = self.tokenizer.decode(start)
            plain.append(f"--- seed {seed}\n{prompt}{text}\n\n")
            facts = {
                "seed": seed,
                "prompt": prompt,
                "text": text,
                "log_prob": round(log_prob.double().sum().item(), 4),
                "tokens": tokens.tolist(),
                "log_probs": [round(x, 4) for x in log_prob.tolist()],
                "rng_version": RNG_VERSION,
            }
            lines.append(json.dumps(facts) + "\n")
        (folder / "samples.txt").write_text("".join(plain), encoding="utf-8")
        (folder / "samples.jsonl").write_text("".join(lines))
        return ["samples.txt", "samples.jsonl"]

    def units(self, nats: Tensor, targets: int | None, part: Any, shape: Sequence[int], values: int | None) -> Facts:
        """Convert -ln p in nats (N,) of windows to nats per token and bits per character."""
        tokens = len(nats) * shape[0] if targets is None else targets
        window = {"context": part.length, "context_overlap": part.overlap, "vocabulary": self.tokenizer.vocab_size}
        return likelihood.per_token(nats, tokens, tokens * part.characters / part.tokens) | window

    @contextlib.contextmanager
    def watch(self, request: Request) -> Iterator[OnStep]:
        """Print the first text while it is generated, up to its end."""
        prompt = request.get("prompt")
        given, shown = self.condition(request, 1), ""
        first = prompt[0] if isinstance(prompt, list | tuple) and prompt else prompt
        start = "" if first is None else self.tokenizer.decode(self.tokenizer.encode(str(first)).tolist())
        end, width = int(given["stop"]) if "stop" in given else None, 0

        def on_step(i: int, n: int, state: Batch) -> None:
            nonlocal shown, width
            tokens = state["tokens"][0].tolist()
            if len(tokens) <= width:  # a further batch: only the first text is printed
                width = sys.maxsize
                return
            width = len(tokens)
            ends = [k for k, token in enumerate(tokens) if token == end]
            written = start + self.tokenizer.decode(tokens[: ends[0]] if ends else tokens)
            written = written.rstrip("\ufffd")  # a character whose last bytes are not there yet
            if len(written) > len(shown):
                print(written[len(shown) :], end="", flush=True)
                shown = written

        yield on_step
        print()


def encode_prompts(tokenizer: Tokenizer, given: Sequence[str]) -> Batch:
    """Encode prompts as the conditions of a text sampler.

    Returns `tokens` int64 (B, T), padded on the left to one length; `pad` (B,), the amount of padding; `lead` (B,), the number
    of ids in front of the prompt itself; and `stop` (B,), the id that ends a sample, if the tokenizer has an end of document.

    A text begins after the end of a document; without one an empty prompt begins with a line break, or else with id 0. Raises
    UserError for characters that the tokenizer does not have.
    """
    own = [torch.from_numpy(tokenizer.encode(text).astype(np.int64)) for text in given]
    rows = [torch.cat([_lead(tokenizer, text), row]) for text, row in zip(given, own, strict=True)]
    cond = pad_prompts(rows)
    cond["lead"] = torch.tensor([len(row) - len(text) for row, text in zip(rows, own, strict=True)])
    if tokenizer.end is not None:
        cond["stop"] = torch.full((len(rows),), tokenizer.end)
    return cond


def _lead(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the ids in front of a prompt, int64 (0,) or (1,)."""
    start = [] if tokenizer.end is None else [tokenizer.end]
    if not text and not start:
        try:
            start = tokenizer.encode("\n").tolist()
        except UserError:
            start = [0]
    return torch.tensor(start, dtype=torch.int64)
