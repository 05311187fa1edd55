"""Models of masked tokens from a new user's chair: a text trains, its gaps are filled, and wrong commands say what to do."""

import json
import math

import pytest

from genai.cli import compose_config, prepare_sampling

DEBUG = ["debug=true", "logger=none", "model.net.transformer.width=16", "data.shape=[16]", "data.tokenizer=char"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and a BERT and a masked diffusion trained on it in this process."""
    from genai.train.run import run

    root = tmp_path_factory.mktemp("masked")
    (root / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 100)
    data = ["data=text_file", f"data.path={root / 'book.txt'}", f"data.cache={root / 'cache'}"]
    for model in ("bert", "mdlm"):
        run(compose_config("train", [f"model={model}", *data, *DEBUG, f"run_dir={root / model}"]))
    return root


def sample(*given):
    from genai.sampling import run

    return run(compose_config("sample", list(given), prepare_sampling))


def evaluate(*given):
    from genai.evaluation.run import run

    return run(compose_config("evaluate", list(given)))


@pytest.mark.parametrize(("model", "sampler"), [("bert", "fill"), ("mdlm", "fill"), ("mdlm", "ancestral")])
def test_gaps_are_filled_and_the_text_is_shown(folder, tmp_path, capsys, model, sampler):
    prompt = "prompt=it [MASK]as th[MASK]"
    out = sample(f"ckpt={folder / model}", f"sampler={sampler}", prompt, "n=2", f"out={tmp_path / 'out'}")
    found = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for one in found:
        assert one["prompt"] == "\nit [MASK]as th[MASK]"
        assert len(one["text"]) == len("it was the") and one["text"][:3] == "it " and one["text"][4:9] == "as th"
        assert [x < 0 for x in one["log_probs"]] == [i in (3, 9) for i in range(10)]
    assert f"--- seed 0\n{found[0]['text']}\n" in (out / "samples.txt").read_text()
    assert found[0]["text"] in capsys.readouterr().out


def test_masked_scores_have_cards_with_the_baseline(folder):
    facts = evaluate(f"ckpt={folder / 'bert'}", "split=val")
    assert "nats_per_token" not in facts and facts["masked_share"] == 0.15 and facts["pseudo_perplexity"] > 1
    cards = {card["metric"]: card for card in facts["cards"]}
    assert {*cards} == {"masked_nats", "masked_accuracy", "pseudo_perplexity"}
    assert {*cards["masked_nats"]["baselines"]} == {"counts given 3 tokens on each side"}
    assert cards["masked_nats"]["baselines"]["counts given 3 tokens on each side"] < 0.5
    assert cards["masked_accuracy"]["better"] == "higher"
    nats, pseudo = cards["masked_nats"], cards["pseudo_perplexity"]
    for key in ("value", "low", "high"):
        assert pseudo[key] == pytest.approx(math.exp(nats[key]), rel=1e-4)
    for name, value in pseudo["baselines"].items():
        assert value == pytest.approx(math.exp(nats["baselines"][name]), rel=1e-4)


def test_the_bound_is_on_the_scale_of_other_texts_likelihoods(folder):
    facts = evaluate(f"ckpt={folder / 'mdlm'}", "split=val")
    assert facts["bound"] == "upper bound" and facts["masked_nats"] > 0
    cards = {card["metric"]: card for card in facts["cards"]}
    assert {"nats_per_token", "bits_per_character", "masked_nats", "masked_accuracy", "pseudo_perplexity"} == {*cards}
    protocol = cards["nats_per_token"]["protocol"]
    assert "interpolated 5-gram" in cards["nats_per_token"]["baselines"]
    assert protocol["levels"] == len(set("It was the best of times, it was the worst of times.\n")), "no special ids"
    assert protocol["context"] == 16 and "masked_share" not in protocol


def test_a_bert_of_whole_words_trains(folder, tmp_path):
    from genai.train.run import run

    data = ["data=text_file", f"data.path={folder / 'book.txt'}", f"data.cache={folder / 'cache'}"]
    run(compose_config("train", ["model=bert", "model.whole_words=true", *data, *DEBUG, f"run_dir={tmp_path / 'run'}"]))
    assert "masked_nats" in evaluate(f"ckpt={tmp_path / 'run'}", "split=val")


def test_a_bert_learns_labels_and_is_scored_next_to_counts(folder, tmp_path, capsys):
    """Fine-tuning takes all weights but those of the head, and a prompt is answered by its label."""
    from genai.train.run import run

    for name, words in (("war", "sword shield"), ("peace", "bread wine")):
        text = " ".join(f"{word} {i % 7}" for i in range(400) for word in words.split())
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    width = "model.net.transformer.width=16"
    data = ["data=text_file", f"data.path={folder / 'book.txt'}", f"data.cache={folder / 'cache'}", "data.shape=[32]"]
    given = ["debug=true", "logger=none", width]
    run(compose_config("train", ["model=bert", *data, *given, f"run_dir={tmp_path / 'bert'}"]))
    labelled = ["data=passages", f"data.path={tmp_path / 'texts'}", "data.longest=24"]
    tuned = [f"init_from={tmp_path / 'bert'}", "init_strict=false", f"run_dir={tmp_path / 'run'}", "max_steps=150"]
    more = ["logger=none", width, "callbacks.evaluate.every_steps=75", "callbacks.samples.n=2"]
    run(compose_config("train", ["model=bert_classifier", *labelled, *tuned, *more]))
    assert "but for 1 of" in (printed := capsys.readouterr().out) and "net.head" in printed
    facts = evaluate(f"ckpt={tmp_path / 'run'}", "metrics=[exact_match,nats_per_token]")
    cards = {card["metric"]: card for card in facts["cards"]}
    assert {*cards["exact_match"]["baselines"]} >= {"most frequent label", "naive Bayes of 5-grams"}
    assert cards["exact_match"]["value"] > cards["exact_match"]["baselines"]["most frequent label"]
    out = sample(f"ckpt={tmp_path / 'run'}", "n=2", "prompt=['sword 3 shield','bread 1']", f"out={tmp_path / 'out'}")
    assert (out / "samples.txt").read_text() == "sword 3 shield -> war\nbread 1 -> peace\n"


TRAIN = {
    "data=digits": "this has no data.specials: choose a text with data=",
    "data.specials=false": "model.specials=true",
    "data.specials=1": "data.specials=1 must be true or false",
    "model.share=0": "model.share=0 must be a number greater than 0 and at most 1",
    "model.random=2": "model.random=2 must be a number at least 0 and at most 1",
    "model.random=0.6 model.kept=0.6": "make their sum at most 1",
    "model.net.transformer.attention.causal=true": "a TwoSidedShift sees the token after each",
    "model.net.transformer.attention.causal=true model.net.transformer.shift=null": (
        "reads both sides: set model.net.transformer.attention.causal=false"
    ),
    "model.whole_words=1": "model.whole_words=1 must be true or false",
    "data.words=true": "model.whole_words=false must be what data.words is, true",
    "data.words=false model.whole_words=true": "model.whole_words=true must be what data.words is, false",
    "model=gpt data.words=true": "data.words=true is for a model that hides whole words, such as model=bert, and not for a GPT",
    "model=bert_classifier": "this has no data.source_specials: choose texts with labels with data=",
    "model=bert_classifier data=topics data.source_specials=false": (
        "model.source_specials=true must be what data.source_specials is, false"
    ),
    "model=bert_classifier data=topics data.shape=[3]": "data.shape=[3], but this data has [2]",
    "model=bert_classifier data=topics data.n=1": "data.n=1 must be",
    "model=bert_classifier data=reverse": "this has no data.source_specials: choose texts with labels with data=",
    "model=bert data=topics": "this has no data.specials: choose a text with data=",
    "sampler=generate": "the sampler generate is for an Autoregressive, and this model is a BERT",
    "model=gpt sampler=fill": "the sampler fill is for a MaskedModel, and this model is a GPT",
}
SAMPLE = {
    "prompt=zzz[MASK]": "the character 'z' (U+007A) is not among",
    "prompt=['it[MASK]',was]": "prompt= has [MASK] in some prompts and not in others",
    "prompt=it_was_the_best_of_times": "is not among",
    "prompt=it was the best of ti": "must fit into the 16 tokens that this model reads at once: shorten them",
    "max_new_tokens=17": "must fit into the 16 tokens that this model reads at once: shorten them",
    "steps=0": "sampler.steps=0 must be",
    "temperature=-1": "sampler.temperature=-1 must be",
    "top_k=3": "top_k",
    "label=3": "label=3 was given, but this model is unconditional",
}


def refusal(call, folder, monkeypatch):
    from genai.core.errors import UserError

    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as refused:
        call()
    assert sorted(folder.rglob("*")) == before and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("argument", TRAIN)
def test_wrong_training_commands(folder, monkeypatch, argument):
    from genai.train.run import run

    text = ["data=text_file", "data.path=book.txt", f"data.cache={folder / 'cache'}", *DEBUG[2:]]
    given = ["model=bert", *text, *DEBUG[:2]]
    keys = [word.split("=")[0] for word in argument.split()]
    given = [
        word for word in given if word.split("=")[0] not in keys and not ("model=gpt" in argument and "width" in word)
    ]
    if "data" in keys:
        given = [*([] if "model" in keys else ["model=bert"]), *DEBUG[:2]]
    said = refusal(lambda: run(compose_config("train", [*given, *argument.split()])), folder, monkeypatch)
    assert TRAIN[argument] in said


@pytest.mark.parametrize("argument", SAMPLE)
def test_wrong_sampling_commands(folder, monkeypatch, argument):
    assert SAMPLE[argument] in refusal(lambda: sample("ckpt=bert", "n=2", argument), folder, monkeypatch)


def test_likelihoods_of_a_bert_are_refused(folder, monkeypatch):
    said = refusal(lambda: evaluate("ckpt=bert", "split=val", "metrics=[nats_per_token]"), folder, monkeypatch)
    assert (
        "nats_per_token is not available for this model; it can have masked_nats, masked_accuracy, pseudo_perplexity"
        in said
    )
