"""Text as token ids: the prompts of a language model, and its output."""

import bisect
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genai.core.errors import UserError, show
from genai.core.protocols import Batch, Ending, OnStep
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
        """Return the conditions of n samples, see `encode_prompts`; a stop string that is one token gives the id that ends them.

        Raises UserError for characters that the tokenizer does not have.
        """
        prompt, stop = request.get("prompt"), self.stop(request)
        cond = encode_prompts(self.tokenizer, repeat_strings("" if prompt is None else prompt, n, "prompt"))
        if stop is not None and len(stop.strings) == 1 and len(ids := self.tokenizer.encode(stop.strings[0])) == 1:
            cond["stop"] = torch.full((n,), int(ids[0]))
        return cond

    def stop(self, request: Request) -> "StopStrings | None":
        """Return the strings that end a sample, one or a list of any length; the end of a document ends it too.

        Raises UserError for no strings, an empty one, and one with characters that the tokenizer does not have.
        """
        given = request.get("stop")
        if given is None:
            return None
        listed = given if isinstance(given, list | tuple) else [given]
        if not listed or any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in listed):
            raise UserError(f"stop={show(given)} must be a string or a list of strings, none of them empty")
        strings = [str(one) for one in listed]
        if "" in strings:
            raise UserError(f"stop={show(given)} has an empty string, which every text has: leave it out")
        for string in strings:
            self.tokenizer.encode(string)
        return StopStrings(self.tokenizer, strings)

    def preview(self, batch: Batch, columns: int | None = None) -> Texts:
        rows = batch[self.field].tolist()
        lengths, ends = (
            batch[key].tolist() if key in batch else [None] * len(rows) for key in ("length", "characters")
        )
        return [self.tokenizer.decode(row[:n])[:end] for row, n, end in zip(rows, lengths, ends, strict=True)]

    def write(self, folder: Path, batch: Batch, names: list[str], request: Request, columns: int | None) -> list[str]:
        """Write samples.txt to read, and samples.jsonl with seed, prompt, text, ids and ln p of the text and of each token."""
        folder.mkdir(parents=True, exist_ok=True)
        given = self.condition({"prompt": request.get("prompt")}, len(batch["seeds"]))
        whole = "given" in batch  # the prompts are parts of the samples
        begun = [row[pad:] for row, pad in zip(given["tokens"].tolist(), given["pad"].tolist(), strict=True)]
        each = batch["seeds"].tolist(), begun, self.preview(batch), batch["tokens"], batch["log_prob"]
        plain, lines = [], []
        for seed, start, text, tokens, log_prob in zip(*each, strict=True):
            prompt = self.tokenizer.decode(start)
            plain.append(f"--- seed {seed}\n{'' if whole else prompt}{text}\n\n")
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
        given, shown, waiting = self.condition(request, 1), "", ""
        first = prompt[0] if isinstance(prompt, list | tuple) and prompt else prompt
        start = "" if first is None else self.tokenizer.decode(_ids(self.tokenizer, str(first)).tolist())
        ends = {*given["stop"].tolist()} if "stop" in given else set()
        ends, width, stop = ends | {self.tokenizer.end}, 0, self.stop(request)

        def on_step(i: int, n: int, state: Batch) -> None:
            nonlocal shown, waiting, width
            tokens = state["tokens"][0].tolist()
            if "given" in state:  # of a whole text, which is printed once no token is hidden
                if not shown and self.tokenizer.mask not in tokens:
                    shown = self.preview({name: value[:1] for name, value in state.items()})[0]
                    print(shown, end="", flush=True)
                return
            if len(tokens) <= width:  # a further batch: only the first text is printed
                width = sys.maxsize
                return
            width = len(tokens)
            text = self.tokenizer.decode([*itertools.takewhile(lambda token: token not in ends, tokens)])
            if stop is not None:
                text, waiting = stop.split(text)
            written = (start + text).rstrip("\ufffd")  # a character whose last bytes are not there yet
            if len(written) > len(shown):
                print(written[len(shown) :], end="", flush=True)
                shown = written

        yield on_step
        print(waiting)


