"""The weights that a new run starts from with init_from=."""

from collections.abc import Collection
from typing import Any

import torch

from genai import checkpoint
from genai.train.resume import Modalities, check_same_modalities

SHOWN = 5  # layers that are named where weights are skipped


def load_initial_weights(
    model: torch.nn.Module, modalities: Modalities, config: dict[str, Any], own: Collection[Any] = ()
) -> None:
    """Load the averaged weights of the checkpoint that config names as `init_from` into a model, and print what was loaded.

    Args:
        modalities: of this run's data.
        own: origins of first stages, whose weights are loaded already; a frozen part from one of them keeps its weights.

    Raises:
        UserError: with init_strict, the shapes of weights or the modalities of the data differ.
    """
    content, path = checkpoint.locate(config["init_from"], "init_from")
    strict = config["init_strict"]
    if strict:
        check_same_modalities(content, path, *modalities, "or init_strict=false, if only the weights matter")
    frozen = tuple(
        f"{name}."
        for name, part in checkpoint.pretrained_modules(model)
        if part.pretrained_from.frozen and part.pretrained_from in own
    )
    state = {name: tensor for name, tensor in checkpoint.weights_of(content).items() if not name.startswith(frozen)}
    state |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith(frozen)}
    skipped = checkpoint.load_weights(model, state, path, strict)
    layers = dict.fromkeys(name.rpartition(".")[0] for name in skipped)
    named = ", ".join([*layers][:SHOWN]) + (f" and {len(layers) - SHOWN} others" if len(layers) > SHOWN else "")
    without = f" but for {len(skipped)} of {len(model.state_dict())} tensors, in {named}" if skipped else ""
    print(
        f"weights from the average in {path}{without}; also as there: {', '.join(_common_keys(content['config'], config))}"
    )


def _common_keys(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return the groups of keys in which two configs agree; where their data differ, the keys of data in which they agree."""
    groups = [
        key for key in ("model", "loop", "sampler") if _without_ckpt(theirs.get(key)) == _without_ckpt(ours.get(key))
    ]
    data = [key for key, value in ours["data"].items() if key != "_target_" and theirs["data"].get(key, ...) == value]
    return groups + (["data"] if theirs["data"] == ours["data"] else [f"data.{key}" for key in data])


def _without_ckpt(node: Any) -> Any:
    """Return a node without its `ckpt` keys, at any depth: from where weights were read is not part of an architecture."""
    return {k: _without_ckpt(v) for k, v in node.items() if k != "ckpt"} if isinstance(node, dict) else node
