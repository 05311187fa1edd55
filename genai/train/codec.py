"""Latents of a frozen first stage, computed once and cached on disk."""

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from genai import progress
from genai.core import files
from genai.core.cache import cache_folder
from genai.core.errors import UserError
from genai.core.protocols import Batch
from genai.data.base import Data, Split
from genai.data.fingerprint import split_checksum, without_captions
from genai.data.stream import batches


class CachedLatents:
    """A split that adds precomputed latents to each batch, as `latent` (B, *latent_shape)."""

    def __init__(self, split: Split, latents: np.ndarray):
        self.split, self.latents, self.augments = split, latents, split.augments
        self.without_captions = without_captions(split)

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, index: Tensor, draws: Tensor | None) -> Batch:
        """Return the batch of the items `index` int64 (B,), with their latents."""
        batch = self.split.batch(index, draws)
        return {**batch, "latent": torch.from_numpy(self.latents[index.numpy()])}

    def fingerprint(self, quick: bool) -> str:
        """Return the checksum of the underlying split."""
        return split_checksum(self.split, quick)


def precompute(model: nn.Module, data: Data, cfg: DictConfig) -> None:
    """Replace every split of data by one with cached latents, which are computed where they are missing.

    The files lie in codec.cache, named by checksums of first stage and images, and are memory-mapped; they are computed
    on the device of the first stage. A resumed run writes missing ones to the user's own cache instead. Raises
    UserError if images are augmented, since there is one latent per image.
    """
    codec: Any = model.codec
    tensors = chain(codec.parameters(), codec.buffers(), model.parameters())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    first_stage = json.dumps([cfg.codec.sha256, OmegaConf.to_container(cfg.codec.model, resolve=True)], sort_keys=True)
    for name, split in data.splits.items():
        images = without_captions(split)
        if images.augments:
            raise UserError(
                "codec.cache keeps one latent of each image, but this data augments images (data.flip, data.crop): turn "
                "that off, or set codec.cache=null"
            )
        key = hashlib.sha256((first_stage + split_checksum(images)).encode()).hexdigest()[:16]
        path = Path(cfg.codec.cache) / f"{key}_{name}.npy"
        if cfg.get("resume") is not None and not path.exists():
            # A stored config chose this folder, which may be somebody else's: read it, but do not write to it.
            path = cache_folder("latents") / path.name
        if not path.exists():

            def save(file: BinaryIO, split: Split = split, what: str = f"encoding {name}") -> None:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(split), *codec.latent_shape)}
                np.lib.format.write_array_header_2_0(file, header)
                parts = batches(split, 256, None)
                for batch in progress.track(parts, what, len(split), "samples", lambda batch: len(batch[data.field])):
                    z = codec.encode(batch[data.field].to(device)).float()
                    file.write(z.contiguous().cpu().numpy().tobytes())

            files.write(path, save, hint="make room, or name another folder with codec.cache=")
            print(f"latents of {len(split)} {name} samples: {path}")
        data.splits[name] = CachedLatents(split, np.load(path, mmap_mode="r"))
