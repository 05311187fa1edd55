"""Strings that end a text: found on what its ids decode to, whatever the ids, the batch and the sampler."""

import random

import pytest
import torch

from genai.core.errors import UserError
from genai.modalities import tokenizers
from genai.modalities.text import StopStrings, Text
from genai.models.autoregressive import decode
from genai.models.autoregressive.speculative import speculative
from tests.models.autoregressive.test_gpt import V, gpt

LETTERS = "abENDé\n 東"
TEXT = "abba END\n\nEé東N EE\n" * 50
KINDS = {
    kind: tokenizers.learn(kind, iter([TEXT]), len(TEXT), 300 if kind == "bpe" else None, False)
    for kind in ("byte", "char", "bpe")
}


def definition(text, strings):
    """The text before the first stop string that is complete, the longest one of those."""
    for n in range(len(text) + 1):
        complete = [len(one) for one in strings if text[:n].endswith(one)]
        if complete:
            return text[: n - max(complete)]
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_ends_before_the_first_stop_string_that_is_complete(kind):
    """Byte tokens cut characters, and tokens of a BPE hold the end of a text and the start of its stop string."""
    tokenizer, draw, ended = KINDS[kind], random.Random(0), 0
    for _ in range(300):
        strings = ["".join(draw.choices(LETTERS, k=draw.randint(1, 3))) for _ in range(draw.randint(1, 3))]
        text = "".join(draw.choices(LETTERS, k=20))
        stop, ids, expected = (
            StopStrings(tokenizer, strings),
            tokenizer.encode(text).tolist(),
            definition(text, strings),
        )
        found, shown = stop(ids), ""
        assert found.over == (expected is not None)
        assert tokenizer.decode(ids[: found.tokens])[: found.characters] == (text if expected is None else expected)
        assert len(tokenizer.decode(ids[: found.tokens - 1])) <= found.characters or not found.tokens
        for n in range(len(ids) + 1):
            certain, waiting = stop.split(tokenizer.decode(ids[:n]))
            assert certain.startswith(shown), "what was shown stays"
            assert stop(ids[:n]).over <= found.over and (not stop(ids[:n]).over or stop(ids[:n]) == found)
            shown = certain
        assert shown + waiting == (text if expected is None else expected)
        ended += found.over
    assert 50 < ended < 250


class Letters(tokenizers.Char):
    """An id for each of two letters, so that stop strings are of many tokens."""

    def __init__(self, end=False):
        super().__init__("abcdefghijklmnopqrstuvwxyz"[: V - end], end)


@pytest.mark.parametrize("end", [False, True])
def test_stop_strings_change_neither_with_the_batch_nor_with_the_sampler(end):
    """The text before a stop string is kept; what follows is padding with ln p 0, and writing ends early."""
    model, seeds, calls, tokenizer = gpt(length=300), torch.arange(24), [], Letters(end)
    cond = {"tokens": torch.zeros(24, 1, dtype=torch.int64)} | ({"stop": torch.full((24,), V - 1)} if end else {})
    free = decode.generate(model, seeds, {"tokens": cond["tokens"]}, max_new_tokens=200)
    texts = [tokenizer.decode(row) for row in free["tokens"].tolist()]
    strings = [texts[0][40:42], texts[1][10:12], texts[2][3:6]]
    stop = Text(tokenizer).stop({"stop": strings})
    batch = (
        decode.generate(model, seeds, cond, lambda i, n, s: calls.append(i), max_new_tokens=10_000, stop=stop)
        if end
        else (decode.generate(model, seeds, cond, max_new_tokens=200, stop=stop))
    )
    assert not end or len(calls) < 10_000
    shown, ended = Text(tokenizer).preview(batch), 0
    for b, row in enumerate(free["tokens"].tolist()):
        row = row[: row.index(V - 1)] if end and V - 1 in row else row
        text = tokenizer.decode(row)
        expected = definition(text, strings)
        ended += expected is not None
        n = batch["length"][b].item()
        assert shown[b] == (text if expected is None else expected) and n == batch["characters"][b] == len(shown[b])
        assert torch.equal(batch["tokens"][b, :n], free["tokens"][b, :n])
        assert torch.equal(batch["log_prob"][b, :n], free["log_prob"][b, :n])
        assert (batch["tokens"][b, n:] == (V - 1 if end else 0)).all()
        assert (batch["log_prob"][b, n + (expected is None) :] == 0).all()
        if expected is None and end:
            assert batch["log_prob"][b, n] < 0, "the end of a document is part of a text"
    assert ended > 3
    for part in (seeds[:1], seeds[2:9]):
        given = {name: value[part] for name, value in cond.items()}
        again = decode.generate(model, part, given, max_new_tokens=200, stop=stop)
        assert Text(tokenizer).preview(again) == [shown[b] for b in part.tolist()]
    draft = gpt(length=300)
    options = {"max_new_tokens": 60, "top_k": 1, "stop": Text(tokenizer).stop({"stop": [shown[0][:1], "ba"]})}
    one, other = (
        decode.generate(model, seeds[:4], None, **options),
        speculative(model, seeds[:4], None, draft=draft, **options),
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_a_stop_string_that_is_one_token_counts_in_the_likelihood_and_documents_end_too(capsys):
    """As an id that ends a sample does; what is shown while it is written is the text in the end."""
    model, tokenizer = gpt(length=300), Letters(end=True)
    kind, ended = Text(tokenizer), set()
    for seed in range(12):
        request = {"stop": "c"}
        cond, stop = kind.condition(request, 1), kind.stop(request)
        free = decode.generate(model, torch.tensor([seed]), {"tokens": cond["tokens"]}, max_new_tokens=60)["tokens"][
            0
        ].tolist()
        with kind.watch(request) as on_step:
            batch = decode.generate(model, torch.tensor([seed]), cond, on_step, max_new_tokens=60, stop=stop)
        n = next((i for i, token in enumerate(free) if token in (2, V - 1)), 60)
        assert batch["length"].item() == n and capsys.readouterr().out == kind.preview(batch)[0] + "\n"
        assert kind.preview(batch) == [tokenizer.decode(free[:n])]
        assert n == 60 or (batch["log_prob"][0, n] < 0) == (free[n] == 2)
        ended.add(free[n] if n < 60 else None)
    assert {2, V - 1} <= ended


def test_wrong_stop_strings():
    kind = Text(KINDS["char"])
    assert kind.stop({}) is None and kind.stop({"stop": ["a", "b"]}).strings == ["a", "b"]
    for given, said in (
        ([], "must be a string or a list"),
        ("", "an empty string"),
        ([None], "must be"),
        ("ab+", "'+'"),
        (True, "must be"),
    ):
        with pytest.raises(UserError, match=said.replace("+", r"\+")):
            kind.stop({"stop": given})
