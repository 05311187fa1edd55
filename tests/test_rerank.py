"""The best of several candidates is the one that the scorer finds nearest to what was asked for, whatever the batch."""

import itertools
import json

import pytest
import torch
from torch import nn

from genai import rerank
from genai.core import rng
from genai.core.errors import UserError
from genai.sampling import _scorer

SEEDS = torch.tensor([5, 9, 2**40])


class Model(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)


def draw(model, seeds, cond=None, on_step=None, shift=0.0):
    """A sample is a point on the circle, and its seed."""
    if on_step is not None:
        for i in range(2):
            on_step(i, 2, {})
    angle = 6.28 * rng.uniform(seeds, (1,)) + shift
    return {"vector": torch.cat([angle.cos(), angle.sin()], 1), "own": seeds}


class Scorer:
    def embed_media(self, batch):
        return {name: value.float() for name, value in batch.items() if name in ("vector", "caption")}


def asked(n=3):
    return {"caption": torch.tensor([[0.0, 1.0]]).expand(n, 2), "label": torch.arange(n)}


def best(k, field="vector"):
    return rerank.reranked(draw, Scorer(), field, k)


def test_the_candidate_nearest_to_the_condition_is_kept():
    made = best(8)(Model(), SEEDS, asked())
    own = torch.tensor([[seed if k == 0 else rng.mix(seed, k) for k in range(8)] for seed in SEEDS.tolist()])
    heights = draw(None, own.flatten())["vector"][:, 1].view(3, 8)
    assert torch.equal(made["candidate"], heights.argmax(1))
    assert torch.allclose(made["similarity"], heights.amax(1))
    assert torch.equal(made["own"], own.gather(1, heights.argmax(1, keepdim=True))[:, 0])
    assert len({*made["candidate"].tolist()}) > 1


def test_more_candidates_are_never_worse_and_one_is_the_sample_itself():
    found = [best(k)(Model(), SEEDS, asked())["similarity"] for k in (1, 2, 4, 8)]
    assert all((b >= a).all() for a, b in itertools.pairwise(found))
    assert torch.equal(best(1)(Model(), SEEDS, asked())["vector"], draw(None, SEEDS)["vector"])


def test_a_sample_depends_on_its_seed_alone_and_the_first_of_equals_is_kept():
    whole, alone = best(4)(Model(), SEEDS, asked()), best(4)(Model(), SEEDS[1:2], asked(1))
    assert torch.equal(whole["vector"][1:2], alone["vector"])
    level = {"caption": torch.zeros(3, 2)}
    assert best(4)(Model(), SEEDS, level)["candidate"].tolist() == [0, 0, 0]


def test_steps_are_counted_over_all_candidates_and_arguments_reach_the_sampler():
    seen = []
    made = best(3)(Model(), SEEDS, asked(), lambda i, n, state: seen.append((i, n)), shift=torch.tensor(1.0))
    assert seen == [(i, 6) for i in range(6)]
    assert not torch.equal(made["vector"], best(3)(Model(), SEEDS, asked())["vector"])


@pytest.mark.parametrize(
    ("cond", "field", "error"),
    [
        (None, "vector", "scorer= embeds nothing of it: give prompt="),
        ({"label": torch.arange(3)}, "vector", "scorer= embeds nothing of it"),
        (asked(), "own", "scorer= embeds no own, which samples of this model are"),
    ],
)
def test_what_a_scorer_does_not_embed_is_refused(cond, field, error):
    with pytest.raises(UserError, match=error):
        best(2, field)(Model(), SEEDS, cond)


def test_frames_of_several_candidates_are_refused():
    with pytest.raises(UserError, match="leave one out"):
        _scorer(None, 2, "runs/pairs", True)  # type: ignore[arg-type]


def test_the_record_says_of_how_many_and_by_which_model(tmp_path):
    batch = {"candidate": torch.tensor([2, 0]), "similarity": torch.tensor([0.5, 0.25])}
    (said,) = rerank.note(tmp_path, ["a", "b"], batch, 4, "runs/pairs")
    assert said == "rerank.json (each the best of 4 by runs/pairs)"
    assert json.loads((tmp_path / "rerank.json").read_text()) == {
        "candidates": 4,
        "scorer": "runs/pairs",
        "kept": {"a": {"candidate": 2, "similarity": 0.5}, "b": {"candidate": 0, "similarity": 0.25}},
    }
