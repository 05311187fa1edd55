"""Likelihood of a checkpoint on a split its training did not touch."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genai import checkpoint
from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Reconstructing, Scorable
from genai.data.base import Data
from genai.data.stream import batches


def run(cfg: Any) -> dict[str, Any]:
    """`evaluate.py`: bits per dimension, or of a text nats per token and bits per character, with the protocol; printed
    as one JSON line and written beside the checkpoint."""
    trust = [cfg.trust] if isinstance(cfg.trust, str) else list(cfg.trust or [])
    device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU here: use device=cpu or auto")
    loaded = checkpoint.load(cfg.ckpt, cfg.weights, device, trust)
    if not isinstance(loaded.model, Scorable):
        raise UserError(f"{loaded.path} has no likelihood to evaluate: {type(loaded.model).__name__} has no log_prob")
    node = dict(loaded.config["data"])
    if cfg.root is not None:
        node["path" if "path" in node else "root"] = cfg.root
    data = checkpoint.build(node, trust)
    if data.assets().get("tokenizer") != loaded.assets.get("tokenizer"):
        raise UserError(
            f"the vocabulary of {loaded.path} is not that of its data now: give the text it was trained on with root="
        )
    if cfg.split not in data.splits:
        raise UserError(f"split={cfg.split} is none of {', '.join(data.splits)}")
    n = len(data.splits[cfg.split]) if cfg.n is None else min(at_least(cfg.n, 1, "n"), len(data.splits[cfg.split]))
    nats, decibels, targets, start = [], [], 0, time.monotonic()
    for batch in batches(data.splits[cfg.split], at_least(cfg.batch_size, 1, "batch_size"), n):
        batch = {name: value.to(device) for name, value in batch.items()}
        nats.append(-loaded.model.log_prob(batch, cfg.seed + sum(map(len, nats))).cpu())
        if isinstance(loaded.model, Reconstructing):
            decibels.append(psnr(loaded.model.reconstruct(batch), batch[loaded.model.field]).cpu())
        targets += int(batch["mask"][:, 1:].sum()) if "mask" in batch else 0
        done, seconds = sum(map(len, nats)), time.monotonic() - start
        print(f"\r{done}/{n}, {seconds / done * (n - done):.0f} s left ", end="", flush=True)
    each = torch.cat(nats).double()
    result = {
        **(_per_token(each, targets, data, cfg.split) if targets else _per_dimension(each, data, loaded.model)),
        **({"reconstruction_psnr_db": round(torch.cat(decibels).mean().item(), 2)} if decibels else {}),
        "bound": loaded.model.bound,
        "split": cfg.split,
        "n": n,
        "seed": cfg.seed,
        "weights": cfg.weights,
        "step": loaded.step,
        "checkpoint": str(loaded.path),
        "rng_version": rng.RNG_VERSION,
    }
    print("\r" + json.dumps(result))
    out = Path(loaded.path).with_suffix(f".{cfg.split}.json")
    out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of samples in [-1, 1], decibels (B,): 10 log10 of 2^2 over the mean squared error."""
    return -10 * (((x - y) ** 2).flatten(1).mean(1) / 4).log10()


def _per_dimension(nats: Tensor, data: Data, model: Any) -> dict[str, Any]:
    bits = nats / (math.prod(data.shape) * math.log(2))
    error = (bits.std() / math.sqrt(len(bits))).item()
    return {
        "bits_per_dim": round(bits.mean().item(), 4),
        "standard_error": round(error, 4),
        "nats": round(nats.mean().item(), 2),
        "levels": getattr(model, "levels", data.levels),  # a model of binary images counts two of grey ones
    }


def _per_token(nats: Tensor, targets: int, data: Any, split: str) -> dict[str, Any]:
    """Of a text: per token, and per character, which compares across tokenizers."""
    per_token, part = nats.sum().item() / targets, data.splits[split]
    characters = targets * part.characters / part.tokens
    return {
        "nats_per_token": round(per_token, 4),
        "perplexity": round(math.exp(per_token), 4),
        "bits_per_character": round(nats.sum().item() / math.log(2) / characters, 4),
        "tokens": targets,
        "context": part.length,
        "context_overlap": part.overlap,
        "vocabulary": data.levels,
    }