class StopStrings:
    """Strings that end a text of a tokenizer's ids: it is over with the first of them that is complete, or with the document.

    The text ends before that string, the longest one if several are complete at once. Only what is written counts, not the
    prompt, and a character whose last bytes are not there yet does not.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, strings

    def __call__(self, ids: list[int]) -> Ending:
        """Return where a text of ids ends, see `Ending`."""
        last = self.tokenizer.end
        closed = last is not None and last in ids
        ids = ids[: ids.index(last)] if last is not None and closed else ids
        text = self.tokenizer.decode(ids)
        end = self.end(text)
        if end is None:
            return Ending(closed, len(ids), len(text))

        def reaches(n: int) -> bool:
            return self.tokenizer.decode(ids[:n])[:end] == text[:end]

        # The fewest tokens whose text reaches the end: a token can hold the last characters and the start of the string.
        return Ending(True, bisect.bisect_left(range(len(ids)), True, key=reaches), end)

    def end(self, text: str) -> int | None:
        """Return how many characters of a text are before the string that ends it; None if there is none."""
        whole = self._whole(text)
        found = [(at + len(one), at) for one in self.strings if (at := whole.find(one)) >= 0]
        return min(found)[1] if found else None

    def split(self, text: str) -> tuple[str, str]:
        """Split what is written before the end of a text into what is certain, and what may be the start of a stop string."""
        if (end := self.end(text)) is not None:
            return text[:end], ""
        whole = self._whole(text)
        longest = min(max(map(len, self.strings)) - 1, len(whole))
        n = next((n for n in range(longest, 0, -1) if any(one.startswith(whole[-n:]) for one in self.strings)), 0)
        return whole[: len(whole) - n], whole[len(whole) - n :]

    @staticmethod
    def _whole(text: str) -> str:
        return text.rstrip("\ufffd")


def encode_prompts(tokenizer: Tokenizer, given: Sequence[str]) -> Batch:
    """Encode prompts as the conditions of a text sampler.

    Returns `tokens` int64 (B, T), padded on the left to one length; `pad` (B,), the amount of padding; `lead` (B,), the number
    of ids in front of the prompt itself; and `stop` (B,), the id that ends a sample, if the tokenizer has an end of document.

    A text begins after the end of a document; without one an empty prompt begins with a line break, or else with id 0. With
    special ids every prompt begins so, and [MASK] in it is a hidden token, but \\[MASK] those letters. Raises UserError for
    characters that the tokenizer does not have, and for prompts of which only some have a [MASK].
    """
    own = [_ids(tokenizer, text) for text in given]
    if len({tokenizer.mask in row.tolist() for row in own}) > 1:
        raise UserError("prompt= has [MASK] in some prompts and not in others: give it in all of them, or in none")
    rows = [torch.cat([_lead(tokenizer, text), row]) for text, row in zip(given, own, strict=True)]
    cond = pad_prompts(rows)
    cond["lead"] = torch.tensor([len(row) - len(text) for row, text in zip(rows, own, strict=True)])
    if tokenizer.end is not None:
        cond["stop"] = torch.full((len(rows),), tokenizer.end)
    return cond


def _ids(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the ids of a prompt, int64 (T,), with hidden tokens where it says [MASK], if the tokenizer has an id for them."""
    if tokenizer.mask is None:
        return torch.from_numpy(tokenizer.encode(text).astype(np.int64))
    parts = re.split(r"(?<!\\)\[MASK\]", text)
    rows = [tokenizer.encode(part.replace(r"\[MASK]", "[MASK]")).astype(np.int64) for part in parts]
    hidden = np.array([tokenizer.mask])
    return torch.from_numpy(np.concatenate([rows[0], *(np.concatenate([hidden, row]) for row in rows[1:])]))


def _lead(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the ids in front of a prompt, int64 (0,) or (1,)."""
    start = [] if tokenizer.end is None else [tokenizer.end]
    if (not text or tokenizer.mask is not None) and not start:
        try:
            start = tokenizer.encode("\n").tolist()
        except UserError:
            start = [0]
    return torch.tensor(start, dtype=torch.int64)
