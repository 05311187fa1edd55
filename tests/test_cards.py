"""Cards of samples: what is measured, by which protocol, beside which floor; copies are found; cards meet in a comparison."""

import json

import pytest
import torch

import genai
from genai import cards, checkpoint, judge
from genai.cli import composed, resumed
from genai.compare.runs import check_protocols, read
from genai.core.errors import UserError
from genai.evaluation import run as evaluate
from genai.train.run import run as train

SMALL = [
    "data=digits",
    "logger=none",
    "max_steps=3",
    "data.batch_size=8",
    "callbacks.evaluate.n=16",
    "callbacks.samples.n=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A GAN and a flow of digits, and a judge that has hardly learned."""
    root, patch = tmp_path_factory.mktemp("cards"), pytest.MonkeyPatch()
    patch.setattr(judge, "STEPS", 60)
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    gan = train(composed("train", ["model=gan", f"run_dir={root / 'gan'}", *SMALL], resumed))
    flow = ["model=flow", "model.net.channels=8", "sampler.steps=2", f"run_dir={root / 'flow'}"]
    flow = train(composed("train", [*flow, *SMALL], resumed))
    yield gan, flow
    patch.undo()


def test_a_card_says_what_decides_it_and_two_are_compared(runs):
    given = ["metrics=[frechet,kid,inception_score,precision,recall,density,coverage,accuracy]", "n=60", "repeats=2"]
    for folder in runs:
        result = evaluate(composed("evaluate", [f"ckpt={folder}", *given]))["cards"]
        stored = json.loads((folder / "cards" / "frechet.json").read_text())
        assert stored == result[0] and len(result) == 8
        assert stored["low"] <= stored["value"] <= stored["high"] and 0 <= stored["floor"] < stored["value"]
        assert (
            stored["protocol"]["n"] == 60
            and stored["protocol"]["split"] == "test"
            and stored["protocol"]["levels"] == 17
        )
        assert not stored["memorised"] and stored["copies"] == 0 and (folder / "cards" / "nearest.png").exists()
        again = evaluate(composed("evaluate", [f"ckpt={folder}", *given]))["cards"]
        assert again == result
    check_protocols([read(folder) for folder in runs])
    evaluate(composed("evaluate", [f"ckpt={runs[1]}", "metrics=[recall]", "n=50", "repeats=2"]))
    with pytest.raises(UserError, match=r"the cards of recall cannot be ranked: protocol.n is 60 in .* and 50 in"):
        check_protocols([read(folder) for folder in runs])


def test_a_judge_is_trained_once_and_the_same_way(runs, monkeypatch, capsys, tmp_path):
    loaded = genai.load(runs[0])
    data = checkpoint.build(loaded.config["data"])
    first = judge.trained(data, loaded.config["data"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = judge.trained(data, loaded.config["data"])
    assert "training a judge" in capsys.readouterr().out
    third = judge.trained(data, loaded.config["data"])
    assert capsys.readouterr().out == "" and first.sha256() == second.sha256() == third.sha256()
    assert first.accuracy(data, "test") > 0.5


def test_a_memoriser_is_flagged(runs, monkeypatch):
    """A sampler that gives training images back."""
    loaded = genai.load(runs[0])
    data = checkpoint.build(loaded.config["data"])
    items = data.splits["train"].batch(torch.arange(60), None)

    def copies(loaded, n, seed, batch_size):
        return {"image": items["image"][:n], "label": items["label"][:n]}

    monkeypatch.setattr(cards.sampling, "sample", copies)
    (card,) = cards.run(loaded, data, ["recall"], "test", 60, 1, 0, 64)
    assert card["memorised"] and card["copies"] == 60 and card["distance_ratio"] == 0


def test_samples_lie_on_the_levels_of_the_data():
    x = cards.rounded(torch.tensor([-1.3, -0.99, 0.06, 0.07, 1.0]), 17)
    assert x.tolist() == [-1, -1, 0, 0.125, 1]


def test_what_cannot_be_measured_is_refused(runs, refused, tmp_path):
    gan, _ = runs
    text = train(composed("train", ["model=gpt", f"run_dir={tmp_path / 'gpt'}", *SMALL[1:]], resumed))
    cases = {
        (f"ckpt={gan}", "metrics=[fid]"): "fid is none of frechet, kid, inception_score",
        (f"ckpt={gan}", "metrics=[recall]", "n=1000"): "n=1000 is more than the 360 images of split=test",
        (f"ckpt={gan}", "metrics=[recall]", "repeats=0"): "repeats=0 must be a whole number",
        (f"ckpt={gan}", "metrics=[recall]", "likelihood=probability_flow"): "give one of them at a time",
        (f"ckpt={text}", "metrics=[recall]"): "are of images, and this model makes tokens",
        (f"ckpt={text}", "metrics=[accuracy]"): "accuracy needs a model that is asked for a class",
    }
    for given, message in cases.items():
        assert message in refused("evaluate.py", *given)
