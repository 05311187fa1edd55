"""Tokenizers that others published: each form of file gives the ids of the program that reads it elsewhere."""

import base64
import itertools
import json
import random

import pytest

from genai.core.errors import UserError
from genai.modalities import published, tokenizers
from genai.modalities.tokenizers import Published

LIBRARY = pytest.importorskip("tokenizers")
TEXT = (
    "The meaning of life isn't 42'S, it's 123456!\n\n  Zoë  wrote:\t\"東京 🙂\" ...\r\n   x = y_1 + DonDON; <|endoftext|> "
    "the end of \n "
)
END = "<|endoftext|>"


def words(size=320):
    """A byte-level BPE of this text, with an end token as its last id."""
    bpe = LIBRARY.Tokenizer(LIBRARY.models.BPE())
    bpe.pre_tokenizer = LIBRARY.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = LIBRARY.decoders.ByteLevel()
    alphabet = sorted(LIBRARY.pre_tokenizers.ByteLevel.alphabet())
    trainer = LIBRARY.trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([TEXT.replace(END, "")] * 3, trainer)
    bpe.add_special_tokens([END])
    return bpe


def texts(n=60):
    draw, parts = random.Random(0), TEXT.split(" ")
    yield TEXT
    for _ in range(n):
        yield "".join(
            draw.choice([*parts, *TEXT, " ", "\n", " \n", "'ll", "ſ", "İ", "ǅ", "9", "\u0301"]) for _ in range(30)
        )


def test_a_tokenizer_json_gives_its_own_ids(tmp_path):
    """Whatever of the text its specials spell, truncation and what a model's inputs are framed by are left out."""
    bpe = words()
    bpe.enable_truncation(5)
    bpe.enable_padding(length=300)
    bpe.post_processor = LIBRARY.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 319)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        for end in (False, True):
            ours = published.read(str(path), end)
            assert ours.vocab_size == 320 and ours.end == (319 if end else None)
            again = tokenizers.from_state(json.loads(json.dumps(ours.state())))
            for text in texts(10):
                ids = again.encode(text).tolist()
                assert 319 not in ids and again.decode(ids) == text
                plain = text.replace(END, "")
                assert ours.encode(plain).tolist() == words().encode(plain).ids
            assert ours.decode([*ids, 319]) == text + ("" if end else END)


