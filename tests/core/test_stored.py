"""Names of before that a user, a run or a card may still carry: each means what it is called today."""

import pytest

from genai.cli import compose_config
from genai.compare.runs import up_to_date
from genai.core.stored import RENAMED_OVERRIDES
from genai.core.stored import up_to_date as node_up_to_date


@pytest.mark.parametrize("before", RENAMED_OVERRIDES)
def test_overrides_under_old_names_are_those_of_today(before):
    script = {"extractor": "evaluate", "sampler": "sample"}.get(before.partition("=")[0], "baselines")
    assert compose_config(script, [before]) == compose_config(script, [RENAMED_OVERRIDES[before]])


@pytest.mark.parametrize("before", ["genai.extractors.judge", "genai.evaluation.features.judge"])
def test_the_classifier_under_its_old_targets(before):
    node = {"extractor": {"_target_": before, "_partial_": True}}
    today = {"_target_": "genai.evaluation.features.classifier", "_partial_": True}
    assert node_up_to_date(node) == {"extractor": today}


def test_cards_of_before_have_the_protocol_of_today():
    protocol = {"extractor": {"kind": "Judge", "sha256": "1"}, "n": 100}
    card = up_to_date({"metric": "frechet", "value": 1.0, "protocol": protocol})
    assert card["protocol"] == {"extractor": {"kind": "Classifier", "sha256": "1"}, "n": 100}
