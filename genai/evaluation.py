"""How good a checkpoint is on a split its training did not touch: its likelihood, and what it gives back of the data."""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from genai import cards, checkpoint
from genai.checkpoint import Loaded
from genai.core import rng
from genai.core.errors import UserError, at_least
from genai.core.protocols import Batch, Reconstructing, Scorable, check_sampler
from genai.data.base import Data
from genai.data.stream import batches
from genai.metrics import likelihood
from genai.metrics.images import psnr

Score = Callable[[Batch, int], Tensor]


def run(cfg: Any) -> dict[str, Any]:
    """`evaluate.py`: bits per dimension, of a text nats per token and bits per character, and what a first stage gives back,
    with the protocol; printed as one JSON line and written beside the checkpoint."""
    trust = [cfg.trust] if isinstance(cfg.trust, str) else list(cfg.trust or [])
    device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU here: use device=cpu or auto")
    loaded = checkpoint.load(cfg.ckpt, cfg.weights, device, trust)
    method = None if cfg.get("likelihood") is None else OmegaConf.to_container(cfg.likelihood)
    data = _data(loaded, cfg.root, cfg.split)
    if cfg.metrics is not None:
        if method is not None:
            raise UserError("likelihood= and metrics= are two evaluations: give one of them at a time")
        return {
            "cards": cards.run(loaded, data, list(cfg.metrics), cfg.split, cfg.n, cfg.repeats, cfg.seed, cfg.batch_size)
        }
    score, facts = _score(loaded, data, method), {}
    n = len(data.splits[cfg.split]) if cfg.n is None else min(at_least(cfg.n, 1, "n"), len(data.splits[cfg.split]))
    codes = torch.zeros(getattr(loaded.model, "vocabulary", None) or 0, dtype=torch.int64)
    nats, decibels, targets, done, start = [], [], 0, 0, time.monotonic()
    for batch in batches(data.splits[cfg.split], at_least(cfg.batch_size, 1, "batch_size"), n):
        batch = {name: value.to(device) for name, value in batch.items()}
        if score is not None:
            nats.append(-score(batch, cfg.seed + done).cpu())
        if isinstance(loaded.model, Reconstructing):
            decibels.append(psnr(loaded.model.reconstruct(batch), batch[loaded.model.field]).cpu())
        if len(codes):
            codes += loaded.model.encode(batch[data.field]).flatten().bincount(minlength=len(codes)).cpu()  # type: ignore
        targets += int(batch["mask"][:, 1:].sum()) if "mask" in batch else 0
        done += len(next(iter(batch.values())))
        if sys.stdout.isatty():
            print(f"\r{done}/{n}, {(time.monotonic() - start) / done * (n - done):.0f} s left ", end="", flush=True)
    if nats:
        facts = _likelihood(torch.cat(nats).double(), targets, data, cfg.split, loaded.model)
        facts["bound"] = loaded.model.bound if method is None else "lower bound up to the error of the ODE's solver"
        facts |= {} if method is None else {"likelihood": method}
        given = list(loaded.model.null()) if hasattr(loaded.model, "null") else []  # type: ignore[operator]
        facts |= {"given": given} if given else {}
    if decibels:
        facts["reconstruction_psnr_db"] = round(torch.cat(decibels).mean().item(), 2)
    facts |= _codes(codes, n) if len(codes) else {}
    facts |= {"split": cfg.split, "n": n, "seed": cfg.seed, "weights": cfg.weights, "step": loaded.step}
    result = {**facts, "checkpoint": str(loaded.path), "rng_version": rng.RNG_VERSION}
    print("\r" * sys.stdout.isatty() + json.dumps(result))
    kind = cfg.split if method is None else f"{cfg.split}.{method['_target_'].rpartition('.')[2]}"  # type: ignore[index]
    Path(loaded.path).with_suffix(f".{kind}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _data(loaded: Loaded, root: str | None, split: str) -> Data:
    """The data the checkpoint was trained on, from `root` if that is given."""
    node = dict(loaded.config["data"])
    if root is not None:
        node["path" if "path" in node else "root"] = root
    data = checkpoint.build(node, loaded.trust)
    if data.assets().get("tokenizer") != loaded.assets.get("tokenizer"):
        raise UserError(
            f"the vocabulary of {loaded.path} is not that of its data now: give the text it was trained on with root="
        )
    if split not in data.splits:
        raise UserError(f"split={split} is none of {', '.join(data.splits)}")
    return data


def _score(loaded: Loaded, data: Data, method: Any) -> Score | None:
    """`score(batch, seed)` -> ln p (B,), the model's own or by `method`; None for a model that only reconstructs.

    Raises UserError if there is nothing to evaluate.
    """
    if method is not None:
        function = checkpoint.build(method)
        check_sampler(function, loaded.model, "likelihood")
        return functools.partial(function, loaded.model, levels=data.levels)
    if isinstance(loaded.model, Scorable):
        return loaded.model.log_prob
    if isinstance(loaded.model, Reconstructing):
        return None
    flows = hasattr(loaded.model, "denoise") and loaded.model.codec is None  # a diffusion model of the data itself
    hint = "choose likelihood=probability_flow" if flows else "measure its samples with metrics=[frechet,recall]"
    raise UserError(
        f"{loaded.path} has no likelihood of its own: {type(loaded.model).__name__} has no log_prob; {hint}"
    )


def _likelihood(nats: Tensor, targets: int, data: Any, split: str, model: Any) -> dict[str, Any]:
    """In the unit of the data's kind; a model of binary images counts two values of grey ones."""
    if not targets:
        return likelihood.per_dimension(nats, math.prod(data.shape), getattr(model, "levels", data.values))
    part = data.splits[split]
    window = {"context": part.length, "context_overlap": part.overlap, "vocabulary": data.levels}
    return likelihood.per_token(nats, targets, targets * part.characters / part.tokens) | window


def _codes(counts: Tensor, n: int) -> dict[str, Any]:
    """What the token ids of n samples are worth: code perplexity, and bits of a sample if each costs its entropy."""
    perplexity, tokens = likelihood.perplexity(counts), int(counts.sum()) // n
    bits = {"bits_per_sample": round(tokens * math.log2(perplexity), 1), "tokens_per_sample": tokens}
    return {"code_perplexity": round(perplexity, 1), "codes": len(counts), **bits}
