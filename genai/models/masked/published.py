"""BERT's published weights under the names of this package."""

from collections.abc import Mapping

import torch
from torch import Tensor

TOP = {
    "bert.embeddings.LayerNorm": "transformer.norm",
    "cls.predictions.transform.dense": "transform.linear",
    "cls.predictions.transform.LayerNorm": "transform.norm",
}
PARTS = {
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.out",
    "output.LayerNorm": "norm2",
}


def convert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of Hugging Face's BertForMaskedLM to that of the network of `model=bert_base` with as many ids.

    The vector of segment A is added to every position, as a text without a second segment has it. Raises KeyError for a weight
    that BERT's layers do not have.
    """
    layers = len({name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")})
    out = {}
    for kind in ("weight", "bias"):
        for theirs, ours in TOP.items():
            if f"{theirs}.{kind}" in state:
                out[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
        for i in range(layers):
            layer, block = f"bert.encoder.layer.{i}", f"transformer.blocks.{i}"
            qkv = [state[f"{layer}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            out[f"{block}.attention.qkv.{kind}"] = torch.cat(qkv)
            out |= {f"{block}.{ours}.{kind}": state[f"{layer}.{theirs}.{kind}"] for theirs, ours in PARTS.items()}
    embeddings = "bert.embeddings.{}_embeddings.weight"
    out["embed.weight"] = out["head.weight"] = state[embeddings.format("word")]
    segment = state[embeddings.format("token_type")][0]
    out["transformer.position.table.weight"] = state[embeddings.format("position")] + segment
    return {**out, "head.bias": state["cls.predictions.bias"]}
