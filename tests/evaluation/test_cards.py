"""Cards: figures with their protocol, floor and baselines; copies are found; cards meet in a
comparison."""

import json
import re
import sys

import pytest
import torch
from torch import nn

import genai
from genai.checkpoint.build import build_typed
from genai.cli import compose_config, prepare_evaluation, prepare_training
from genai.compare.runs import check_protocols, read
from genai.core.errors import UserError
from genai.data.base import first_items
from genai.data.stream import batches
from genai.evaluation import cards, classifier, samples
from genai.evaluation import features as extractors
from genai.evaluation.baselines.base import training_data
from genai.evaluation.baselines.pixels import Uniform
from genai.evaluation.baselines.reference import cache_key, reference_scores, score_baseline
from genai.evaluation.baselines.vectors import TrainingCopy
from genai.evaluation.metrics import Metric, compute, standard_metrics
from genai.evaluation.run import resolve, run
from genai.metrics.frechet import Moments, frechet
from genai.modalities.base import to_pil
from genai.modalities.image import quantize
from genai.progress import Task
from genai.train.run import run as train
from tests.pages import DOCS, blocks
from tests.train.test_tracking import offline_runs

SMALL = ["max_steps=3", "data.batch_size=8", "callbacks.evaluate.n=16", "callbacks.samples.n=2"]
DIGITS = ["data=digits", "logger=none", *SMALL]
ALL = "metrics=[frechet,kid,inception_score,precision,recall,density,coverage,accuracy]"


