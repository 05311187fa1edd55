"""The first stage a model is trained over: named by path and checksum, then part of the run's own checkpoints."""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from genai import checkpoint
from genai.core import files
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.core.protocols import Batch, Codec
from genai.data.base import Data, Split
from genai.data.fingerprint import of_split, uncaptioned
from genai.data.stream import batches


def digest(content: dict) -> str:
    """SHA-256 of what decides what a checkpoint's model does: its config, as it was written, and its averaged weights."""
    sha = hashlib.sha256(json.dumps(content.get("written", content["config"])["model"], sort_keys=True).encode())
    for name, tensor in sorted({**content["model"], **content["ema"]}.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def adopt(
    cfg: DictConfig, data: Data, build: Callable[[Any], Any], trust: Sequence[str], resumed: bool
) -> dict[str, Tensor] | None:
    """Put the model config of codec.ckpt, its checksum and the shape of its latents into cfg; returns its weights.

    A run that is resumed has them in its own checkpoint: nothing is changed then, and None returned. Raises UserError if
    the file is no longer what it was, or no first stage for this data.
    """
    node = cfg.get("codec")
    if node is None:
        return None
    weights = content = None
    if node.ckpt is not None and not (resumed and not Path(node.ckpt).exists()):
        content, _ = checkpoint.locate(node.ckpt)
        found = digest(content)
        if node.sha256 not in (None, found):
            raise UserError(
                f"codec.ckpt={node.ckpt} has changed: its SHA-256 is {found[:16]}..., and codec.sha256 says "
                f"{node.sha256[:16]}...; latents of another first stage mean something else, so bring the old file back or "
                "train anew (codec.sha256=null)"
            )
        if not resumed:
            node.sha256, node.model = found, content["config"]["model"]
            weights = {**content["model"], **content["ema"]}
    if resumed:
        return None
    if content is None:
        model = build(OmegaConf.to_container(node.model, resolve=True))
    else:  # as it lies in the file: what the config makes of it is the same, once this has been built
        model = checkpoint.build_model(content["config"]["model"], content["model"], trust)
    if not isinstance(model, Codec) or model.vocabulary is not None:
        raise UserError(
            f"codec.ckpt={node.ckpt} is a {type(model).__name__}, which has no continuous latents: name an autoencoder, such "
            "as model=autoencoder trains"
        )
    if model.field != data.field or list(model.shape) != list(data.shape):
        raise UserError(
            f"codec.ckpt={node.ckpt} takes {model.field} of shape {list(model.shape)}, but this data is {data.field} of "
            f"shape {list(data.shape)}: choose the data= it was trained on, or another codec.ckpt"
        )
    node.shape = list(model.latent_shape)
    return weights


def fill(model: nn.Module, weights: dict[str, Tensor], ckpt: Any) -> None:
    """Give the model's first stage its weights. Raises UserError if it has none, or they do not fit."""
    codec = getattr(model, "codec", None)
    if codec is None:
        raise UserError(f"codec.ckpt={ckpt} was given, but this model has no first stage: choose model=latent")
    checkpoint.load_weights(codec, weights, Path(str(ckpt)))


class Cached:
    """A split that brings latents along which were computed once."""

    def __init__(self, split: Split, latents: np.ndarray):
        self.split, self.latents, self.augments = split, latents, split.augments
        self.uncaptioned = uncaptioned(split)

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        batch = self.split.batch(index, draws)
        return {**batch, "latent": torch.from_numpy(self.latents[index.numpy()])}

    def fingerprint(self, quick: bool) -> str:
        return of_split(self.split, quick)


def precompute(model: nn.Module, data: Data, cfg: DictConfig) -> None:
    """Let every split of data bring its latents along, from memory-mapped files in codec.cache, made where absent, on the
    device that the first stage is on.

    Their name holds checksums of the first stage and of all its images; a run that is resumed makes them in the user's own cache.
    Raises UserError where images are augmented.
    """
    codec: Any = model.codec
    held = chain(codec.parameters(), codec.buffers(), model.parameters())
    device = next((tensor.device for tensor in held), torch.device("cpu"))
    first_stage = json.dumps([cfg.codec.sha256, OmegaConf.to_container(cfg.codec.model, resolve=True)], sort_keys=True)
    for name, split in data.splits.items():
        images = uncaptioned(split)
        if images.augments:
            raise UserError(
                "codec.cache keeps one latent of each image, but this data augments images (data.flip, data.crop): turn "
                "that off, or set codec.cache=null"
            )
        key = hashlib.sha256((first_stage + of_split(images)).encode()).hexdigest()[:16]
        path = Path(cfg.codec.cache) / f"{key}_{name}.npy"
        if (
            cfg.get("resume") is not None and not path.exists()
        ):  # a file chose the folder, and it may be read but not written
            path = cache_folder("latents") / path.name
        if not path.exists():

            def save(file: BinaryIO, split: Split = split) -> None:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(split), *codec.latent_shape)}
                np.lib.format.write_array_header_2_0(file, header)
                for batch in batches(split, 256, None):
                    z = codec.encode(batch[data.field].to(device)).float()
                    file.write(z.contiguous().cpu().numpy().tobytes())

            files.write(path, save, hint="make room, or name another folder with codec.cache=")
            print(f"latents of {len(split)} {name} samples: {path}")
        data.splits[name] = Cached(split, np.load(path, mmap_mode="r"))
