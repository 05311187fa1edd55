"""Text, images and sound as one sequence of tokens: any medium given any other, by one causal Transformer."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, number
from genai.core.protocols import PAD, Batch, Losses, OnStep, for_models
from genai.models.autoregressive.decode import generate
from genai.nn.cache import Cache
from genai.nn.latent_space import LatentTokens
from genai.nn.transformer import Transformer
from genai.nn.words import Bytes


class MediaTransformer(nn.Module):
    """A causal Transformer over all media of an item, one after the other, in every order: any medium given any others.

    Each medium begins with an id that names it, so that a prefix says what is given and what is to be drawn. The ids of different
    media do not overlap, and only those of a medium are predicted in it. Media are left out at random, for classifier-free
    guidance (Ho and Salimans 2022), and so that one alone says enough.

    Row i of a training batch of step s has order (i + s) modulo the number of orders. The loss of a medium is the mean over its
    own tokens, whose number differs by orders of magnitude; the total is the mean of these means, with `weights`.

    Args:
        media: the tokens of each medium by name: `Bytes`, or `LatentTokens` of a frozen codec; None leaves one out.
        transformer: causal, of any position embedding that has no limit, such as rotary ones.
        weights: of the media's losses by name; None weighs them equally.
        perturb: by medium, modules that change its data (B, ...) in training, such as `genai.nn.perturb.Perturb`.
        label_dropout: probability of hiding a medium from those that follow it in training.
        guidance: default weight of guidance when sampling; 1 switches it off.
        init: `init(model)` sets the first weights; None keeps torch's.

    Raises UserError for fewer than two media, an unknown name, a network that is not causal, and arguments out of range.
    """

    def __init__(
        self,
        media: Mapping[str, LatentTokens | Bytes | None],
        transformer: Transformer,
        weights: Mapping[str, float] | None = None,
        perturb: Mapping[str, nn.Module] | None = None,
        label_dropout: float = 0.2,
        guidance: float = 1.0,
        init: Callable[[nn.Module], None] | None = None,
    ):
        super().__init__()
        media = {name: medium for name, medium in media.items() if medium is not None}
        if len(media) < 2:
            raise UserError(f"model.media has {' and '.join(media) or 'none'}: give at least two media")
        for key, named in ("weights", weights), ("perturb", perturb):
            if unknown := [name for name, value in (named or {}).items() if value is not None and name not in media]:
                raise UserError(f"model.{key}.{unknown[0]} must be one of {', '.join(media)}, or null")
        if not all(block.attention.causal for block in transformer.blocks):  # type: ignore[union-attr]
            raise UserError("a MediaTransformer needs model.transformer.attention.causal=true: set it so")
        self.media, self.transformer = nn.ModuleDict(media), transformer
        self.perturb = nn.ModuleDict({name: net for name, net in (perturb or {}).items() if net is not None})
        self.orders = list(itertools.permutations(media))
        shares = {name: w for name, w in (weights or {}).items() if w is not None}
        given = {name: number(shares.get(name, 1.0), f"model.weights.{name}", 0) for name in media}
        if not (total := sum(given.values())):
            raise UserError("model.weights are all 0: give at least one medium a weight above 0")
        self.weights = {name: weight / total for name, weight in given.items()}
        self.label_dropout = number(label_dropout, "model.label_dropout", 0, 1)
        if self.label_dropout == 1:
            raise UserError("model.label_dropout=1 hides all media, so that nothing is learned: give less than 1")
        self.guidance = self.check_guidance(guidance, "model.guidance")
        sizes = {name: medium.vocab_size for name, medium in media.items()}
        starts = itertools.accumulate(sizes.values(), initial=0)
        self.offsets = dict(zip(media, starts, strict=False))
        """The first id of each medium."""
        self.codes = sum(sizes.values())
        self.hidden = self.codes + len(media)
        """The id in place of a token that is not shown."""
        self.embed = nn.Embedding(self.hidden + 1, transformer.width)
        self.places = nn.ModuleDict(
            {name: nn.Embedding(medium.shape[0] + 1, transformer.width) for name, medium in media.items()}
        )
        self.head = nn.Linear(transformer.width, self.codes, bias=False)
        if init is not None:
            init(self)

    @property
    def codec(self) -> nn.ModuleList:
        """The frozen first stages, whose weights come from other checkpoints."""
        return nn.ModuleList(m.codec for m in self.media.values() if isinstance(m, LatentTokens))

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"transformer": self.transformer}

    def null(self) -> Batch:
        """Return the null conditions of captions, int64 (length,), if the model has text."""
        texts = (medium for medium in self.media.values() if isinstance(medium, Bytes))
        return {text.field: torch.full(text.shape, PAD) for text in texts}

    def check_guidance(self, w: float, key: str) -> float:
        """Return the weight. Raises UserError for one other than 1 of a model never trained without a medium."""
        if number(w, key, 0) != 1 and not self.label_dropout:
            raise UserError(
                f"{key}={w} needs a model that was trained with and without the given medium, and this has "
                f"model.label_dropout={self.label_dropout}: give {key}=1, which switches guidance off"
            )
        return w

    def prepare(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Check the first batch, see `Preparable`; measures nothing.

        Raises UserError for data that lack a medium, or have another form than its first stage.
        """
        batch = next(iter(batches))
        for name, medium in self.media.items():
            if medium.field not in batch:
                raise UserError(
                    f"this model learns {name}, and this data has no {medium.field}: choose data of all media, such as "
                    "data=digits_trio"
                )
            medium.check(batch, medium.field)  # type: ignore[operator]
        return {}

    def begin(self, medium: str) -> int:
        """Return the id that names a medium."""
        return self.codes + list(self.media).index(medium)

    def sequence(self, medium: str, tokens: Tensor) -> Tensor:
        """Return the ids int64 (B, 1 + T) of a medium's own tokens int64 (B, T), after the one that names it."""
        return F.pad(tokens + self.offsets[medium], (1, 0), value=self.begin(medium))

    def embedding(self, medium: str, ids: Tensor, at: Tensor) -> Tensor:
        """Embed ids int64 (B, T) of a medium at places int64 (T,) -> (B, T, width)."""
        return self.embed(ids) + self.places[medium](at)

    def logits(self, x: Tensor, target: str) -> Tensor:
        """Map the Transformer's output (B, T, width) to logits (B, T, vocabulary) of a medium's own tokens."""
        first = self.offsets[target]
        weight = self.head.weight[first : first + self.media[target].vocab_size]  # type: ignore[operator,arg-type]
        return F.linear(x, weight).float()

    def tokens(self, medium: str, batch: Batch) -> Tensor:
        """Return a medium's own tokens int64 (B, T) of a batch, in training mode changed by its `perturb`."""
        part: Any = self.media[medium]
        if self.training and medium in self.perturb:
            batch = {part.field: self.perturb[medium](batch[part.field])}
        return part.encode(batch)

    def nats(self, orders: Sequence[Sequence[str]], batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return of each medium -ln p (B, T) of its tokens given those before it, and which of them count, bool (B, T).

        Row i has the media of orders[i % len(orders)]. Of a caption's padding only the first counts, and of media that are hidden
        in training nothing.
        """
        tokens = {name: self.tokens(name, batch) for name in self.media}
        n, device = len(next(iter(tokens.values()))), self.embed.weight.device
        visible, inputs = {}, {}
        for name, own in tokens.items():
            share = self.label_dropout if self.training else 0.0
            visible[name] = torch.rand(n, 1, device=device) >= share
            ids = self.sequence(name, own)
            at = torch.arange(ids.shape[1], device=device)
            inputs[name] = self.embedding(name, torch.where(visible[name], ids, self.hidden), at)
        groups = [torch.arange(k, n, len(orders), device=device) for k in range(min(len(orders), n))]
        used = orders[: len(groups)]
        x = torch.cat([torch.cat([inputs[m][i] for m in order], 1) for order, i in zip(used, groups, strict=True)])
        outputs: dict[str, list[Tensor]] = {name: [] for name in tokens}
        for order, rows in zip(used, self.transformer(x).split([len(i) for i in groups]), strict=True):
            for name, part in zip(order, rows.split([inputs[m].shape[1] for m in order], 1), strict=True):
                outputs[name].append(part[:, :-1])
        nats, real, back = {}, {}, torch.cat(groups).argsort()
        for name, own in tokens.items():
            logits = self.logits(torch.cat(outputs[name])[back], name)
            real[name] = visible[name].expand_as(own)
            if isinstance(self.media[name], Bytes):
                real[name] = real[name] & F.pad(own[:, :-1] != PAD, (1, 0), value=True)
            nats[name] = F.cross_entropy(logits.mT, own, reduction="none") * real[name]
        return nats, real

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the weighted mean of the media's losses; logs each, and that of each given one other, in nats per token."""
        shift = step % len(self.orders) if self.training else 0
        orders = self.orders[shift:] + self.orders[:shift]
        nats, real = self.nats(orders, batch)
        logs: dict[str, tuple[Tensor, Tensor | float]] = {}
        total = torch.zeros((), device=self.embed.weight.device)
        order = torch.arange(len(next(iter(nats.values()))), device=total.device) % len(orders)
        for name in self.media:
            visible, mean = real[name].any(1), nats[name].sum(1) / real[name].sum(1).clamp_min(1)
            total = total + self.weights[name] * mean.sum() / visible.sum().clamp_min(1)
            logs[name] = _mean(mean, visible)
            for source in (other for other in self.media if other != name):  # in an order that all ranks share
                rows = [order == k for k, names in enumerate(orders) if names[:2] == (source, name)]
                logs[f"{source}_to_{name}"] = _mean(mean, visible & torch.stack(rows).any(0))
        return Losses(total, float(len(order)), logs)

    def direction(self, source: str | None, target: str) -> "Direction":
        """Return p(target | source), or p(target) for None, as an Autoregressive model.

        Raises UserError for an unknown medium, or the same twice.
        """
        for key, name in ("source", source), ("to", target):
            if name is not None and name not in self.media:
                raise UserError(f"{key}={name} must be one of {', '.join(self.media)}")
        if source == target:
            others = " or ".join(name for name in self.media if name != target)
            raise UserError(
                f"prompt= gives {source}, and to={target} asks for the same: give to={others}, or a prompt= of another medium"
            )
        return Direction(self, source, target)


def _mean(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the detached mean of x (B,) over some rows, bool (B,), and their number; (0, 0) over none."""
    count = rows.sum()
    return ((x * rows).sum() / count.clamp_min(1)).detach(), count


@dataclasses.dataclass
class State:
    """The decoding state of a Direction."""

    cache: Cache
    """Keys and values of B sequences, or of 2 B with guidance, whose second half is visible no source."""
    guidance: Tensor | None
    """(B, 1), the weight of each sample; None without guidance."""
    at: Tensor
    """int64 (1,), the number of the target's ids read, on the device."""


class Direction:
    """One medium given another, of a MediaTransformer, as an `Autoregressive` model of the target's own tokens.

    Conditions: `source` int64 (B, T), the source's own tokens, and `guidance` float (B,), the weight of each sample.

    Args:
        model: whose direction it is.
        source, target: names of media; without a source the target is drawn without one.
    """

    def __init__(self, model: MediaTransformer, source: str | None, target: str):
        self.model, self.source, self.target = model, source, target
        part: Any = model.media[target]
        self.vocab_size, self.length = int(part.vocab_size), int(part.shape[0])
        self.first = self.vocab_size

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the model."""
        return self.model.parameters()

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> State:
        """Return the state of `batch` samples that have read their sources, see `Autoregressive.start`."""
        model, given = self.model, cond or {}
        device = model.embed.weight.device
        name = self.source or next(other for other in model.media if other != self.target)
        n: int = model.media[name].shape[0]  # type: ignore[index,assignment]
        nothing = torch.full((batch, n + 1), model.hidden, device=device)
        prefix, weight = [model.sequence(name, given["source"]) if self.source else nothing], given.get("guidance")
        if weight is not None:
            prefix.append(nothing)
        ids = torch.cat(prefix)
        cache = Cache(model.transformer, len(ids), n + 1 + total, n + 1 + total)
        model.transformer(model.embedding(name, ids, torch.arange(n + 1, device=device)), cache)
        at = torch.zeros(1, dtype=torch.int64, device=device)
        return State(cache, None if weight is None else weight[:, None], at)

    def next(self, tokens: Tensor, state: State) -> Tensor:
        """Read tokens int64 (B, T), the first the id `first` -> logits float32 (B, vocab_size) of the token after them.

        With guidance they are those without a source plus the weight times the difference to those with it.
        """
        model, target = self.model, self.target
        ids = torch.where(tokens == self.first, model.begin(target), tokens + model.offsets[target])
        ids = ids if state.guidance is None else ids.repeat(2, 1)
        at = state.at + torch.arange(tokens.shape[1], device=tokens.device)
        state.at.add_(tokens.shape[1])
        x = model.transformer(model.embedding(target, ids, at), state.cache)
        logits = model.logits(x[:, -1:], target)[:, 0]
        if state.guidance is None:
            return logits
        given, null = logits.chunk(2)
        return torch.lerp(null, given, state.guidance)

    def fix(self, state: State) -> bool:
        """Make every later step the same work, for a CUDA graph."""
        state.cache.fix()
        return True


@for_models(MediaTransformer)
@torch.inference_mode()
def sample(
    model: MediaTransformer,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    to: str = "image",
    guidance: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    cuda_graph: bool | None = None,
) -> Batch:
    """Draw samples of a medium given another, token by token, see `generate`.

    Args:
        cond: the source, under the field of its medium; none draws samples without a source.
        to: name of the medium to draw.
        guidance: weight of classifier-free guidance; None is the model's, 1 for none.

    Returns the field of the medium, with its `tokens` int64 (B, T) and `log_prob` (B, T) as `generate` has it. Raises UserError
    for an argument out of range, an unknown medium, and the medium of the source.
    """
    weight = model.check_guidance(model.guidance if guidance is None else guidance, "guidance")
    given, device = cond or {}, model.embed.weight.device
    source = next((name for name, medium in model.media.items() if medium.field in given), None)
    direction, conditions = model.direction(source, to), {}
    if source is not None:
        field: Any = model.media[source].field
        conditions["source"] = model.tokens(source, {field: given[field].to(device)})
        if weight != 1:
            conditions["guidance"] = torch.full((len(seeds),), float(weight))
    made = generate(
        direction, seeds, conditions, on_step, None, temperature, top_k, top_p, min_p, cuda_graph=cuda_graph
    )
    part: Any = model.media[to]
    x = part.decode(made["tokens"])
    x = x.clamp(-1, 1) if x.is_floating_point() else x
    return {part.field: x, "tokens": made["tokens"], "log_prob": made["log_prob"]}
