"""What a checkpoint keeps of modalities, as plain values, and what older ones that kept none mean."""

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
    """Target and state of a modality."""
    return _node(type(modality), modality.state())


def nodes_of(output: Modality, conditions: Mapping[str, Modality]) -> Node:
    """`modalities` of a checkpoint: of what a model makes, and of each condition that it is told."""
    return {"output": node_of(output), "conditions": {name: node_of(m) for name, m in conditions.items()}}


def modality_of_field(field: str) -> Modality:
    """Of data that do not say: images under their usual name, else numbers."""
    return (Image if field == "image" else Vector)(field)


def legacy_nodes(assets: Node, config: Node, null: Batch) -> Node:
    """`modalities` of a checkpoint that kept none: what its `assets`, its config and its model's null conditions meant."""
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
    """What meant something else in `modalities` of a checkpoint, in words: the first that both know with another state."""
    told = ((node, conditions[name]) for name, node in stored["conditions"].items() if name in conditions)
    pairs = (stored["output"], output), *told
    return next((modality.meaning for node, modality in pairs if node["state"] != modality.state()), None)


def _node(kind: type[Modality], state: Any) -> Node:
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", "state": state}
