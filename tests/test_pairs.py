"""Pairs of texts from a new user's chair: a file trains, is asked and measured, and wrong commands say what to do."""

import json

import pytest

from genai.cli import compose_config, prepare_evaluation, prepare_sampling
from genai.data.pair_tasks import words_of
from tests.test_melodies import refusal

DEBUG = ["debug=true", "logger=none", "model.net.encoder.width=16", "data.batch_size=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of pairs, and a run trained on one of them in this process."""
    from genai.train.run import run

    root = tmp_path_factory.mktemp("pairs")
    pairs = [(str(i), words_of(i)) for i in range(60)]
    (root / "pairs.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in [*pairs, ("61", "")]))
    (root / "tabs.tsv").write_text("1\tone\n2 two\n")
    (root / "empty.tsv").write_text("1\t\n\ttwo\n")
    (root / "two.tsv").write_text("1\tone\n2\ttwo\n")
    (root / "latin.tsv").write_bytes("caf\xe9\tcoffee\n".encode("latin-1"))
    (root / "wrong.jsonl").write_text('{"source": "1", "target": "one"}\n{"source": "2", "target": 2}\n')
    (root / "broken.jsonl").write_text('{"source": "1", "target": "one"\n')
    (root / "sources.txt").write_text("1\n2\n3\n")
    (root / "targets.txt").write_text("one\ntwo\n")
    data = [
        "model=seq2seq",
        "data=pairs",
        f"data.path={root / 'pairs.tsv'}",
        "data.tokenizer=char",
        "data.target_tokenizer=word",
    ]
    run(compose_config("train", [*data, *DEBUG, f"run_dir={root / 'run'}"]))
    return root


def test_a_file_of_pairs_trains_is_asked_and_measured(folder, tmp_path, capsys):
    from genai.evaluation.run import run as evaluate
    from genai.sampling import run as sample

    given = [f"ckpt={folder / 'run'}", "n=3", "prompt=[7,42]", f"out={tmp_path / 'out'}"]
    out = sample(compose_config("sample", given, prepare_sampling))
    assert {path.name for path in out.iterdir()} == {"samples.txt", "samples.jsonl"}
    lines = [line.split(" -> ") for line in (out / "samples.txt").read_text().splitlines()]
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [source for source, _ in lines] == ["7", "42", "7"] == [row["prompt"] for row in rows]
    assert [target for _, target in lines] == [row["text"] for row in rows] and lines[0] == lines[2]
    assert "7 -> " in capsys.readouterr().out
    out = sample(compose_config("sample", [f"ckpt={folder / 'run'}", "n=2", "sampler=generate"], prepare_sampling))
    sources = [line.split(" -> ")[0] for line in (out / "samples.txt").read_text().splitlines()]
    assert all(source.isdigit() for source in sources) and sources[0] != sources[1], "examples of the validation split"
    metrics = "metrics=[nats_per_token,exact_match,token_error_rate]"
    facts = evaluate(compose_config("evaluate", [f"ckpt={folder / 'run'}", metrics]))
    cards = {card["metric"]: card for card in facts["cards"]}
    assert facts["nats_per_token"] > 0 and facts["given"] == ["source"] and facts["n"] == 3
    assert {*cards["nats_per_token"]["baselines"]} == {"interpolated 5-gram"}
    assert {*cards["exact_match"]["baselines"]} == {"target of the nearest source by 4-grams"}
    assert 0 <= cards["exact_match"]["value"] <= 1 and cards["token_error_rate"]["value"] >= 0
    assert cards["token_error_rate"]["protocol"]["n"] == 3 and cards["token_error_rate"]["sampler"]["beams"] == 4
    for argument, sampler in (("beams=1", {"beams": 1}), ("sampler=generate", {"temperature": 1.0})):
        given = [f"ckpt={folder / 'run'}", "metrics=[exact_match]", argument]
        (card,) = evaluate(compose_config("evaluate", given, prepare_evaluation))["cards"]
        assert sampler.items() <= card["sampler"].items()


TRAIN = {
    "data.path=nowhere.tsv": "data.path='nowhere.tsv' cannot be read (No such file or directory): name a file of pairs",
    "data.path=tabs.tsv": "data.path='tabs.tsv', line 2, has 0 tabs: a line is a source, a tab and a target",
    "data.path=empty.tsv": "data.path='empty.tsv' has no pairs with both a source and a target: name another file",
    "data.path=two.tsv": "there are 2 different sources, too few to set some aside for validation and test: add some",
    "data.path=latin.tsv": "data.path='latin.tsv' is not UTF-8",
    "data.path=wrong.jsonl": "data.path='wrong.jsonl', line 2, is not JSON with source and target (source and target must be",
    "data.path=broken.jsonl": "data.path='broken.jsonl', line 1, is not JSON with source and target",
    "data.path=sources.txt data.target_path=targets.txt": "sources.txt has 3 lines and targets.txt 2: line k of",
    "data.target_path=nowhere": "data.target_path='nowhere' cannot be read",
    "data.tokenizer=letters": "data.tokenizer=letters must be one of byte, char, word, bpe",
    "data.target_tokenizer=letters": "data.target_tokenizer=letters must be one of byte, char, word, bpe, null",
    "data.target_vocab_size=300": "data.target_vocab_size=300 is for bpe, and this tokenizer is word: leave it out",
    "data.longest=0": "data.longest=0 must be a whole number of tokens, at least 1",
    "data.longest=1": "the test split has no pairs of at most 1 tokens a side: give more pairs, or a larger data.longest",
    "data.val=0": "data.val=0 must be",
    "data.source_levels=7": "data.source_levels=7, but this data has 11: correct it or set it to null",
    "data.shape=[7]": "data.shape=[7], but this data has [3]: correct data.shape or set it to null",
    "model.net.shared=true": "model.net.shared=true needs one vocabulary and one width, but sources have 11 ids and targets",
    "model.label_smoothing=2": "model.label_smoothing=2 must be a number at least 0 and at most 1",
    "model.net.encoder.attention.causal=true": "a TwoSidedShift sees the token after each",
    "model.net.encoder.attention.causal=true model.net.encoder.shift=null": "the encoder of a Seq2Seq must have attention.causal="
    "false and no cross",
    "sampler.beams=0": "sampler.beams=0 must be a whole number of texts, at least 1",
    "data=names": "data.path='data/names.txt'",
    "data=digits": "a Seq2Seq takes pairs of texts, but this data has",
    "data=numbers data.digits=2 data.n=500": "data.n=500 is more than the 100 numbers of data.digits=2: give fewer",
    "data=reverse data.letters=2 data.n=400": "data.n=400 is more than half of the strings of data.letters=2: give fewer",
    "data=numbers data.to=roman": "data.to=roman must be one of words, digits",
}
SAMPLE = {
    "prompt=seven": "the character 's' (U+0073) is not among the 10 that this tokenizer learned",
    "stop=one": "the sampler beam has no stop; it has beams, length_penalty, max_new_tokens",
    "prompt=[]": "prompt=[] must be a value or a list that is not empty",
    "negative_prompt=7": "negative_prompt='7' was given, but this model takes no prompt",
    "label=7": "label=7 was given, but this model is unconditional",
    "beams=0": "beams=0 must be",
    "length_penalty=11": "length_penalty=11 must be",
    "sampler=speculative": "speculative is for a Rewindable, and this model is a Seq2Seq: choose another with sampler=",
}
EVALUATE = {
    "beams=2": "sampler= and its arguments need a metric of samples or answers: name one in metrics=, or leave them out",
    "beams=0 metrics=[exact_match]": "sampler.beams=0 must be a whole number of texts, at least 1",
    "beam=2 metrics=[exact_match]": "there is no key beam",
    "sampler.beam=2 metrics=[exact_match]": "the sampler beam has no beam; it has beams, length_penalty, max_new_tokens",
    "sampler=speculative metrics=[bleu]": "speculative is for a Rewindable, and this model is a Seq2Seq",
    "metrics=[frechet]": "frechet is not available for this model; it can have nats_per_token, bits_per_character, exact_match",
    "metrics=[exact_match] n=4": "n=4 is more than the 3 items of split=test: give at most those",
}
BASELINES = {
    "data=toy2d baseline=nearest_source": "baseline=nearest_source needs data of tokens, and this data is vector",
    "data=python_docs baseline=nearest_source": "baseline=nearest_source needs data with sources (data.source_levels)",
}


@pytest.mark.parametrize("argument", TRAIN)
def test_wrong_training_commands(folder, monkeypatch, argument):
    given = [
        "model=seq2seq",
        "data=pairs",
        "data.path=pairs.tsv",
        "data.tokenizer=char",
        "data.target_tokenizer=word",
        *DEBUG,
    ]
    keys = {word.split("=")[0] for word in argument.split()}
    if argument.startswith("data="):
        given = [word for word in given if not word.startswith("data")]
    given = [word for word in given if word.split("=")[0] not in keys]
    assert TRAIN[argument] in refusal("train", [*given, *argument.split()], folder, monkeypatch)


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(folder, monkeypatch, argument):
    assert SAMPLE[argument] in refusal("sample", ["ckpt=run", "n=2", argument], folder, monkeypatch)


@pytest.mark.parametrize("argument", EVALUATE)
def test_wrong_evaluation_commands(folder, monkeypatch, argument):
    assert EVALUATE[argument] in refusal("evaluate", ["ckpt=run", *argument.split()], folder, monkeypatch)


@pytest.mark.parametrize("argument", BASELINES)
def test_wrong_baselines(folder, monkeypatch, argument):
    assert BASELINES[argument] in refusal("baselines", argument.split(), folder, monkeypatch)
