"""What all diffusion models share: one field of the batch, its label as a condition, how times are spread."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genai.core import stored
from genai.core.errors import UserError
from genai.core.precision import KeepBufferPrecision, no_autocast, upcast
from genai.core.protocols import Batch, Losses, Prediction
from genai.core.shapes import check_shape
from genai.models.diffusion.nets.levels import LevelPosterior
from genai.models.diffusion.process.paths import Path
from genai.nn.attention import Context
from genai.nn.latent_space import Latent
from genai.nn.text_encoder import TextEncoder

NetInputs = Mapping[str, Any]
"""Keyword arguments of a network: a label, the `Context` of a caption, and what the network's `project` made of that."""


class Condition(NamedTuple):
    """What a model is told of n samples, as keyword arguments of its network, encoded once by that model for itself."""

    cond: Batch
    """Of n samples."""
    null: Batch
    """What guidance leads away from, of n samples or of one for all: nothing given, or the negative caption. Empty where nothing
    was given, so that there is nothing to lead to."""


class Diffusion(KeepBufferPrecision):
    """A network that denoises one field of the batch along a path; subclasses say which, and how they train.

    Args:
        net: `net(x, time, label) -> out`, x and out (B, *shape), time (B,) in [0, 1000], label int64 (B,) where the
            index `classes` is the learned null; an unconditional model calls `net(x, time)`. x and time are float32 or wider
            whatever the network computes in. One whose `net.text` is a TextEncoder is called `net(x, time, states=, real=)`
            with its Context of `caption` int64 (B, length); one with a method `project` gets what that made of it as
            `projected=` too.
        shape: of one sample, (C, H, W) or (D,).
        field: the batch's tensor to model, scaled to [-1, 1] if `clip` is 1.
        classes: number of labels, None for an unconditional model.
        label_dropout: probability of training a sample with the null label and caption, for classifier-free guidance.
        guidance: weight of classifier-free guidance when sampling, 1 for none.
        clip: bound of |x0| while sampling, None for unbounded data.
        latent: the space to work in instead of the field's own; `shape` is that of its latents.
    """

    path: Path
    objective: str | None = (
        "its loss weighs noise levels for the look of samples, not by the variational bound; experiment=ddpm_digits_nll "
        "(model=ddpm_levels) trains for likelihood"
    )
    """Why its likelihood is not the best it could have, None if it is trained for that."""
    predicts_data = False
    """Whether the network may predict x0 at the times of a schedule, as a LevelPosterior does."""

    def __init__(
        self,
        net: nn.Module,
        shape: Sequence[int],
        field: str = "image",
        classes: int | None = None,
        label_dropout: float = 0.1,
        guidance: float = 1.0,
        clip: float | None = 1.0,
        latent: Latent | None = None,
    ):
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise UserError(f"model.label_dropout={label_dropout} must be a probability between 0 and 1")
        if isinstance(net, LevelPosterior) and not self.predicts_data and not stored.is_building():
            raise UserError(
                f"a LevelPosterior (model.net) predicts the data of a DDPM, and this model is of type {type(self).__name__}: "
                "choose model=ddpm_levels, or another network"
            )
        self.net, self.shape, self.field = net, tuple(shape), field
        self.classes, self.label_dropout, self.guidance, self.clip = classes, label_dropout, guidance, clip
        self.latent = latent
        if (classes is not None or self.text is not None) and not stored.is_building():
            self.check_guidance(guidance, "model.guidance")
        if latent is not None and latent.shape != self.shape:
            raise UserError(f"model.shape={list(shape)}, but the first stage's latents are {list(latent.shape)}")

    def forward(self, batch: Batch, step: int) -> Losses:
        raise NotImplementedError

    def denoise(self, x: Tensor, t: float, cond: NetInputs | None = None) -> Prediction:
        """Predict x0 from x (B, *shape) at time t of the path, under `net_inputs`; unconditionally where cond is None."""
        raise NotImplementedError

    def nets(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of a sampler's state: that of the network, but never half."""
        return torch.promote_types(next(self.net.parameters()).dtype, torch.float32)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Of one sample as the data has it, whatever space the model works in."""
        return self.shape if self.latent is None else tuple(self.latent.codec.shape)  # type: ignore[arg-type]

    @property
    def text(self) -> TextEncoder | None:
        return getattr(self.net, "text", None)

    @property
    def codec(self) -> nn.Module | None:
        """The first stage, whose weights are somebody else's."""
        return None if self.latent is None else self.latent.codec

    def prepare(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Measure the scale of the latents, see `Prepared`. Raises UserError for captions of another length than the network
        reads, and for data that the first stage does not take."""
        first = next(stream := iter(batches))
        if self.text is not None and "caption" in first and first["caption"].shape[1] != self.text.length:
            raise UserError(
                f"model.net.text.length={self.text.length}, but captions have data.length={first['caption'].shape[1]} bytes: "
                "give both the same"
            )
        if self.latent is not None:
            self.latent.check(first, self.field)
            self.latent.measure(itertools.chain([first], stream))
        return {}

    def encode_data(self, batch: Batch) -> Tensor:
        """x0 of a batch, (B, *shape)."""
        return upcast(batch[self.field] if self.latent is None else self.latent.encode(batch))

    def decode_data(self, x0: Tensor) -> Tensor:
        """x0 as the field it is of."""
        return x0 if self.latent is None else self.latent.decode(x0)

    def grey_levels(self, levels: int | None) -> int:
        """levels, where what this model says of its data can be a probability. Raises UserError where it is none."""
        if self.latent is not None:
            raise UserError(
                f"this {type(self).__name__} works in the latents of a first stage: what it gives those is no likelihood of "
                f"{self.latent.field}; evaluate a model of the data itself"
            )
        if levels is None:
            raise UserError(
                f"a likelihood in bits needs data on grey levels, and {self.field} has none (data.levels): "
                "measure samples with metrics="
            )
        return levels

    def null(self) -> Batch:
        """The value, of the shape of one sample's, of each condition that means "not given"."""
        label = {} if self.classes is None else {"label": torch.full((), self.classes, device=self.device)}
        return label if self.text is None else {**label, "caption": self.text.null()}

    def null_conditions(self, n: int) -> Batch:
        """`null` of n samples."""
        return {name: null.expand(n, *null.shape) for name, null in self.null().items()}

    def check_guidance(self, w: float, key: str) -> None:
        """Raise UserError for a weight other than 1 where training saw only one of the two answers that guidance compares."""
        if w != 1 and not 0 < self.label_dropout < 1:
            raise UserError(
                f"{key}={w} leads from what the network says without its conditions to what it says with them, and "
                f"model.label_dropout={self.label_dropout} trains one of the two only: give {key}=1, which is none"
            )

    def fill_conditions(self, cond: Batch | None, n: int) -> Batch:
        """What of `cond` n samples are told, on the model's device, null where it is not given.

        Raises UserError for what is not one whole number, or one caption, for each of them.
        """
        nulls = self.null_conditions(n)
        found = {name: c.to(self.device) for name, c in (cond or {}).items() if name in nulls}
        for name, c in found.items():
            if c.shape != nulls[name].shape or c.is_floating_point():
                kind, wanted = f"{str(c.dtype).removeprefix('torch.')} {list(c.shape)}", list(nulls[name].shape)
                raise UserError(f"{name} is {kind}, but {n} samples of this model are told int64 {wanted}")
        return {**nulls, **found}

    def encode_conditions(self, cond: Batch | None, n: int) -> Condition:
        """What n samples are told, and `negative`, the caption that guidance leads away from; a label or a caption that the model
        does not take, as data come with, is left out.

        Raises UserError for any other name, and for what is not one whole number, or one caption, for each of them.
        """
        cond, takes = cond or {}, [*self.null(), *(["negative"] if self.text is not None else [])]
        if unknown := set(cond) - {"label", "caption", *takes}:
            raise UserError(
                f"cond has {', '.join(sorted(unknown))}, but this model takes {', '.join(takes) or 'no conditions'}"
            )
        given, null = self.fill_conditions(cond, n), self.null_conditions(1)
        if "negative" in cond:
            null["caption"] = self.fill_conditions({"caption": cond["negative"]}, n)["caption"]
        elif not cond.keys() & null.keys():
            null = {}
        return Condition(self.encode_caption(given), self.encode_caption(null))

    def net_inputs(self, cond: Batch | None, n: int) -> NetInputs:
        """The network's keyword arguments of n samples, null where `cond` says nothing; what is the same at
        every step is computed once for all to come."""
        return self.project_context(self.encode_caption(self.fill_conditions(cond, n)))

    def training_conditions(self, batch: Batch) -> Batch:
        """The network's keyword arguments; in training some samples get the null, as all do that come without."""
        null = self.null()
        if not null:
            return {}
        n = len(next(iter(batch.values())))
        cond = {name: batch.get(name, value) for name, value in self.null_conditions(n).items()}
        if self.training:
            dropped = torch.rand(n, device=self.device) < self.label_dropout
            cond = {name: torch.where(dropped.view(-1, *[1] * (c.ndim - 1)), null[name], c) for name, c in cond.items()}
        return self.encode_caption(cond)

    def encode_caption(self, cond: Batch) -> Batch:
        """Conditions with the caption as the network attends to it; as they are if that has been done."""
        if self.text is None or "caption" not in cond:
            return cond
        return {name: c for name, c in cond.items() if name != "caption"} | self.text(cond["caption"])._asdict()

    def project_context(self, encoded: Batch) -> NetInputs:
        """What the network is told, with the keys and values of its attention to a caption if it computes them beforehand."""
        project = getattr(self.net, "project", None)
        if self.text is None or project is None:
            return encoded
        return {**encoded, "projected": project(Context(encoded["states"], encoded["real"]))}

    def call_net(self, x: Tensor, time: float, cond: NetInputs | None) -> Tensor:
        """The network at one time for the whole batch, which it is told; null where cond is None."""
        cond = self.net_inputs(None, len(x)) if cond is None else cond
        x = upcast(x)
        return self.predict(x, x.new_full(x.shape[:1], time), **cond)

    def predict(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        """What the network answers to x (B, *shape), in the precision of x. Raises UserError for another shape, which a loss
        would broadcast."""
        return check_shape(self.net(x, time, **cond), x.shape[1:], "model.net").to(x.dtype)

    def uniforms(self, n: int) -> Tensor:
        """(n,) in [0, 1), spread evenly over the batch: each is uniform, their mean varies far less than that of
        independent draws (Kingma et al. 2021, appendix I.1). In evaluation always the same ones."""
        u = torch.arange(n, device=self.device) / n
        return (u + torch.rand((), device=self.device) if self.training else u + 0.5 / n) % 1

    def losses(self, per_sample: Tensor, noise: Tensor) -> Losses:
        """Their mean; evaluation adds the mean loss and count per quarter of `noise` in [0, 1), q1 the least."""
        logs = {}
        if not self.training:
            each = per_sample.detach()
            member = ((noise * 4).long() == torch.arange(4, device=each.device)[:, None]).to(each)  # (4, B)
            count = member.sum(1)
            with no_autocast(each.device):
                mean = member @ each / count.clamp_min(1)
            logs = {f"loss_q{i + 1}": (mean[i], count[i]) for i in range(4)}
        return Losses(per_sample.mean(), len(per_sample), logs)