def evaluate(*given):
    return run(compose_config("evaluate", list(given), prepare_evaluation))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A GAN and a flow of digits, and a classifier that has hardly learned."""
    root, patch = tmp_path_factory.mktemp("cards"), pytest.MonkeyPatch()
    patch.setattr(classifier.Classifier, "steps", 60)
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    gan = train(compose_config("train", ["model=gan", f"run_dir={root / 'gan'}", *DIGITS], prepare_training))
    flow = ["model=flow", "model.net.channels=8", "sampler.steps=2", f"run_dir={root / 'flow'}"]
    flow = train(compose_config("train", [*flow, *DIGITS], prepare_training))
    yield gan, flow
    patch.undo()


def test_a_card_says_what_decides_it_and_two_are_compared(runs):
    for folder in runs:
        result = evaluate(f"ckpt={folder}", ALL, "n=60", "repeats=2")["cards"]
        stored = json.loads((folder / "cards" / "frechet.json").read_text())
        assert stored == result[0] and len(result) == 8
        assert stored["low"] <= stored["value"] <= stored["high"] and 0 <= stored["floor"] < stored["value"]
        protocol = stored["protocol"]
        assert (protocol["n"], protocol["real"], protocol["split"], protocol["levels"]) == (60, 360, "test", 17)
        assert not stored["memorised"] and stored["copies"] == 0 and (folder / "cards" / "nearest.png").exists()
        assert len(stored["baselines"]) == 3 and stored["beats_baseline"] is False  # it has hardly learned
        again = evaluate(f"ckpt={folder}", ALL, "n=60", "repeats=2", "batch_size=7")["cards"]
        assert [card["value"] for card in again] == pytest.approx([card["value"] for card in result], rel=1e-4)
    check_protocols([read(folder) for folder in runs])
    evaluate(f"ckpt={runs[1]}", "metrics=[recall]", "n=50", "repeats=2")
    with pytest.raises(UserError, match=r"the cards of recall cannot be ranked: protocol.n is 60 in .* and 50 in"):
        check_protocols([read(folder) for folder in runs])


def test_samples_are_those_of_one_call_whatever_the_batches(runs):
    loaded = genai.load(runs[0])
    clock = Task("evaluating", 40, "samples")
    drawn = list(samples.sample_batches(loaded, 40, 5, 9, clock))
    whole = genai.sample(loaded, n=40, seed=5)
    assert [len(batch["image"]) for batch in drawn] == [16, 9, 9, 6] and clock.done == 40
    for name in ("image", "label", "seeds"):
        assert torch.allclose(torch.cat([batch[name] for batch in drawn]).float(), whole[name].float(), atol=1e-6)


def test_a_card_is_measured_as_its_parts_are(runs):
    """Fréchet distance and accuracy by hand, from the samples, the classifier and the split."""
    loaded = genai.load(runs[0])
    data = build_typed(loaded.config["data"])
    extractor = extractors.classifier(data, loaded.config["data"], "cpu")
    batch, real = genai.sample(loaded, n=60), data.splits["test"].batch(torch.arange(360), None)["image"]
    fake, logits = extractor(quantize(batch["image"], 17))
    expected = frechet(Moments().add(fake), Moments().add(extractor(real)[0]))
    accuracy = (logits.argmax(1) == batch["label"]).double().mean().item()
    found = evaluate(f"ckpt={runs[0]}", "metrics=[frechet,accuracy]", "n=60", "repeats=1", "baselines=false")["cards"]
    assert [card["value"] for card in found] == pytest.approx([expected, accuracy], abs=1e-4)
    assert found[0]["baselines"] == {} and found[0]["beats_baseline"] is None


def test_a_card_is_of_the_sampler_that_is_asked_for(runs):
    own, same, steps, chosen = (
        evaluate(f"ckpt={runs[1]}", "metrics=[frechet]", "n=30", "repeats=1", "baselines=false", *given)["cards"][0]
        for given in ([], ["sampler.steps=2"], ["steps=1"], ["sampler=ddim", "steps=3"])
    )
    assert [card["sampler"]["steps"] for card in (own, same, steps, chosen)] == [2, 2, 1, 3]
    assert own["value"] == same["value"] != steps["value"] and own["sampler"]["solver"] != chosen["sampler"]["solver"]
    loaded = genai.load(runs[1])
    same = genai.evaluate(loaded, "test", "frechet", 30, repeats=1, baselines=False, sampler=steps["sampler"])["cards"][
        0
    ]
    named = genai.evaluate(loaded, "test", "frechet", 30, repeats=1, baselines=False, sampler="ddim")["cards"][0]
    assert same["value"] == steps["value"] and named["sampler"]["steps"] == 50


NOT_SAMPLED = {
    ("steps=1",): "sampler= and its arguments need a metric of samples or answers: name one in metrics=",
    ("sampler=ddim",): "sampler= and its arguments need a metric of samples or answers",
    ("step=1", "metrics=[frechet]"): "there is no key step, did you mean",
    ("sampler.step=1", "metrics=[frechet]"): "the sampler heun has no step; it has",
    ("beams=2", "metrics=[frechet]"): "there is no key beams",
    ("steps=0", "metrics=[frechet]"): "sampler.steps=0 must be a whole number of steps, at least 1",
    ("sampler=beam", "metrics=[frechet]"): "beam is for a Reorderable, and this model is a",
    ("sampler=eular", "metrics=[frechet]"): "did you mean euler?",
}


@pytest.mark.parametrize("given", NOT_SAMPLED, ids=str)
def test_a_sampler_that_cannot_be_measured_is_refused(runs, given):
    with pytest.raises(UserError) as refused:
        evaluate(f"ckpt={runs[1]}", *given)
    assert NOT_SAMPLED[given] in str(refused.value)


def test_the_pass_over_a_split_has_cards_with_intervals_and_baselines(runs, tmp_path):
    vae = train(compose_config("train", ["model=vae", f"run_dir={tmp_path / 'vae'}", *DIGITS], prepare_training))
    result = evaluate(f"ckpt={vae}", "n=100")
    bits, decibels = result["cards"]
    assert (bits["metric"], decibels["metric"]) == ("bits_per_dim", "reconstruction_psnr_db")
    assert bits["value"] == pytest.approx(result["bits_per_dim"], abs=1e-4)
    assert bits["low"] < bits["value"] < bits["high"]
    assert bits["low"] == pytest.approx(bits["value"] - 2 * result["standard_error"], rel=0.02)
    assert next(iter(bits["baselines"])).startswith("mixture of 10") and bits["beats_baseline"] is False
    assert list(decibels["baselines"]) == ["PCA with 8 components"]  # as many as the latents
    again = evaluate(f"ckpt={vae}", "n=100", "metrics=[reconstruction_psnr_db,frechet]", "repeats=1")
    assert again["cards"][0] == decibels and again["cards"][1]["metric"] == "frechet"


def test_a_likelihood_below_trivial_models_says_why(runs):
    """The objective is other than the bound's; of one that is, there is nothing to say."""
    given = ["model.schedule.steps=10", "sampler=ddim", "sampler.steps=2", *DIGITS]
    for model in ("ddpm", "ddpm_levels"):
        folder = train(
            compose_config("train", [f"model={model}", f"run_dir={runs[0].parent / model}", *given], prepare_training)
        )
        result = evaluate(f"ckpt={folder}", "n=4")
        (card,) = result["cards"]
        assert card["beats_baseline"] is False and result["bound"] == card["bound"] == "upper bound"
        assert card.get("why") == result.get("why")
        if model == "ddpm":
            assert re.match(
                r"no better than a .* \(\d\.\d+\): its loss weights .*experiment=ddpm_digits_nll", card["why"]
            )
        else:
            assert "why" not in card


