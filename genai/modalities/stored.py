"""Modalities in checkpoints: as plain values, and derived from the config for old checkpoints that have none."""

from collections.abc import Mapping
from typing import Any

from genai.core.protocols import Batch
from genai.modalities.base import Modality
from genai.modalities.caption import Caption
from genai.modalities.image import Image
from genai.modalities.label import Label
from genai.modalities.pixels import Pixels
from genai.modalities.text import Text
from genai.modalities.vector import Vector

Node = dict[str, Any]


def node_of(modality: Modality) -> Node:
    """Return a modality as {"_target_": ..., "state": ...}."""
    return _node(type(modality), modality.state())


def nodes_of(output: Modality, conditions: Mapping[str, Modality]) -> Node:
    """Return the entry `modalities` of a checkpoint: of the model's output, and of each of its conditions by name."""
    return {"output": node_of(output), "conditions": {name: node_of(m) for name, m in conditions.items()}}


def modality_of_field(field: str) -> Modality:
    """Return the modality of data that define none: an image if the field is "image", else a vector."""
    return (Image if field == "image" else Vector)(field)


def legacy_nodes(assets: Node, config: Node, null: Batch) -> Node:
    """Return the entry `modalities` for a checkpoint of format 1 or 2, from its `assets`, config and null conditions."""
    conditions: dict[str, Modality] = {}
    if "caption" in null:
        conditions["caption"] = Caption(len(null["caption"]))
    if (classes := config["model"].get("classes")) is not None:
        conditions["label"] = Label(classes, assets.get("class_names"))
    older = nodes_of(modality_of_field(config["data"].get("field", "image")), conditions)
    if "tokenizer" in assets:
        older["output"] = _node(Text, {"tokenizer": assets["tokenizer"]})
    elif "pixels" in assets:
        older["output"] = _node(Pixels, assets["pixels"])
    return older


def difference(stored: Node, output: Modality, conditions: Mapping[str, Modality]) -> str | None:
    """Return what differs between `modalities` of a checkpoint and those of a data set, in words; None if nothing does.

    Only conditions that both have are compared.
    """
    shared = ((node, conditions[name]) for name, node in stored["conditions"].items() if name in conditions)
    pairs = (stored["output"], output), *shared
    return next((modality.meaning for node, modality in pairs if node["state"] != modality.state()), None)


def _node(kind: type[Modality], state: object) -> Node:
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", "state": state}
