"""The base class of diffusion models: their data or latents, their conditions, and the training times they draw."""

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
"""Keyword arguments of a network: label, `states` and `real` of a caption's `Context`, and `projected`, the result of the
network's `project`."""


class Condition(NamedTuple):
    """The encoded conditions of one sampling call, and the null conditions from which guidance extrapolates.

    Both map keyword arguments of the network to tensors, encoded once per call by the model that will read them.
    """

    cond: Batch
    """The conditions of the n samples, (n, ...) each."""
    null: Batch
    """The null conditions or the negative caption, (n, ...), or (1, ...) for all samples; empty for an unconditional call."""


class Diffusion(KeepBufferPrecision):
    """A network that denoises one field of the batch along a path. Subclasses define the path and the training loss.

    Args:
        net: `net(x, time, label) -> out` with x and out (B, *shape), time (B,) in [0, 1000] and label int64 (B,), where
            the index `classes` is the learned null label; `speaker` is as `label`; an unconditional model calls
            `net(x, time)`. x and time are float32 or wider, whatever precision the network computes in. A network whose
            `net.text` is a TextEncoder is called with the encoded caption as `states=` and `real=`, see `Context`; one with
            a method `project` also gets its result as `projected=`.
        shape: shape of one sample, (C, H, W), (C, T) or (D,).
        field: name of the batch's tensor to model, scaled to [-1, 1] if `clip` is 1.
        classes: number of labels; None for a model without labels.
        label_dropout: probability of training a sample on the null label, speaker and caption, for classifier-free guidance.
        guidance: default weight of classifier-free guidance when sampling; 1 switches it off.
        clip: bound of |x0| while sampling; None for unbounded data.
        latent: latent space to work in instead of the field's own; `shape` is then the shape of its latents.
        speakers: number of speakers; None for a model without them.

    Raises UserError if label_dropout is not a probability, or if network, guidance or latent space do not fit the model.
    """

    path: Path
    objective: str | None = (
        "its loss weights noise levels for the look of samples, not by the variational bound; experiment=ddpm_digits_nll "
        "(model=ddpm_levels) trains for likelihood"
    )
    """The reason why the model's likelihood could be better, for cards; None if it is trained for likelihood."""
    predicts_data = False
    """True if the network may be a LevelPosterior, which predicts x0 at the times of a schedule."""

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
        speakers: int | None = None,
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
        self.latent, self.speakers = latent, speakers
        if self.conditional and not stored.is_building():
            self.check_guidance(guidance, "model.guidance")
        if latent is not None and latent.shape != self.shape:
            raise UserError(f"model.shape={list(shape)}, but the first stage's latents are {list(latent.shape)}")

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the training loss of a batch; see the subclass."""
        raise NotImplementedError

    def denoise(self, x: Tensor, t: float, cond: NetInputs | None = None) -> Prediction:
        """Predict x0 from x (B, *shape) at time t of the path.

        `cond` holds keyword arguments of the network as `net_inputs` makes them; None denoises unconditionally.
        """
        raise NotImplementedError

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"net": self.net}

    @property
    def device(self) -> torch.device:
        """The device of the network's weights."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a sampler's state: the network's own, but at least float32."""
        return torch.promote_types(next(self.net.parameters()).dtype, torch.float32)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one sample in the space of the data, even if the model works in latents."""
        return self.shape if self.latent is None else tuple(self.latent.codec.shape)  # type: ignore[arg-type]

    @property
    def conditional(self) -> bool:
        """True if the model has conditions."""
        return self.classes is not None or self.speakers is not None or self.text is not None

    @property
    def text(self) -> TextEncoder | None:
        """The network's caption encoder, or None."""
        return getattr(self.net, "text", None)

    @property
    def codec(self) -> nn.Module | None:
        """The frozen first stage of a latent model, or None. Its weights come from another checkpoint."""
        return None if self.latent is None else self.latent.codec

    def prepare(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Measure the scale of the latents from training data, see `Preparable`; returns no arguments to store.

        Raises UserError if captions have another length than the network reads, or if the data do not fit the first
        stage.
        """
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
        """Return x0 of a batch, (B, *shape), float32 or wider: the field itself, or its latents."""
        return upcast(batch[self.field] if self.latent is None else self.latent.encode(batch))

    def decode_data(self, x0: Tensor) -> Tensor:
        """Map x0 (B, *shape) back to the space of the data, (B, *data_shape)."""
        return x0 if self.latent is None else self.latent.decode(x0)

    def grey_levels(self, levels: int | None) -> int:
        """Return `levels` if a likelihood of the data is defined.

        Raises UserError if the model works in latents, or if the data have no grey levels (`levels` is None): a density
        of either is not a probability of the data.
        """
        if self.latent is not None:
            raise UserError(
                f"this {type(self).__name__} works in the latents of a first stage, whose density is not a likelihood of "
                f"{self.latent.field}: evaluate a model of the data itself"
            )
        if levels is None:
            raise UserError(
                f"a likelihood in bits needs data on grey levels, and {self.field} has none (data.levels): "
                "measure samples with metrics="
            )
        return levels

    def null(self) -> Batch:
        """Return the null value of each condition, shaped like one sample's: label `classes`, speaker `speakers`, no caption."""
        kinds = {"label": self.classes, "speaker": self.speakers}
        null = {name: torch.full((), n, device=self.device) for name, n in kinds.items() if n is not None}
        return null if self.text is None else {**null, "caption": self.text.null()}

    def null_conditions(self, n: int) -> Batch:
        """Return `null` expanded to n samples, (n, ...) each."""
        return {name: null.expand(n, *null.shape) for name, null in self.null().items()}

    def check_guidance(self, w: float, key: str) -> None:
        """Raise UserError if w is not 1 but training saw only conditional, or only unconditional samples.

        Guidance extrapolates from the unconditional prediction to the conditional one, so both must have been trained.
        """
        if w != 1 and not 0 < self.label_dropout < 1:
            raise UserError(
                f"{key}={w} extrapolates from the unconditional to the conditional prediction, and "
                f"model.label_dropout={self.label_dropout} trains only one of the two: give {key}=1, which switches guidance off"
            )

    def fill_conditions(self, cond: Batch | None, n: int) -> Batch:
        """Return the label, speaker and caption of n samples on the model's device, null where `cond` has none.

        Raises UserError unless each is int64 with one number, or one caption, per sample.
        """
        nulls = self.null_conditions(n)
        found = {name: c.to(self.device) for name, c in (cond or {}).items() if name in nulls}
        for name, c in found.items():
            if c.shape != nulls[name].shape or c.is_floating_point():
                kind, wanted = f"{str(c.dtype).removeprefix('torch.')} {list(c.shape)}", list(nulls[name].shape)
                raise UserError(f"{name} is {kind}, but {n} samples of this model take int64 {wanted}")
        return {**nulls, **found}

    def encode_conditions(self, cond: Batch | None, n: int) -> Condition:
        """Encode the conditions of a sampling call of n samples.

        Args:
            cond: label and speaker int64 (n,) and caption int64 (n, length), of which those that the model does not take are
                ignored, and `negative` int64 (n, length), the caption that samples are guided away from.

        Raises UserError for any other name, and as `fill_conditions` does.
        """
        cond, takes = cond or {}, [*self.null(), *(["negative"] if self.text is not None else [])]
        if unknown := set(cond) - {"label", "speaker", "caption", *takes}:
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
        """Return the network's keyword arguments for n samples, null where `cond` has none.

        Inputs that stay the same at every step of a sampler are computed here, once. Raises UserError as `fill_conditions`
        does.
        """
        return self.project_context(self.encode_caption(self.fill_conditions(cond, n)))

    def training_conditions(self, batch: Batch) -> Batch:
        """Return the network's keyword arguments for a batch, null where it has none.

        In training mode each sample is given the null conditions with probability `label_dropout`.
        """
        null = self.null()
        if not null:
            return {}
        n = len(next(iter(batch.values())))
        cond = {name: batch.get(name, value) for name, value in self.null_conditions(n).items()}
        if self.training:
            # All conditions of a sample are dropped together: guidance never sees one without the other.
            dropped = torch.rand(n, device=self.device) < self.label_dropout
            cond = {name: torch.where(dropped.view(-1, *[1] * (c.ndim - 1)), null[name], c) for name, c in cond.items()}
        return self.encode_caption(cond)

    def encode_caption(self, cond: Batch) -> Batch:
        """Replace the caption in `cond` by its encoder states; without a caption, return `cond` unchanged."""
        if self.text is None or "caption" not in cond:
            return cond
        return {name: c for name, c in cond.items() if name != "caption"} | self.text(cond["caption"])._asdict()

    def project_context(self, encoded: Batch) -> NetInputs:
        """Add the keys and values of cross-attention to the caption, if the network can precompute them."""
        project = getattr(self.net, "project", None)
        if self.text is None or project is None:
            return encoded
        return {**encoded, "projected": project(Context(encoded["states"], encoded["real"]))}

    def call_net(self, x: Tensor, time: float, cond: NetInputs | None) -> Tensor:
        """Run the network on x (B, *shape) at one time for the whole batch; unconditionally if `cond` is None."""
        cond = self.net_inputs(None, len(x)) if cond is None else cond
        x = upcast(x)
        return self.predict(x, x.new_full(x.shape[:1], time), **cond)

    def predict(self, x: Tensor, time: Tensor, **cond: object) -> Tensor:
        """Run the network on x (B, *shape) at time (B,) and return its output in the dtype of x.

        Raises UserError if the output has another shape, which a loss would broadcast silently.
        """
        return check_shape(self.net(x, time, **cond), x.shape[1:], "model.net").to(x.dtype)

    def uniforms(self, n: int) -> Tensor:
        """Draw stratified uniforms (n,) in [0, 1) for the times of a batch.

        Each is uniform, but one random offset places all of them evenly, so their mean varies far less than that of
        independent draws (Kingma et al. 2021, appendix I.1). In evaluation mode they are always the same.
        """
        u = torch.arange(n, device=self.device) / n  # evaluation takes the middles of n equal intervals
        return (u + torch.rand((), device=self.device) if self.training else u + 0.5 / n) % 1

    def losses(self, per_sample: Tensor, noise: Tensor) -> Losses:
        """Average per_sample (B,); evaluation also logs the mean per quarter of `noise` (B,) in [0, 1).

        `loss_q1` is the quarter with the least noise.
        """
        logs = {}
        if not self.training:
            each = per_sample.detach()
            # One matrix product instead of a boolean index, whose size the host would have to wait for.
            member = ((noise * 4).long() == torch.arange(4, device=each.device)[:, None]).to(each)  # (4, B)
            count = member.sum(1)
            with no_autocast(each.device):
                mean = member @ each / count.clamp_min(1)
            logs = {f"loss_q{i + 1}": (mean[i], count[i]) for i in range(4)}
        return Losses(per_sample.mean(), len(per_sample), logs)