def test_to_beat_a_baseline_is_to_beat_it_at_the_worse_end():
    """Training copies need not be beaten: nothing it gives is its own."""

    def beats(metric, low, high, **baselines):
        others = {TrainingCopy.what if name == "copies" else name: figure for name, figure in baselines.items()}
        figures = (low + high) / 2, low, high, None, others, {}
        return cards.card(metric, standard_metrics()[metric], *figures)["beats_baseline"]

    assert beats("frechet", 1, 2, mixture=3, copies=0) is True
    assert beats("frechet", 1, 4, mixture=3) is False and beats("frechet", 1, 2, mixture=3, gaussian=1.5) is False
    assert beats("recall", 0.5, 0.9, mixture=0.4) is True and beats("recall", 0.3, 0.9, mixture=0.4) is False
    assert beats("recall", 0.5, 0.9, copies=0.4) is None


def test_text_is_measured_against_what_was_learned(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(
        "the cat sat on the mat and the dog ran. " * 200 + "A hen is no dog but runs too. " * 60
    )
    given = ["model=gpt_nano", "data=text_file", f"data.path={tmp_path / 'text.txt'}", "data.shape=[32]", "logger=none"]
    folder = train(compose_config("train", [*given, *SMALL, f"run_dir={tmp_path / 'run'}"], prepare_training))
    found = {card["metric"]: card for card in evaluate(f"ckpt={folder}", "split=val")["cards"]}
    assert list(found) == ["nats_per_token", "bits_per_character"]
    assert found["nats_per_token"]["baselines"].keys() == {"interpolated 5-gram"}

    def copied(loaded, n, seed, batch_size, sampler):
        tokens = build_typed(loaded.config["data"]).splits["train"].batch(torch.arange(n), None)["tokens"]
        return {"tokens": tokens}

    metrics = "metrics=[distinct_1,distinct_2,longest_copy]"
    own = {
        card["metric"]: card for card in evaluate(f"ckpt={folder}", metrics, "n=5", "repeats=2", "split=val")["cards"]
    }
    monkeypatch.setattr(samples.sampling, "sample", copied)
    copies = {card["metric"]: card for card in evaluate(f"ckpt={folder}", metrics, "n=5", "split=val")["cards"]}
    assert copies["longest_copy"]["value"] == 33 and own["longest_copy"]["value"] < 20
    assert 0 < own["distinct_1"]["floor"] < 1 and own["longest_copy"]["floor"] > 5
    with pytest.raises(UserError, match=r"recall is not available for this model; it can have nats_per_token"):
        evaluate(f"ckpt={folder}", "metrics=[recall]", "split=val")


def test_a_classifier_is_trained_once_and_the_same_way(runs, monkeypatch, waits, tmp_path):
    loaded = genai.load(runs[0])
    data = build_typed(loaded.config["data"])
    first = classifier.load_or_train(data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = classifier.load_or_train(data)
    third = classifier.load_or_train(data)
    hashes = {extractors.sha256(net) for net in (first, second, third)}
    assert sum("training the classifier" in wait for wait in waits) == 1 and len(hashes) == 1
    assert first.accuracy(data, "test") > 0.5


def test_baselines_are_fitted_once(runs, monkeypatch, waits, tmp_path):
    loaded = genai.load(runs[0])
    node = loaded.config["data"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = [
        reference_scores(build_typed(node), {"bits_per_dim": standard_metrics()["bits_per_dim"]}, "test", 360)
        for _ in range(2)
    ]
    assert found[0] == found[1] and sum("once: mixture" in wait for wait in waits) == 1
    assert found[0]["bits_per_dim"]["Markov chain over pixels"] == pytest.approx(2.29, abs=0.01)


# Metrics of one's own


@pytest.fixture
def my_lab(tmp_path, monkeypatch):
    """The metric of the docs and its three lines of yaml, in a folder that is on nobody's path but Python's."""
    files = {block.title: block.text for block in blocks(DOCS / "recipes" / "metric.md")}
    for name in ("my_lab/brightness.py", "my_lab/conf/metrics.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(files[name])
    assert len((tmp_path / "my_lab/conf/metrics.yaml").read_text().splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_a_metric_in_ones_own_package(runs, my_lab, command, monkeypatch):
    """Its card by the command, with a floor and baselines; the same while a run trains, which is resumed where it is trusted."""
    data = build_typed(genai.load(runs[0]).config["data"])
    classifier.load_or_train(data)
    given = ["--config-dir", "my_lab/conf", f"ckpt={runs[0]}", "metrics=[frechet,brightness]", "n=30", "repeats=2"]
    done = command("evaluate.py", *given, cwd=my_lab)
    assert done.returncode == 0, done.stderr
    card = json.loads((runs[0] / "cards" / "brightness.json").read_text())
    real = data.items("test", torch.arange(360)).mean()
    sets = [quantize(genai.sample(genai.load(runs[0]), n=30, seed=seed)["image"], 17) for seed in (0, 30)]
    values = [abs((fake.mean() - real).item()) for fake in sets]
    assert (card["value"], card["low"], card["high"]) == pytest.approx(
        (sum(values) / 2, min(values), max(values)), abs=1e-4
    )
    held_out = next(batches(first_items(data, "val", 30), 30))["image"]
    assert card["floor"] == pytest.approx(abs((held_out.mean() - real).item()), abs=1e-5) and card["floor_of"] == "val"
    assert len(card["baselines"]) == 3 and card["beats_baseline"] is False and card["baselines"]["one Gaussian"] < 0.1
    target = {"_target_": "my_lab.brightness.Brightness", "power": 1}
    assert card["protocol"]["metric"] == target and "metric" not in read(runs[0]).cards["frechet"]["protocol"]

    monkeypatch.syspath_prepend(my_lab)
    keys = ["every_steps=2", "metrics=[frechet,brightness]", "n=30", "baselines=false"]
    keys = ["model=gan", *DIGITS, *(f"callbacks.cards.{key}" for key in keys), "run_dir=run"]
    folder = train(compose_config("train", keys, prepare_training, config_dir="my_lab/conf"))
    assert [step for step, _ in read(folder).curves["card/brightness"]] == [2, 3]
    (after,) = evaluate(
        "ckpt=run",
        f"metrics=[{{brightness:{target}}}]".replace("'", ""),
        "n=30",
        "repeats=1",
        "split=val",
        "baselines=false",
    )["cards"]
    assert after == read(folder).cards["brightness"]
    long = ["resume=run", "max_steps=4", "optim.decay_steps=4", "discriminator_optim.decay_steps=4"]
    with pytest.raises(UserError, match=r"wants to build my_lab.brightness.Brightness, .* add trust=my_lab"):
        train(compose_config("train", long, prepare_training))
    train(compose_config("train", [*long, "trust=my_lab"], prepare_training))
    assert [step for step, _ in read(folder).curves["card/brightness"]] == [2, 3, 4]


def test_a_baselines_figures_are_of_float64():
    """A tenth is not one in float32."""
    tenth = type("Tenth", (Metric,), {"kind": "likelihoods", "__call__": lambda self, nats, facts: [0.1 + 1e-12] * 2})()
    data = build_typed(compose_config("baselines", ["data=digits"]).data)
    baseline = Uniform().fit(training_data(data, ["val"]), 0)
    assert score_baseline(baseline, data, {"tenth": tenth}, "test", 2) == {"tenth": 0.1 + 1e-12}


def test_a_metrics_arguments_and_code_decide_its_figures(my_lab, monkeypatch):
    monkeypatch.syspath_prepend(my_lab)
    made = lambda power: build_typed({"_target_": "my_lab.brightness.Brightness", "power": power})  # noqa: E731
    assert cache_key("brightness", made(1)) == cache_key("brightness", made(1)) != cache_key("brightness", made(2))
    before = cache_key("brightness", made(1))
    path = my_lab / "my_lab" / "brightness.py"
    path.write_text(path.read_text() + "# changed\n")
    assert cache_key("brightness", made(1)) != before
    assert cache_key("recall", standard_metrics()["recall"]) == "recall" != cache_key("recall", made(1))


class Worst(Metric):
    """Of single items, the highest squared error."""

    kind = "reconstructions"

    def __call__(self, again, x):
        return (again - x).square().flatten(1).amax(1)


def test_a_metric_of_reconstructions_has_their_baselines(runs, tmp_path):
    """The worst pixel of a VAE's reconstructions, with PCA as baseline."""
    vae = train(compose_config("train", ["model=vae", f"run_dir={tmp_path / 'vae'}", *DIGITS], prepare_training))
    worst = "{worst:{_target_:tests.evaluation.test_cards.Worst}}"
    result = evaluate(f"ckpt={vae}", f"metrics=[{worst},reconstruction_psnr_db]", "n=40")
    card = result["cards"][0]
    loaded = genai.load(vae)
    batch = next(batches(build_typed(loaded.config["data"]).splits["test"], 40))
    expected = Worst()(loaded.model.reconstruct(batch), batch["image"]).mean().item()
    assert card["metric"] == "worst" and card["value"] == pytest.approx(expected, abs=1e-4)
    assert list(card["baselines"]) == ["PCA with 8 components"] and result["worst"] == pytest.approx(expected, abs=1e-4)
    plain = evaluate(f"ckpt={vae}", "metrics=[reconstruction_psnr_db]", "n=40")
    assert result["cards"][1] == plain["cards"][0] and "worst" not in plain
    with pytest.raises(UserError, match=r"distinct_3 is not available for this model; it can have bits_per_dim"):
        evaluate(f"ckpt={vae}", "metrics=[{distinct_3:{_target_:genai.evaluation.metrics.Distinct,n:3}}]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "images"},
            "kind=images of mine must be one of samples, texts, melodies, answers, likelihoods, hidden",
        ),
        ({"better": "more"}, "better=more of mine"),
        ({"reads": ("pixels",)}, r"reads=\('pixels',\) of mine must be one of features, probabilities, images"),
    ],
)
def test_a_metric_that_says_what_there_is_not_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        resolve({"mine": type("Mine", (Metric,), change)()})
    with pytest.raises(UserError, match=r"mine is a ReLU: give the node of a genai\.evaluation\.metrics\.Metric"):
        resolve({"mine": nn.ReLU()})
    with pytest.raises(UserError, match=r"'../mine' names a file of cards/"):
        resolve({"../mine": Worst()})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.nan, "mine gives nan, and samples need one finite number"),
        (torch.ones(3), r"numbers of shape \[3\]"),
        ("good", r"mine fails \((Value|Type)Error: "),
        (None, r"mine fails \("),
    ],
)
def test_a_metric_that_gives_no_number_is_named(given, message):
    with pytest.raises(UserError, match=message):
        compute("mine", type("Mine", (Metric,), {"__call__": lambda self, sets: given})(), None)
    one = type("One", (Metric,), {"__call__": lambda self, sets: torch.tensor([[3.0]])})()
    assert compute("mine", one, None).tolist() == [3.0]
    items = type("Items", (Metric,), {"kind": "likelihoods", "__call__": lambda self, nats, facts: nats[:1]})()
    with pytest.raises(UserError, match="likelihoods need one number for each item"):
        compute("mine", items, torch.ones(2), {})


