"""Any medium given any other: one likelihood in training and decoding, separate ids, losses of each medium over its own."""

import itertools

import pytest
import torch

from genai.core import rng
from genai.core.errors import UserError
from genai.core.protocols import PAD
from genai.models.autoregressive.media import MediaTransformer, sample
from genai.nn.attention import Attention, RotaryPositions
from genai.nn.grey_levels import GreyLevels
from genai.nn.latent_space import LatentTokens
from genai.nn.norm import RMSNorm
from genai.nn.transformer import MLP, SquaredReLU, Transformer
from genai.nn.words import Bytes


class Sound(GreyLevels):
    """Four samples on five levels, as images of one row."""

    def __init__(self):
        super().__init__("audio", [1, 1, 4], 5)


def small(seed=0, causal=True, **options):
    torch.manual_seed(seed)
    media = {
        "text": Bytes(5),
        "image": LatentTokens(GreyLevels("image", [1, 2, 3], 4)),
        "audio": LatentTokens(Sound()),
    }
    transformer = Transformer(
        16,
        2,
        lambda n: Attention(n, 2, causal=causal),
        lambda n: MLP(n, SquaredReLU()),
        RMSNorm,
        RotaryPositions,
    )
    return MediaTransformer(media, transformer, **options).eval()


def batch_of(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = {"image": torch.randint(0, 4, (n, 1, 2, 3), generator=generator) / 1.5 - 1}
    levels["audio"] = torch.randint(0, 5, (n, 1, 1, 4), generator=generator) / 2 - 1
    caption = torch.tensor([[*b"six", PAD, PAD], [*b"seven"]])[torch.arange(n) % 2]
    return {**levels, "caption": caption}


def nats_of(model, pair, batch):
    """-ln p (B, T) of the second of two media given the first, and which tokens count."""
    (third,) = set(model.media) - set(pair)
    nats, real = model.nats([(*pair, third)], batch)
    return nats[pair[1]], real[pair[1]]


PAIRS = list(itertools.permutations(("text", "image", "audio"), 2))


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_what_is_drawn_is_as_likely_as_training_says(pair):
    source, target = pair
    model, batch = small(), batch_of()
    fields = {"text": "caption", "image": "image", "audio": "audio"}
    made = sample(model, rng.seed_range(3, 4), {fields[source]: batch[fields[source]]}, to=target)
    nats, real = nats_of(model, pair, {**batch, fields[target]: made[fields[target]]})
    ours = -made["log_prob"]
    if target == "text":  # what follows the first padding is drawn, and does not count
        assert torch.equal(made["caption"][real], made["tokens"][real])
    torch.testing.assert_close((ours * real).sum(1), nats.sum(1), atol=1e-5, rtol=1e-5)
    alone = sample(model, rng.seed_range(4, 1), {fields[source]: batch[fields[source]][1:2]}, to=target)
    assert torch.equal(alone["tokens"][0], made["tokens"][1])


@pytest.mark.parametrize("pair", PAIRS)
def test_a_target_depends_on_its_source_and_what_is_written(pair):
    source, target = pair
    model, batch, other = small(), batch_of(), batch_of(seed=1)
    fields = {"text": "caption", "image": "image", "audio": "audio"}
    (third,) = {"text", "image", "audio"} - set(pair)
    nats, _ = nats_of(model, pair, batch)
    assert torch.equal(nats_of(model, pair, {**batch, fields[third]: other[fields[third]]})[0], nats)
    changed = {**batch, fields[source]: other[fields[source]].flip(0)}
    assert not torch.equal(nats_of(model, pair, changed)[0], nats)
    tokens = model.tokens(target, batch)
    last = {"text": tokens.clone(), "image": batch["image"].clone(), "audio": batch["audio"].clone()}[target]
    last.flatten(1)[:, -1] = torch.where(last.flatten(1)[:, -1] == 1, -1, 1).to(last)  # the last token of each
    later = nats_of(model, pair, {**batch, fields[target]: last})[0]
    assert torch.equal(later[:, :-1], nats[:, :-1])


def test_ids_of_media_do_not_overlap():
    model, batch = small(), batch_of()
    seen = [set(model.sequence(name, model.tokens(name, batch)).flatten().tolist()) for name in model.media]
    assert all(not one & other for one, other in itertools.combinations(seen, 2))
    spans = [range(model.offsets[name], model.offsets[name] + part.vocab_size) for name, part in model.media.items()]
    assert (
        sorted(itertools.chain(*spans)) == list(range(model.codes)) and model.hidden == model.embed.num_embeddings - 1
    )


def test_a_loss_is_the_weighted_mean_of_the_media():
    model, batch = small(weights={"text": 2.0, "image": 1.0, "audio": 1.0}), batch_of(n=6)
    losses = model(batch, 0)
    means = {name: [] for name in model.media}
    for i, order in enumerate(model.orders):
        nats, real = model.nats([order], {name: x[i : i + 1] for name, x in batch.items()})
        for name in order:
            means[name].append(nats[name].sum() / real[name].sum())
        torch.testing.assert_close(losses.logs[f"{order[0]}_to_{order[1]}"][0], means[order[1]][-1].detach())
    means = {name: torch.stack(each).mean() for name, each in means.items()}
    for name, mean in means.items():
        torch.testing.assert_close(losses.logs[name][0], mean.detach())
    torch.testing.assert_close(losses.total, means["text"] / 2 + means["image"] / 4 + means["audio"] / 4)
    nats, real = nats_of(model, ("image", "text"), batch)
    assert real.sum(1).tolist() == [4, 5, 4, 5, 4, 5] and (nats[~real] == 0).all()  # of padding the first


def test_training_rows_take_the_orders_in_turn():
    model, batch = small(label_dropout=0.0).train(), {name: x[:1] for name, x in batch_of().items()}
    for step, (source, target, _) in enumerate(model.orders):
        logs = model(batch, step).logs
        counted = {name for name, (_, n) in logs.items() if "_to_" in name and n == 1}
        assert counted == {f"{source}_to_{target}"}
        nats, real = nats_of(model, (source, target), batch)
        torch.testing.assert_close(logs[f"{source}_to_{target}"][0], (nats.sum() / real.sum()).detach())


@torch.no_grad()
def test_guidance_goes_from_no_source_to_the_source():
    model, batch = small(), batch_of()
    given = {"caption": batch["caption"]}
    x = {w: sample(model, rng.seed_range(0, 4), given, to="image", guidance=w)["tokens"] for w in (0.0, 1.0)}
    torch.manual_seed(0)
    assert torch.equal(x[1.0], sample(model, rng.seed_range(0, 4), given, to="image")["tokens"])
    assert torch.equal(x[0.0], sample(model, rng.seed_range(0, 4), None, to="image")["tokens"])
    direction = model.direction("text", "image")
    states = [
        direction.start({"source": batch["caption"], "guidance": torch.full((4,), w)}, 4, 3) for w in (0.0, 1.0, 3.0)
    ]
    begin = torch.full((4, 1), direction.first)
    null, given, guided = (direction.next(begin, state) for state in states)
    torch.testing.assert_close(guided, null + 3 * (given - null))


def test_hidden_media_say_nothing_and_count_for_nothing():
    model, one, other = small(label_dropout=0.5).train(), batch_of(n=64), batch_of(n=64, seed=1)
    order = ("image", "audio", "text")
    found = []
    for images in (one, other):
        torch.manual_seed(3)
        found.append(model.nats([order], {**one, "image": images["image"]}))
    (nats, real), (changed, _) = found
    hidden = ~real["image"].any(1)
    assert 16 < hidden.sum() < 48 and (nats["image"][hidden] == 0).all()
    same = (nats["audio"] == changed["audio"]).all(1)
    shown = real["audio"].any(1)
    assert same[hidden].all() and not same[~hidden & shown].any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"causal": False}, "needs model.transformer.attention.causal=true"),
        ({"weights": {"film": 1.0}}, "model.weights.film must be one of text, image, audio, or null"),
        ({"weights": {"text": 0.0, "image": 0.0, "audio": 0.0}}, "are all 0"),
        ({"perturb": {"smell": torch.nn.Identity()}}, "model.perturb.smell must be one of text, image, audio"),
        ({"label_dropout": 0.0, "guidance": 2.0}, "needs a model that was trained with and without the given medium"),
    ],
)
def test_models_that_cannot_be(options, sentence):
    with pytest.raises(UserError, match=sentence):
        small(**options)


def test_calls_that_cannot_be():
    model, batch = small(), batch_of()
    for cond, to, sentence in (
        ({"caption": batch["caption"]}, "text", "prompt= gives text, and to=text asks for the same"),
        ({"caption": batch["caption"]}, "film", "to=film must be one of text, image, audio"),
    ):
        with pytest.raises(UserError, match=sentence):
            sample(model, rng.seed_range(0, 4), cond, to=to)
    with pytest.raises(UserError, match="this data has no audio"):
        model.prepare([{name: batch[name] for name in ("image", "caption")}])
    with pytest.raises(UserError, match=r"data.length=4 bytes, but this model reads 5"):
        model.prepare([{**batch, "caption": batch["caption"][:, :4]}])
