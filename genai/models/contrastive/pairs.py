"""Contrastive learning of pairs of media (CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021)."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, number
from genai.core.protocols import Batch, Losses, batch_losses

MAX_SCALE = 100.0  # 1 / temperature, section 2.5 of the paper


class Contrastive(nn.Module):
    """Encoders of two or more media, trained so that the embeddings of one item agree more than those of different items.

    Each pair of media is classified in both directions: which item of the batch is this one's other half? The logits are cosine
    similarities over a learned temperature. Where items of a batch have the same `label`, all of them are right answers with the
    same probability, for a one-hot target would punish true pairs (Khosla et al., "Supervised Contrastive Learning", 2020).

    Args:
        encoders: by medium, x (B, ...) of the batch's `field` -> features (B, `features`), with these two attributes; None
            leaves a medium out. Optional: `null()`, and `check(x, key)`, which refuses data of another form.
        dim: of the embeddings.
        temperature: its first value; 1 / temperature is at most 100.

    Raises UserError for fewer than two media, and arguments out of range.
    """

    def __init__(self, encoders: Mapping[str, nn.Module | None], dim: int = 64, temperature: float = 0.07):
        super().__init__()
        nets: dict[str, Any] = {name: net for name, net in encoders.items() if net is not None}
        if len(nets) < 2:
            raise UserError(f"model.encoders has {' and '.join(nets) or 'none'}: give at least two encoders")
        first = number(temperature, "model.temperature", 1 / MAX_SCALE, 100)
        self.encoders = nn.ModuleDict(nets)
        self.project = nn.ModuleDict({name: nn.Linear(net.features, dim, bias=False) for name, net in nets.items()})
        self.log_scale = nn.Parameter(torch.tensor(-math.log(first)))

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {f"encoder_{name}": net for name, net in self.encoders.items()}

    def null(self) -> Batch:
        """Return the null conditions of the encoders that have some, such as the empty caption."""
        return {net.field: net.null() for net in self.encoders.values() if hasattr(net, "null")}  # type: ignore[operator,misc]

    def prepare(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Check the first batch, see `Preparable`; measures nothing.

        Raises UserError for data that lack a medium, whose encoder would learn nothing, or have another form than an encoder,
        and for batches of one item.
        """
        batch = next(iter(batches))
        for name, net in self.encoders.items():
            if net.field not in batch:
                raise UserError(
                    f"this model embeds {name}, and this data has no {net.field}: set model.encoders.{name}=null, or choose "
                    "data of all media, such as data=digits_media"
                )
            if hasattr(net, "check"):
                net.check(batch[net.field], f"model.encoders.{name}")  # type: ignore[operator,index]
        if len(next(iter(batch.values()))) < 2:
            raise UserError("data.batch_size=1 leaves no other item to tell one from: give at least 2")
        return {}

    def scale(self) -> Tensor:
        """Return 1 / temperature, at most 100, a scalar."""
        return self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()

    def embed_media(self, batch: Batch) -> dict[str, Tensor]:
        """Return the embeddings (B, dim) of length 1 of each medium whose field the batch has, float32."""
        found = {}
        for name, net in self.encoders.items():
            if net.field in batch:
                features = net(batch[net.field])  # type: ignore[index]
                found[name] = F.normalize(self.project[name](features).float(), dim=1)
        return found

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean loss of all pairs of media in both directions, in nats; logs that of each, and 1 / temperature."""
        found = self.embed_media(batch)
        if len(found) < 2:
            fields = ", ".join(net.field for net in self.encoders.values())  # type: ignore[misc]
            raise UserError(
                f"a Contrastive learns from pairs of {fields}, and this data has {', '.join(batch)}: choose other data"
            )
        n = len(next(iter(found.values())))
        label = batch.get("label", torch.arange(n, device=self.log_scale.device))
        same = (label[:, None] == label).float()
        target = same / same.sum(1, keepdim=True)
        scale, losses = self.scale(), {}
        for one, other in itertools.combinations(found, 2):
            logits = scale * found[one] @ found[other].T
            losses[f"{one}_{other}"] = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return batch_losses(torch.stack([*losses.values()]).mean(), {"scale": scale, **losses}, n)
