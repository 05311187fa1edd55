"""The nouns of the house. Families implement them, the loop above and the tools beside it know nothing else."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from genai.core.errors import UserError

Batch = dict[str, Tensor]
"""Named tensors, first dimension B: `image`, `vector`, `label`, `tokens`, `audio`, `mask`, ..."""

PAD = 256
"""What follows the bytes of a `caption` in a Batch, int64 (B, length)."""

OnStep = Callable[[int, int, Batch], None]
"""`on_step(i, n, state)` after step i of n of a sampler: progress bars, streaming, films of the denoising path. One with an
attribute `counts_only` that is true looks at no state, and may hear of a batch's last step alone."""


class Losses(NamedTuple):
    """What a Model returns for one micro-batch."""

    total: Tensor
    """Differentiable mean over `weight` targets."""
    weight: Tensor | float
    """How many targets `total` averages; the loop divides by the sum over micro-batches and ranks."""
    logs: Mapping[str, tuple[Tensor, Tensor | float]] = {}
    """Detached name -> (mean, weight); a mean over nothing is (0, 0)."""


def batch_losses(total: Tensor, logs: Mapping[str, Tensor], n: int) -> Losses:
    """Losses and logs that are means over n samples."""
    return Losses(total, float(n), {name: (value.detach(), float(n)) for name, value in logs.items()})


class Model(Protocol):
    """An nn.Module whose `forward(batch, step) -> Losses` is its loss."""

    def forward(self, batch: Batch, step: int) -> Losses: ...

    def nets(self) -> Mapping[str, nn.Module]:
        """What `compile=true` compiles, by name."""
        ...


