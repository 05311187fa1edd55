"""Likelihood of a checkpoint on a split its training did not touch."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from genai import checkpoint
from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Scorable
from genai.data.stream import batches


def run(cfg: Any) -> dict[str, Any]:
    """`evaluate.py`: bits per dimension with its protocol, printed as one JSON line and written beside the checkpoint."""
    trust = [cfg.trust] if isinstance(cfg.trust, str) else list(cfg.trust or [])
    device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU here: use device=cpu or auto")
    loaded = checkpoint.load(cfg.ckpt, cfg.weights, device, trust)
    if not isinstance(loaded.model, Scorable):
        raise UserError(f"{loaded.path} has no likelihood to evaluate: {type(loaded.model).__name__} has no log_prob")
    data = checkpoint.build({**loaded.config["data"], **({"root": cfg.root} if cfg.root else {})}, trust)
    if cfg.split not in data.splits:
        raise UserError(f"split={cfg.split} is none of {', '.join(data.splits)}")
    n = len(data.splits[cfg.split]) if cfg.n is None else min(at_least(cfg.n, 1, "n"), len(data.splits[cfg.split]))
    nats, start = [], time.monotonic()
    for batch in batches(data.splits[cfg.split], at_least(cfg.batch_size, 1, "batch_size"), n):
        batch = {name: value.to(device) for name, value in batch.items()}
        nats.append(-loaded.model.log_prob(batch, cfg.seed + sum(map(len, nats))).cpu())
        done, seconds = sum(map(len, nats)), time.monotonic() - start
        print(f"\r{done}/{n}, {seconds / done * (n - done):.0f} s left ", end="", flush=True)
    bits = torch.cat(nats).double() / (math.prod(data.shape) * math.log(2))
    result = {
        "bits_per_dim": round(bits.mean().item(), 4),
        "standard_error": round((bits.std() / math.sqrt(n)).item(), 4),
        "bound": loaded.model.bound,
        "split": cfg.split,
        "n": n,
        "levels": data.levels,
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