def test_vocabulary_and_merges_are_those_of_gpt2(tmp_path):
    """As `transformers` reads the two files."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), eos_token=END)
    words().model.save(str(tmp_path))
    ids = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**ids, END: 319}))
    for end in (False, True):
        ours = published.read(str(tmp_path), end)
        assert ours.vocab_size == 320 and ours.end == (319 if end else None)
        for text in texts():
            text = text.replace(END, "")
            assert (
                ours.encode(text).tolist() == theirs(text)["input_ids"]
                and ours.decode(ours.encode(text).tolist()) == text
            )
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    assert published.read(str(tmp_path), True).state() == ours.state()


def ranks_of(n=600):
    """Ranks as they are learned, of parts of words, many of which have several splits."""
    draw, parts = random.Random(1), [*TEXT.encode().split(b" "), b" isn't", b"aaaaaaa", " 東京".encode(), b" \n  "]
    found = {bytes([i]): i for i in range(256)}
    for _ in range(20 * n):
        part = draw.choice(parts)
        at = draw.randrange(len(part) + 1)
        token = part[at : at + draw.randint(2, 6)]
        if any(token[:i] in found and token[i:] in found for i in range(1, len(token))):
            found.setdefault(token, len(found))
    return found


def save_ranks(path, ranks):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


@pytest.mark.parametrize("name", published.RANKS)
def test_ranks_merge_the_lowest_first(name, tmp_path):
    """The definition, word by word; `tiktoken` itself where it is installed."""
    regex = pytest.importorskip("regex")
    ranks, (pattern, special) = ranks_of(), published.RANKS[name]
    save_ranks(tmp_path / f"{name}.tiktoken", ranks)
    ours = published.read(str(tmp_path), True)
    assert ours.end == special[END] and ours.vocab_size == max(special.values()) + 1

    def merged(word):
        parts = [word[i : i + 1] for i in range(len(word))]
        while word not in ranks and len(parts) > 1:
            pairs = [ranks.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
            if min(pairs) == 10**9:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [ranks[word]] if word in ranks else [ranks[part] for part in parts]

    for text in texts():
        cut = regex.findall(pattern.replace(r"\z", r"\Z"), text)
        assert "".join(cut) == text
        assert ours.encode(text).tolist() == [id for word in cut for id in merged(word.encode())]
        assert ours.decode(ours.encode(text).tolist()) == text


@pytest.mark.parametrize("name", published.RANKS)
def test_ranks_are_read_as_tiktoken_reads_them(name, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    ranks = ranks_of()
    save_ranks(tmp_path / f"{name}.tiktoken", ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        patch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: ranks)
        facts = {**getattr(public, name)(), "explicit_n_vocab": None}
    theirs, ours = tiktoken.Encoding(**facts), published.read(str(tmp_path), True)
    assert ours.end == theirs.eot_token and ours.vocab_size == theirs.n_vocab
    for text in texts(400):
        assert ours.encode(text).tolist() == theirs.encode(text, disallowed_special=()), text


def test_what_ends_documents_is_said_by_the_files_or_added(tmp_path):
    bpe = words()
    bpe.add_special_tokens(["<pad>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert published.read(str(tmp_path), True).end == published.read(str(tmp_path), True).vocab_size - 1 == 321
    assert published.read(str(tmp_path), False).vocab_size == 321
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    assert published.read(str(tmp_path), True).end == 320
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    assert published.read(str(tmp_path), True).end == 319 and published.read(str(tmp_path), True).vocab_size == 321


def test_damaged_specs_are_refused(tmp_path):
    spec, draw = words().to_str(), random.Random(0)
    for _ in range(60):
        at = draw.randrange(len(spec) - 40)
        cut = draw.choice(
            [spec[:at], spec[:at] + spec[at + 40 :], spec[:at] + draw.choice('{}[]",0a') + spec[at + 1 :]]
        )
        try:
            Published(cut, END, True).encode(TEXT)
        except UserError as error:
            assert "\n" not in str(error)
    for state in ({"spec": spec}, {"spec": spec, "token": 1, "end": True}, {"spec": "{}", "token": "", "end": True}):
        with pytest.raises(UserError):
            tokenizers.from_state({"_target_": "genai.modalities.tokenizers.Published", **state})
    with pytest.raises(UserError, match="the token '<no>', which ends documents, is not in the vocabulary"):
        Published(spec, "<no>", True)


WRONG = {
    "nowhere": "data.tokenizer='nowhere' must be byte, char, bpe, or a file or folder that exists: a tokenizer.json",
    "empty": "data.tokenizer='empty' is a folder with no tokenizer: name a tokenizer.json",
    "two": "data.tokenizer='two' is a folder with 2 files of ranks",
    "binary.json": "binary.json cannot be read",
    "torn.json": "torn.json is not JSON",
    "list.json": "list.json is JSON, but not of a tokenizer",
    "other.json": "other.json: the spec of a tokenizer cannot be read",
    "clip": "are not the byte-level vocabulary and merges of GPT-2's release",
    "unfit": "and its merges do not fit together",
    "llama3.tiktoken": "holds ranks, but not how a text is cut into words, which goes by its name: it must be one of gpt2",
    "ranks/gpt2.tiktoken": "gpt2.tiktoken is not a file of ranks, lines of base64 and a number",
    "short/r50k_base.tiktoken": "r50k_base.tiktoken is not all of the file of ranks r50k_base: fetch it again",
}


@pytest.mark.parametrize("named", WRONG)
def test_wrong_files(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "two", "clip", "unfit", "ranks", "short"):
        (tmp_path / folder).mkdir()
    letters = {letter: i for i, letter in enumerate(published._letters().values())}
    contents = {
        "two/gpt2.tiktoken": "",
        "two/r50k_base.tiktoken": "",
        "torn.json": '{"model": {',
        "list.json": "[1]",
        "other.json": '{"model": {"type": "Nothing"}}',
        "clip/vocab.json": '{"a</w>": 0}',
        "clip/merges.txt": "a </w>",
        "unfit/vocab.json": json.dumps(letters),
        "unfit/merges.txt": "#version: 0.2\na b\n",
        "llama3.tiktoken": "IQ== 0\n",
        "ranks/gpt2.tiktoken": "I? 0\n",
        "short/r50k_base.tiktoken": "IQ== 0\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as refused:
        published.read(named, False)
    assert WRONG[named] in str(refused.value) and "\n" not in str(refused.value)
