"""Contrastive learning: the loss by its formula, shared targets, a bounded temperature, and retrieval by brute force."""

import math

import pytest
import torch
from torch import nn

from genai.core import rng
from genai.core.errors import UserError
from genai.metrics.retrieval import hits
from genai.models.contrastive.encoders import CaptionEncoder, ConvEncoder, SoundEncoder
from genai.models.contrastive.pairs import Contrastive
from genai.models.contrastive.retrieval import retrieve


class Vectors(nn.Module):
    """An encoder that returns what it is given."""

    features = 3

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, x):
        return x


def vectors(temperature=0.5, names=("one", "other")):
    model = Contrastive({name: Vectors(name) for name in names}, 3, temperature)
    for project in model.project.values():
        nn.init.eye_(project.weight)
    return model


def test_the_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    model, batch = vectors(), {name: torch.randn(5, 3) for name in ("one", "other")}
    one, other = (x / x.norm(dim=1, keepdim=True) for x in batch.values())
    logits = one @ other.T / 0.5
    rows, columns = (-m.log_softmax(1).diagonal().mean() for m in (logits, logits.T))
    torch.testing.assert_close(model(batch, 0).total, (rows + columns) / 2)


def test_items_of_a_class_share_the_target():
    """Embeddings that agree within classes and are opposite between two of them reach the entropy of the target."""
    model = vectors(temperature=0.01)
    x = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])[torch.tensor([0, 1, 0, 1, 0])]
    batch = {"one": x, "other": x, "label": torch.tensor([0, 1, 0, 1, 0])}
    entropy = (3 * math.log(3) + 2 * math.log(2)) / 5
    torch.testing.assert_close(model(batch, 0).total, torch.tensor(entropy))
    assert model({name: batch[name] for name in ("one", "other")}, 0).total.isclose(
        torch.tensor(entropy)
    )  # cannot be less
    wrong = {**batch, "label": torch.tensor([0, 0, 0, 1, 1])}
    assert model(wrong, 0).total > entropy + 1


def test_the_temperature_is_learned_and_bounded():
    model, batch = vectors(), {name: torch.eye(3) for name in ("one", "other")}
    model(batch, 0).total.backward()
    assert model.log_scale.grad < 0  # sharper is better for pairs that agree
    model.log_scale.data.fill_(9.0)
    assert model.scale().item() == pytest.approx(100)
    with pytest.raises(UserError, match=r"model\.temperature=0\.001"):
        vectors(temperature=0.001)


def test_three_media_are_three_pairs():
    torch.manual_seed(0)
    names = "a", "b", "c"
    model, batch = vectors(names=names), {name: torch.randn(4, 3) for name in names}
    losses = model(batch, 0)
    pairs = [losses.logs[name][0] for name in ("a_b", "a_c", "b_c")]
    torch.testing.assert_close(losses.total, torch.stack(pairs).mean())
    with pytest.raises(UserError, match="learns from pairs of a, b, c, and this data has a"):
        model({"a": batch["a"]}, 0)
    with pytest.raises(UserError, match=r"model\.encoders has a: give at least two encoders"):
        vectors(names=["a"])


def test_hits_are_those_of_brute_force():
    torch.manual_seed(0)
    queries, gallery, label = torch.randn(1500, 4), torch.randn(1500, 4), torch.randint(0, 40, (1500,))
    for k in (1, 3):
        found = hits(queries, gallery, label, k)
        for i in range(0, 1500, 97):
            best = sorted(range(1500), key=lambda j: -(queries[i] @ gallery[j]).item())[:k]
            assert found[i] == any(label[j] == label[i] for j in best)
    assert hits(queries, queries / queries.norm(dim=1, keepdim=True), torch.arange(1500)).mean() > 0.5


def test_retrieval_returns_images_by_rank():
    model = vectors(names=("image", "text"))
    gallery = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    query = gallery[2:3].expand(3, -1)
    found = retrieve(
        model, rng.seed_range(0, 3), {"text": query}, candidates=6, items=lambda split, index, again: gallery[index]
    )
    order = sorted(range(6), key=lambda j: -(gallery[2] @ gallery[j]).item())
    assert order[0] == 2 and torch.equal(found["image"], gallery[order[:3]])
    assert (found["similarity"].diff() <= 0).all()
    with pytest.raises(UserError, match="seed=6 is a rank past the 6 candidates"):
        retrieve(
            model,
            rng.seed_range(6, 1),
            {"text": query[:1]},
            candidates=6,
            items=lambda split, index, again: gallery[index],
        )
    with pytest.raises(UserError, match="this model retrieves images by text: give prompt="):
        retrieve(model, rng.seed_range(0, 1), None, candidates=6, items=lambda split, index, again: gallery[index])


def test_encoders_map_their_fields_to_features():
    torch.manual_seed(0)
    image, sound, caption = ConvEncoder(1, 8, 12), SoundEncoder(8000, width=8, features=12), CaptionEncoder(5, 8, 1, 2)
    assert image(torch.zeros(2, 1, 28, 28)).shape == image(torch.zeros(2, 1, 8, 8)).shape == (2, 12)
    x = torch.randn(3, 1, 4000).clamp(-1, 1)
    assert sound.eval()(x).shape == (3, 12)
    torch.testing.assert_close(sound(x)[:1], sound(x[:1]))
    assert caption(torch.full((2, 5), 256)).shape == (2, 8)
