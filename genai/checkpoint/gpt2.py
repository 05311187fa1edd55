"""GPT-2's published layout: its files, and its weights under the names of this package."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai.core.errors import UserError

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
SIZES = {
    "n_positions": "data.shape[0]",
    "vocab_size": "data.levels",
    "n_embd": "model.net.transformer.width",
    "n_layer": "model.net.transformer.layers",
    "n_head": "model.net.transformer.attention.heads",
}
"""Sizes in a config.json, and the keys of `model=gpt2` that they are."""
FACTS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Values that other keys of a config.json must have, where it has them, for the model to be one of `model=gpt2`."""


def read(folder: str | Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Read a folder with config.json and model.safetensors or pytorch_model.bin, as Hugging Face publishes a GPT-2.

    Returns the values of `model=gpt2` by key, see `SIZES`, and the state of a GPT built with them. Nothing is downloaded.

    Raises UserError if a file is missing or damaged, or the model differs from GPT-2 in more than its sizes.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the folder of a published GPT-2") from None
    if not isinstance(config, dict) or not all(type(config.get(name)) is int for name in SIZES):
        raise UserError(f"{path} does not say {', '.join(SIZES)}: name the folder of a published GPT-2")
    for name, allowed in {**FACTS, "n_inner": (None, 4 * config["n_embd"])}.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(f"{path} says {name}={config[name]!r}, and a GPT-2 has {allowed[0]!r}: it is another model")
    weights = _weights(Path(folder))
    try:
        return {key: config[name] for name, key in SIZES.items()}, convert_names(weights)
    except KeyError as error:
        raise UserError(f"the weights in {folder} are not those of a GPT-2, because of {error.args[0]}") from None


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by the names of its file, on the CPU."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise UserError(f"{safe} needs the package safetensors: pip install safetensors") from error
        try:
            return load_file(safe)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{safe} cannot be read ({error}): fetch it again") from None
    if not pickled.is_file():
        raise UserError(f"{folder} has neither {safe.name} nor {pickled.name}: name the folder of a published GPT-2")
    try:
        return torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{pickled} cannot be read ({str(error).splitlines()[0]}): fetch it again") from None


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
