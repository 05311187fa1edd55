"""GPT-2's published weights under the names of this package."""

from collections.abc import Mapping

from torch import Tensor

TOP = {
    "wte.weight": "net.embed.weight",
    "wpe.weight": "net.transformer.position.table.weight",
    "ln_f.weight": "net.transformer.norm.weight",
    "ln_f.bias": "net.transformer.norm.bias",
}
PARTS = {
    "ln_1": "norm1",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.out",
}


def convert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of Hugging Face's GPT2LMHeadModel to that of a GPT built by `model=gpt2` with as many
    positions.

    Linear weights are stored transposed there; masks, and whatever is outside the decoder, are left out. Raises
    KeyError for a weight that GPT-2's blocks do not have.
    """
    out = {}
    for name, value in state.items():
        name = name.removeprefix("transformer.")
        if name in TOP:
            out[TOP[name]] = value
        elif name.startswith("h.") and not name.endswith((".attn.bias", ".attn.masked_bias")):
            layer, part = name[2:].split(".", 1)
            part, kind = part.rsplit(".", 1)
            linear = part.rpartition(".")[2].startswith("c_") and kind == "weight"
            out[f"net.transformer.blocks.{layer}.{PARTS[part]}.{kind}"] = value.T if linear else value
    return {**out, "net.head.weight": out["net.embed.weight"]}
