"""Training speed of a VAE of MLPs.

    pip install -e .[bench]
    python -m benchmarks.vae [--rounds 30] [--window 50] [--root ../shared/data]

Compares `train.py` with a hand-written loop and with pythae's trainer. The model is model=vae_binary on 28x28 images with the
MLPs of pythae, 784-512-16 and back with ReLUs, in batches of 64. All systems train a copy of the same encoder and decoder on
the same images and take turns, a window of steps each, as in benchmarks/loop.py.

`train.py` runs with everything it has: its stream of batches, averaging, clipping, the check for non-finite values, seeding and
metrics.csv; it draws new binary images at each step. The plain loop trains the same module with the same loss, draws its
batches by hand and has nothing but fused Adam. pythae's trainer runs its `train_step`, an epoch of as many batches as the
window has steps, with its own data set, DataLoader, progress bar and `VAE` with `reconstruction_loss="bce"`; its targets are
the grey levels, so it draws nothing. It neither evaluates nor saves a model. Its AdamW is the one that `optimizer_cls="AdamW"`
makes; a second row has the fused one, as ours is. Images are those of MNIST below --root, or random ones of that shape.
Targets: 1.4 times pythae's samples/s, 0.9 of the plain loop's.
"""

import argparse
import contextlib
import copy
import logging
import math
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import loop
from benchmarks.common import installed, parse, ratio, report, setup, spread
from genai.data.base import Arrays
from genai.modalities.image import from_uint8
from genai.train.lit import LitModel

LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 0.01
SHAPE = (
    "model.latents=16",
    *(f"model.{net}.width=512" for net in ("encoder", "decoder")),
    *(f"model.{net}._target_={__spec__.name if __spec__ else __name__}.{net}" for net in ("encoder", "decoder")),
)


def encoder(shape: list[int], latents: int, width: int, layers: int, dropout: float) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, 2 * latents))


def decoder(shape: list[int], latents: int, outputs: int, width: int, layers: int, dropout: float) -> nn.Module:
    last = nn.Linear(width, math.prod(shape))
    return nn.Sequential(nn.Linear(latents, width), nn.ReLU(), last, nn.Unflatten(1, (outputs * shape[0], *shape[1:])))


class Plain:
    """The loop one writes by hand: a permutation of images in memory, the module's loss, fused Adam."""

    def __init__(self, lit: LitModel):
        self.model, self.device, self.batch = copy.deepcopy(lit.model), lit.device, lit.data.batch_size
        self.images = train_split(lit).values
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LR, betas=BETAS, fused=True)

    def train(self, steps: int) -> None:
        order = torch.randperm(len(self.images))
        for step in range(steps):
            at = order[step * self.batch : (step + 1) * self.batch]
            loss = self.model({"image": from_uint8(self.images[at]).to(self.device)}, step).total
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Pythae:
    """pythae's trainer and VAE around copies of our encoder and decoder."""

    def __init__(self, lit: LitModel, **optimizer: Any):
        from pythae.data.datasets import BaseDataset
        from pythae.models import VAE, VAEConfig
        from pythae.trainers import BaseTrainer, BaseTrainerConfig

        split, self.batch, self.dataset = train_split(lit), lit.data.batch_size, BaseDataset
        self.images, self.labels = split.values / 255, split.labels
        encoder, decoder = networks(lit.model)
        config = VAEConfig(input_dim=lit.model.shape, latent_dim=lit.model.latents, reconstruction_loss="bce")
        self.folder = tempfile.TemporaryDirectory()
        settings = BaseTrainerConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=self.batch,
            learning_rate=LR,
            optimizer_cls="AdamW",
            optimizer_params={"betas": BETAS, "weight_decay": WEIGHT_DECAY, **optimizer},
        )
        self.trainer = BaseTrainer(VAE(config, encoder, decoder), self.data(1), training_config=settings)
        self.trainer.prepare_training()

    def data(self, steps: int) -> Any:
        n = steps * self.batch
        return self.dataset(self.images[:n], self.labels[:n])

    def train(self, steps: int) -> None:
        self.trainer.train_loader = self.trainer.get_train_dataloader(self.data(steps))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bar
            self.trainer.train_step(1)
            self.trainer.callback_handler.on_epoch_end(self.trainer.training_config)


def networks(model: Any) -> tuple[Any, Any]:
    """Copies of the model's encoder and decoder, which return the outputs that pythae expects."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model.encoder)

        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_variance = self.net(x).chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(model.decoder)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    return Encoder(), Decoder()


def train_split(lit: LitModel) -> Arrays:
    split = lit.data.splits["train"]
    assert isinstance(split, Arrays)
    return split


class Turns(loop.Turns):
    peers: ClassVar = {"plain loop": Plain}
    if installed("pythae"):
        peers |= {"pythae": Pythae, "pythae, fused": partial(Pythae, fused=True)}


def random_images(root: str) -> None:
    """Write random images in MNIST's file format and shape below `root`."""
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0).integers
    for part, n in (("train", 20_000), ("t10k", 1_000)):
        for kind, array in (("images-idx3", draw(256, size=(n, 28, 28))), ("labels-idx1", draw(10, size=n))):
            head = np.array([0x0800 + array.ndim, *array.shape], ">i4")
            (raw / f"{part}-{kind}-ubyte").write_bytes(head.tobytes() + array.astype(np.uint8).tobytes())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--root", default="../shared/data", help="folder that holds MNIST/raw")
    return parse(parser, rounds=2, window=2)


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    device, batch = setup(), 64
    with tempfile.TemporaryDirectory() as folder:
        found = (Path(args.root) / "MNIST" / "raw").exists()
        if not found:
            random_images(folder)
        seconds = loop.trained(
            Turns,
            args.rounds,
            args.window,
            "model=vae_binary",
            "logger=none",
            f"data.batch_size={batch}",
            f"data.root={args.root if found else folder}",
            *SHAPE,
            f"optim.lr={LR}",
            f"optim.betas=[{BETAS[0]},{BETAS[1]}]",
            f"optim.weight_decay={WEIGHT_DECAY}",
        )
    rows = [
        {
            "system": "train.py" if name == "ours" else name,
            "ms/step": spread(times, 1e3, 2),
            "samples/s": round(batch / statistics.median(times)),
            "speedup of genai": ratio(times, seconds["ours"]),
        }
        for name, times in seconds.items()
    ]
    facts = {"data": "MNIST" if found else "random 28x28", "batch": batch}
    report("vae", args, device, rows, **facts, rounds=args.rounds, window=args.window)


if __name__ == "__main__":
    main()