def test_a_metric_that_fails_is_named(runs, my_lab, refused):
    """By evaluate.py as by a run that trains, where there is a traceback of nobody's else."""
    path = my_lab / "my_lab" / "brightness.py"
    path.write_text(path.read_text().replace("return abs", "raise KeyError('grey')\n        return abs"))
    named = "metrics=[{mine:{_target_:my_lab.brightness.Brightness}}]"
    sentence = refused("evaluate.py", f"ckpt={runs[0]}", named, "n=2", "repeats=1", "baselines=false")
    assert "metrics: mine fails (KeyError: 'grey'): change its class" in sentence
    assert "Brightness cannot be built" in refused("evaluate.py", f"ckpt={runs[0]}", named.replace("}}]", ",a:1}}]"))
    (my_lab / "my_lab/conf/metrics.yaml").write_text("- brightness\n")
    sentence = refused("evaluate.py", "--config-dir", "my_lab/conf", f"ckpt={runs[0]}", "metrics=[frechet]")
    assert "metrics.yaml must map names to nodes" in sentence


# Extractors


class Norm(nn.Module):
    """Features by a layer whose running statistics move in training mode."""

    def __init__(self, channels=1):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(x)[:, :, ::2, ::2]


def test_any_network_is_an_extractor_and_stays_as_it_is(runs, tmp_path):
    net = Norm().train()
    before = extractors.sha256(net)
    seen = extractors.module(None, None, "cpu", net)
    features, logits = seen(torch.randn(300, 1, 8, 8))
    assert features.shape == (300, 16) and logits is None and not net.training and extractors.sha256(net) == before
    with torch.no_grad():
        net.norm.running_mean.fill_(0.5)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    given = [f"ckpt={runs[0]}", "extractor=module", "extractor.net={_target_: tests.evaluation.test_cards.Norm}"]
    cards_of = lambda *more: evaluate(*given, *more, "n=40", "repeats=1", "baselines=false")["cards"]  # noqa: E731
    plain, moved = cards_of("metrics=[kid]"), cards_of("metrics=[kid]", f"extractor.weights={tmp_path / 'weights.pt'}")
    assert plain[0]["protocol"]["extractor"] == {"kind": "Norm", "sha256": before}
    assert moved[0]["protocol"]["extractor"]["sha256"] == extractors.sha256(net) != before
    with pytest.raises(UserError, match="accuracy needs extractor=classifier"):
        cards_of("metrics=[accuracy]")
    with pytest.raises(UserError, match="is not a state dict of Norm"):
        cards_of("metrics=[kid]", f"extractor.weights={runs[0] / 'config.yaml'}")
    torch.save({"norm.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="do not fit"):
        cards_of("metrics=[kid]", f"extractor.weights={tmp_path / 'other.pt'}")
    with pytest.raises(UserError, match=r"the extractor fails on an image \[1, 1, 8, 8\] .* choose another network"):
        cards_of("metrics=[kid]", "extractor.net={_target_: torch.nn.Linear, in_features: 3, out_features: 2}")
    with pytest.raises(UserError, match=r"extractor.net=None must build an nn.Module"):
        evaluate(f"ckpt={runs[0]}", "extractor=module", "metrics=[kid]")


def test_inception_is_torch_fidelitys(runs, tmp_path, monkeypatch):
    """With weights drawn at random, for its own cannot be had here: the same features and logits, and no pickle is read."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(
        fidelity, "load_state_dict_from_url", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(UserError, match=r"no weights and could not download them \(no network\)"):
        extractors.inception(None, None, "cpu")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        net = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    seen = extractors.inception(None, None, "cpu", str(tmp_path / "inception.pth"))
    x = quantize(torch.rand(3, 1, 8, 8) * 2 - 1, 256)
    features, logits = seen(x)
    expected = net(((x + 1) * 255 / 2).round().to(torch.uint8).expand(-1, 3, -1, -1))
    assert torch.equal(features, expected[0]) and torch.equal(logits, expected[1]) and features.shape == (3, 2048)
    torch.save({"weights": Norm()}, tmp_path / "pickle.pth")
    with pytest.raises(UserError, match=r"pickle.pth is not torch-fidelity's weights-inception"):
        extractors.inception(None, None, "cpu", str(tmp_path / "pickle.pth"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="needs the package torch-fidelity"):
        extractors.inception(None, None, "cpu")


# Copies


def test_a_memoriser_is_flagged(runs, monkeypatch):
    """A sampler that gives training images back."""
    items = build_typed(genai.load(runs[0]).config["data"]).splits["train"].batch(torch.arange(400), None)

    def copies(loaded, n, seed, label, batch_size, sampler):
        return {"image": items["image"][seed : seed + n], "label": items["label"][seed : seed + n]}

    monkeypatch.setattr(samples.sampling, "sample", copies)
    (card,) = evaluate(f"ckpt={runs[0]}", "metrics=[recall]", "n=60", "repeats=1")["cards"]
    assert card["memorised"] and card["copies"] == 60 and card["distance_ratio"] == 0


@pytest.mark.slow
def test_the_default_run_is_no_memoriser_and_beats_its_baselines(tmp_path):
    """Three minutes: what `python train.py` trains, against a Gaussian mixture for each class, by the classifier."""
    folder = train(compose_config("train", ["logger=none", f"run_dir={tmp_path / 'run'}"], prepare_training))
    (card,) = evaluate(f"ckpt={folder}", "metrics=[frechet]", "repeats=2")["cards"]
    assert not card["memorised"] and card["copies"] == 0 and 0.8 < card["distance_ratio"] < 1.3
    assert card["beats_baseline"]


def test_samples_lie_on_the_levels_of_the_data():
    x = quantize(torch.tensor([-1.3, -0.99, 0.06, 0.07, 1.0]), 17)
    assert x.tolist() == [-1, -1, 0, 0.125, 1]


# While training, and to a tracker


def test_the_same_cards_while_a_run_trains(runs, tmp_path):
    given = [
        "callbacks.cards.every_steps=2",
        "callbacks.cards.metrics=[frechet,recall]",
        "callbacks.cards.n=30",
        "max_steps=4",
    ]
    folder = train(
        compose_config("train", ["model=gan", *DIGITS, *given, f"run_dir={tmp_path / 'run'}"], prepare_training)
    )
    assert [step for step, _ in read(folder).curves["card/frechet"]] == [2, 4]
    inside = json.loads((folder / "cards" / "frechet.json").read_text())
    (after,) = evaluate(f"ckpt={folder}", "metrics=[frechet]", "n=30", "repeats=1", "split=val")["cards"]
    assert inside == after and after["step"] == 4
    long = ["max_steps=6", "optim.decay_steps=6", "discriminator_optim.decay_steps=6"]
    more = train(compose_config("train", [f"resume={folder}", *long], prepare_training))
    assert [step for step, _ in read(more).curves["card/recall"]] == [2, 4, 6]


@pytest.mark.slow
def test_an_offline_tracker_holds_the_cards(runs, command, tmp_path):
    """Config, metrics and pictures are read back in test_tracking; here the tables of cards, in the run and after it."""
    given = [
        "model=gan",
        "data=digits",
        *SMALL,
        "callbacks.cards.every_steps=3",
        "callbacks.cards.metrics=[recall]",
        "callbacks.cards.n=20",
        "callbacks.cards.baselines=false",
        f"run_dir={tmp_path / 'run'}",
    ]
    assert command("train.py", *given).returncode == 0
    asked = ["metrics=[frechet]", "n=20", "repeats=1", "baselines=false"]
    done = command("evaluate.py", f"ckpt={tmp_path / 'run'}", *asked)
    assert done.returncode == 0, done.stderr
    tables = {}
    for path in sorted((tmp_path / "run").glob("wandb/offline-run-*/files/media/table/*.table.json")):
        table = json.loads(path.read_text())
        tables[table["data"][0][0]] = dict(zip(table["columns"], table["data"][0], strict=True))
    assert tables.keys() == {"recall", "frechet"}
    card = json.loads((tmp_path / "run" / "cards" / "frechet.json").read_text())
    assert tables["frechet"]["value"] == card["value"] and json.loads(tables["frechet"]["protocol"]) == card["protocol"]
    first, again = offline_runs(tmp_path / "run")
    assert first.run.run_id == again.run.run_id and any("card/recall" in row for row in first.history)
    assert again.summary["best/card/frechet"] == card["value"]
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == 2
    assert command("evaluate.py", f"ckpt={tmp_path / 'run'}", *asked, "track=false").returncode == 0
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == 2


# What is refused


def photos(folder, shift):
    """Two folders of 30 images of 8x8 each."""
    for y, name in enumerate(("a", "b")):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            pixels = torch.full((1, 8, 8), (7 * i + shift + 40 * y) % 256, dtype=torch.uint8)
            to_pil(pixels).save(folder / name / f"{i}.png")
    return [f"data.root={folder}", "data=image_folder", "data.channels=1", "logger=none", *SMALL[:2]]


def test_cards_of_different_data_are_not_ranked(runs, tmp_path):
    """Two folders of one class, of the same names and counts, and one of them at another size."""
    one, other = photos(tmp_path / "one", 0), photos(tmp_path / "other", 3)
    small = ["data.size=[8,8]", "callbacks.evaluate.n=2", "callbacks.samples.n=2"]
    named = {
        "first": [*one, *small],
        "second": [*other, *small],
        "larger": [*one, "data.size=[16,16]", *small[1:]],
    }
    found = {}
    for name, given in named.items():
        folder = train(compose_config("train", ["model=gan", *given, f"run_dir={tmp_path / name}"], prepare_training))
        evaluate(
            f"ckpt={folder}",
            "metrics=[recall]",
            "n=4",
            "repeats=1",
            "baselines=false",
            "extractor=module",
            "extractor.net={_target_: tests.evaluation.test_cards.Norm}",
        )
        found[name] = read(folder)
    with pytest.raises(UserError, match=r"protocol.data_checksum is \w{16} in .*first and \w{16} in .*second"):
        check_protocols([found["first"], found["second"]])
    with pytest.raises(UserError, match=r"protocol.shape is \[1, 8, 8\] in .*first and \[1, 16, 16\] in"):
        check_protocols([found["first"], found["larger"]])


def test_what_cannot_be_measured_is_refused(runs, refused, tmp_path):
    gan, _ = runs
    photos = tmp_path / "photos"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        for i in range(8):
            to_pil(torch.full((1, 8, 8), 20 * i, dtype=torch.uint8)).save(photos / name / f"{i}.png")
    given = [
        "model=gan",
        "data=image_folder",
        f"data.root={photos}",
        "data.size=[8,8]",
        "data.channels=1",
        "logger=none",
    ]
    folder = train(compose_config("train", [*given, *SMALL, f"run_dir={tmp_path / 'folder'}"], prepare_training))
    (photos / "a").rename(photos / "c")
    cases = {
        (f"ckpt={gan}", "metrics=[fid]"): "fid is not a metric; it can have frechet, kid, inception_score",
        (f"ckpt={gan}", "metrics=[bits_per_dim]"): "bits_per_dim is not available for this model; it can have frechet",
        (f"ckpt={gan}", "metrics=[recall]", "n=1000"): "n=1000 is more than the 360 items of split=test",
        (f"ckpt={gan}", "metrics=[recall]", "n=1"): "n=1 must be a whole number, at least 2",
        (f"ckpt={gan}", "metrics=[recall]", "repeats=0"): "repeats=0 must be a whole number",
        (f"ckpt={gan}", "metrics=[recall]", "split=dev"): "split=dev must be one of train, val, test",
        (
            f"ckpt={gan}",
            "metrics=[recall]",
            "extractor=vgg",
        ): "extractor=vgg must be one of classifier, inception, module",
        (f"ckpt={runs[1]}", "metrics=[recall]", "likelihood=probability_flow"): "add bits_per_dim to metrics=",
        (f"ckpt={folder}", "metrics=[recall]"): "list of classes of",
    }
    for given, message in cases.items():
        assert message in refused("evaluate.py", *given)


MODULE = "_target_: genai.evaluation.features.module, _partial_: true"
CARDS = {
    ("metrics=[fid]",): "fid is not a metric; it can have frechet",
    ("metrics=[bits_per_dim]",): "bits_per_dim is not available for this model",
    ("metrics=[recall]", "n=1000"): "n=1000 is more than the .* items of split=val",
    ("metrics=[recall]", "n=1"): "n=1 must be a whole number, at least 2",
    ("metrics=[recall]", "split=dev"): "split=dev must be one of train, val, test",
    ("metrics=[recall]", "repeats=0"): "repeats=0 must be a whole number",
    (): "has no likelihood of its own",
    ("metrics=[recall]", f"extractor={{{MODULE}, weights: gone}}"): "extractor.net=",
    (
        "metrics=[accuracy]",
        f"extractor={{{MODULE}, net: {{_target_: torch.nn.Flatten}}}}",
    ): "accuracy needs extractor=classifier",
}


@pytest.mark.parametrize("given", CARDS)
def test_cards_that_cannot_be_measured_are_refused_before_the_first_step(runs, tmp_path, given):
    """However late they are due, and nothing is written."""
    keys = ["callbacks.cards.every_steps=100000", *(f"callbacks.cards.{key}" for key in given)]
    with pytest.raises(UserError, match=CARDS[given]):
        train(compose_config("train", ["model=gan", *DIGITS, *keys, f"run_dir={tmp_path / 'run'}"], prepare_training))
    assert not (tmp_path / "run").exists()