@runtime_checkable
class Preparable(Protocol):
    """A Model that looks at training data before step 0, on the device it trains on."""

    def prepare(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Measure what training needs to know of the data, from at most a few thousand samples in no order.

        Returns the constructor arguments that were measured, by name, for the stored config to say them; what is a buffer is
        part of the weights anyway. Raises UserError for data that the model cannot learn.
        """
        ...


@runtime_checkable
class AdversarialModel(Protocol):
    """Two players, a generator and a discriminator, each with a loss and parameters of its own."""

    share_fake: bool
    """The generator's update sees the fakes of the discriminator's last one; else it makes its own."""
    images_per_step: int
    """Samples of one update on all devices, known from the first step on, for what counts those."""

    def generate(self, batch: Batch, step: int) -> Batch:
        """Fakes, as many as the batch has samples, and what the losses need to know of them."""
        ...

    def discriminator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Of fakes without a gradient; regularisers are left out in evaluation mode."""
        ...

    def generator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses: ...

    def generator_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """By the model's names for them."""
        ...

    def discriminator_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...


@runtime_checkable
class Scorable(Protocol):
    """A model with a likelihood. `bound` says what log_prob is: "exact" or "lower bound".

    A model that was trained for something else may say so in `objective`: where it is less likely than trivial models, a card
    gives that as the reason.
    """

    bound: str

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Nats per sample (B,) of the discretised data."""
        ...


@runtime_checkable
class Reconstructor(Protocol):
    """A model that compresses: `reconstruct` gives back one field of a batch, in [-1, 1], as well as it can."""

    field: str

    def reconstruct(self, batch: Batch) -> Tensor: ...


@runtime_checkable
class Codec(Reconstructor, Protocol):
    """A first stage: one field of a batch to latents and back, without randomness."""

    shape: tuple[int, ...]
    """Of one sample of that field."""
    latent_shape: tuple[int, ...]
    """Of the latents of one sample."""
    vocabulary: int | None
    """How many token ids the latents are, int64; None for continuous ones."""

    def encode(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, *latent_shape)."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """(B, *latent_shape) -> (B, *shape)."""
        ...


@runtime_checkable
class Autoregressive(Protocol):
    """A model that gives each token of a sample its distribution given those before it, which is all `generate` asks of it:

        state = model.start(cond, B, total, pad)
        logits = model.next(prompt, state)  # int64 (B, T) -> (B, vocab_size)
        logits = model.next(token, state)  # int64 (B, 1) -> (B, vocab_size), and so on

    A state is the model's own (a cache of keys and values, queues, the state of a cell): nothing else looks into it, and
    several of one model are independent of each other.
    """

    vocab_size: int
    """Ids 0 to vocab_size - 1 can be written."""
    length: int
    """Tokens of the model's context as trained, and of a sample where nobody says how many."""
    first: int
    """The id that is read where there is no prompt; from vocab_size on it is one that is never written."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of an nn.Module: the first says on which device it is, and in which precision it computes."""
        ...

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> Any:
        """The state of `batch` samples before their first token.

        Args:
            cond: conditions (batch, ...) by name, on the model's device; None for none. What depends on them alone, such as
                the keys and values of a cross-attention, is computed here, once a sample.
            total: tokens of a sample that `next` will be given, at most.
            pad: (batch,) how many tokens on the left of each prompt are padding, fewer than it has; None for none. A sample
                continues as if they were not there.
        """
        ...

    def next(self, tokens: Tensor, state: Any) -> Tensor:
        """Read tokens int64 (B, T) after those read before -> logits float32 (B, vocab_size) of the token after them.

        The first call reads the prompt with its padding, each later one a single token. Changes the state in place.
        """
        ...


@runtime_checkable
class Rewindable(Autoregressive, Protocol):
    """An Autoregressive model that can take back tokens it has read, as speculative decoding asks of model and draft."""

    def start(
        self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None, rewinds: bool = False
    ) -> Any:
        """With `rewinds` a state that takes several tokens in any call, for `scores` and `rewind` too. Raises UserError where
        the model cannot read `total` tokens so."""
        ...

    def scores(self, tokens: Tensor, state: Any) -> Tensor:
        """As `next`, but logits float32 (B, T, vocab_size) of the token after each one of `tokens`."""
        ...

    def rewind(self, state: Any, n: int) -> None:
        """Forget the n tokens read last, which are not all."""
        ...


@runtime_checkable
class Capturable(Autoregressive, Protocol):
    """An Autoregressive model whose step can be one CUDA graph."""

    def fix(self, state: Any) -> bool:
        """Once the prompt is read: from here on `next` runs the same operations on the same memory whatever the position and
        never waits for the device. False where this state cannot do so."""
        ...


class Prediction(NamedTuple):
    """A denoiser's answer in parts, so that one fused pass can finish it: x0 = p x + q (u + w (out - u))."""

    out: Tensor
    out_uncond: Tensor | None = None
    w: float = 1.0
    p: float = 0.0
    q: float = 1.0

    def x0(self, x: Tensor, clip: float | None = None) -> Tensor:
        """Combine guidance, convert to x0 and clip to [-clip, clip]; x is the state the prediction was made at."""
        out = self.out if self.out_uncond is None else self.out_uncond.lerp(self.out, self.w)
        x0 = self.p * x + self.q * out
        return x0 if clip is None else x0.clamp(-clip, clip)


class Denoiser(Protocol):
    """`(x, t) -> Prediction`; t is the one time of the whole batch. What it is told is bound to it before the first step."""

    def __call__(self, x: Tensor, t: float, /) -> Prediction: ...


class Sampler(Protocol):
    """`(model, seeds, cond, on_step) -> Batch`; sample i depends on seeds[i] alone. See `for_models`."""

    def __call__(
        self, model: nn.Module, seeds: Tensor, cond: Batch | None = None, on_step: OnStep | None = None
    ) -> Batch: ...


Called = TypeVar("Called", bound=Callable)


def for_models(*kinds: type, **parts: type) -> Callable[[Called], Called]:
    """Mark a sampler, or a likelihood, with the models it is for: classes, or protocols that can be checked at run time; `parts`
    are arguments of its own that are models of other checkpoints.

    The marks are the attributes `model_types` and `model_parts`, of a function or of a class of callables; without the first it
    is for any model.
    """

    def mark(function: Called) -> Called:
        function.model_types, function.model_parts = kinds, parts  # type: ignore[attr-defined]
        return function

    return mark


def model_parts(sampler: Callable) -> Mapping[str, type]:
    """The arguments of a sampler that are models of other checkpoints, with what they must be."""
    while isinstance(sampler, functools.partial):
        sampler = sampler.func
    return getattr(sampler, "model_parts", {})


def check_sampler(sampler: Callable, model: nn.Module, key: str = "sampler") -> None:
    """Raises UserError where a sampler is marked `for_models` of which this is none; `key` is what chose it."""
    function, parts = sampler, {}
    while isinstance(function, functools.partial):
        function, parts = function.func, {**function.keywords, **parts}
    kinds = getattr(function, "model_types", ())
    if kinds and not isinstance(model, kinds):
        named = parts.get("solver", function)
        named = getattr(named, "func", named)
        name = getattr(named, "__name__", type(named).__name__)
        wanted = " or ".join(f"{'an' if k.__name__[0] in 'AEIO' else 'a'} {k.__name__}" for k in kinds)
        raise UserError(
            f"the {key} {name} is for {wanted}, and this model is a {type(model).__name__}: choose another with {key}="
        )


def with_items(sampler: Callable, items: Callable[[str, Tensor], Tensor]) -> Callable:
    """A sampler that starts from items of the data gets them: `items(split, index)`."""
    takes = "items" in inspect.signature(sampler).parameters
    return functools.partial(sampler, items=items) if takes else sampler
