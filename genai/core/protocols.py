"""The protocols that families of models implement; loops, samplers and evaluation depend on nothing else of a model."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from genai.core.errors import UserError

Batch = dict[str, Tensor]
"""Named tensors, first dimension B: `image`, `vector`, `label`, `tokens`, `audio`, `mask`, ..."""

PAD = 256
"""The id that pads a `caption`, int64 (B, length), after its bytes (0 to 255)."""

SPECIALS = "[MASK]", "[CLS]", "[SEP]", "[PAD]"
"""Names of the last ids of a vocabulary with `data.specials=true`, in their order; those before are the text's own."""

OnStep = Callable[[int, int, Batch], None]
"""`on_step(i, n, state)` is called after step i of n of a sampler, for progress bars, streaming or films. If its attribute
`counts_only` is true it does not read the state, and may be called for the last step of a batch only."""


class Ending(NamedTuple):
    """The end of a text that is written token by token, as far as it is written."""

    over: bool
    """True if the text is over, whatever is written after these tokens."""
    tokens: int
    """The tokens that it needs."""
    characters: int
    """Its length; the last of its tokens may hold more."""


Stop = Callable[[list[int]], Ending]
"""`stop(ids)` tells where a sample that begins with these ids ends."""


class Losses(NamedTuple):
    """The loss of one micro-batch, with its weight and what it logs."""

    total: Tensor
    """Differentiable mean over `weight` targets, a scalar."""
    weight: Tensor | float
    """How many targets `total` averages; the loop divides by the sum over micro-batches and ranks."""
    logs: Mapping[str, tuple[Tensor, Tensor | float]] = {}
    """Detached name -> (mean, weight); a mean over nothing is (0, 0)."""


def batch_losses(total: Tensor, logs: Mapping[str, Tensor], n: int) -> Losses:
    """Return Losses whose total and logs are means over n samples."""
    return Losses(total, float(n), {name: (value.detach(), float(n)) for name, value in logs.items()})


class Model(Protocol):
    """An nn.Module whose `forward(batch, step) -> Losses` is its loss."""

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the loss of a batch; step is the number of the current update."""
        ...

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        ...


@runtime_checkable
class Preparable(Protocol):
    """A Model that measures training data before step 0, on the device it trains on."""

    def prepare(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Measure what training needs to know of the data, from at most a few thousand samples in no particular order.

        Returns the constructor arguments that were measured, by name, for the stored config; buffers are part of the
        weights anyway. Raises UserError for data that the model cannot learn.
        """
        ...


@runtime_checkable
class AdversarialModel(Protocol):
    """A generator and a discriminator, each with a loss and parameters of its own."""

    share_fake: bool
    """True if the generator's update reuses the fakes of the discriminator's last one; else it makes its own."""
    images_per_step: int
    """Real samples per update over all devices; the loop sets it before the first step."""

    def generate(self, batch: Batch, step: int) -> Batch:
        """Generate one fake per sample of the batch; returns them with further tensors that the losses need."""
        ...

    def discriminator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return the discriminator's loss on fakes without gradients; in evaluation mode without penalties."""
        ...

    def generator_loss(self, batch: Batch, fake: Batch, step: int) -> Losses:
        """Return the generator's loss on fakes whose gradients reach the generator."""
        ...

    def generator_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the generator's parameters with their names in the model."""
        ...

    def discriminator_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the discriminator's parameters with their names in the model."""
        ...


@runtime_checkable
class Scorable(Protocol):
    """A model with a likelihood. `bound` tells what log_prob returns: "exact" or "lower bound".

    A model trained for something else may give the reason in `objective`; a card repeats it where the model is less
    likely than trivial models.
    """

    bound: str

    def log_prob(self, batch: Batch, seed: int) -> Tensor:
        """Return the log-likelihood of each sample of the discretised data in nats, (B,)."""
        ...


@runtime_checkable
class Infiller(Protocol):
    """A model, or a baseline, that names hidden elements of an item given the others."""

    def score_hidden(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln p (B, T) in nats of each `hidden` element, bool (B, T), given those that are not hidden, and whether it is
        the most probable, bool (B, T); 0 and False elsewhere."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """A model that maps several media into one space, in which those of one item are near each other."""

    def embed_media(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the embeddings (B, D), of length 1, of each medium that the batch has, by its name."""
        ...


@runtime_checkable
class Reconstructor(Protocol):
    """A model that compresses: it encodes and decodes one field of a batch, in [-1, 1]."""

    field: str

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return batch[field] (B, *shape) as the model reconstructs it."""
        ...


@runtime_checkable
class Codec(Reconstructor, Protocol):
    """A first stage: maps one field of a batch to latents and back, without randomness."""

    shape: tuple[int, ...]
    """Shape of one sample of that field."""
    latent_shape: tuple[int, ...]
    """Shape of the latents of one sample."""
    vocabulary: int | None
    """Number of token ids if the latents are tokens, int64; None for continuous latents."""

    def encode(self, x: Tensor) -> Tensor:
        """Map x (B, *shape) to latents (B, *latent_shape)."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (B, *latent_shape) to x (B, *shape)."""
        ...


@runtime_checkable
class Autoregressive(Protocol):
    """A model of each token's distribution given those before it, as `generate` calls it:

        state = model.start(cond, B, total, pad)
        logits = model.next(prompt, state)  # int64 (B, T) -> (B, vocab_size)
        logits = model.next(token, state)  # int64 (B, 1) -> (B, vocab_size), and so on

    A state belongs to the model (a key-value cache, queues, the state of a cell): nothing else reads it, and several
    states of one model are independent of each other.
    """

    vocab_size: int
    """Ids 0 to vocab_size - 1 can be generated."""
    length: int
    """Context length in training, and the default number of tokens of a sample."""
    first: int
    """The id that stands in for an empty prompt; one from vocab_size on is never generated."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters, as nn.Module does: the first tells the device and precision of the model."""
        ...

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> Any:
        """Return the state of `batch` samples before their first token.

        Args:
            cond: conditions (batch, ...) by name, on the model's device; None for none. What depends on them alone,
                such as the keys and values of cross-attention, is computed here, once per sample.
            total: tokens of a sample that `next` will be given, at most.
            pad: int64 (batch,), how many tokens on the left of each prompt are padding, fewer than it has; None for
                none. A sample continues as if they were not there.
        """
        ...

    def next(self, tokens: Tensor, state: Any) -> Tensor:
        """Read tokens int64 (B, T) after those read before -> logits float32 (B, vocab_size) of the token after them.

        The first call reads the prompt with its padding, each later one a single token. Changes the state in place.
        """
        ...


@runtime_checkable
class Rewindable(Autoregressive, Protocol):
    """An Autoregressive model that can forget tokens it has read, as speculative decoding needs of model and draft."""

    def start(
        self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None, rewinds: bool = False
    ) -> Any:
        """Return a state as `Autoregressive.start` does; with `rewinds` one for `scores` and `rewind` too.

        Such a state takes several tokens in any call. Raises UserError if the model cannot read `total` tokens that
        way.
        """
        ...

    def scores(self, tokens: Tensor, state: Any) -> Tensor:
        """Read tokens int64 (B, T) as `next` does -> logits float32 (B, T, vocab_size) of the token after each."""
        ...

    def rewind(self, state: Any, n: int) -> None:
        """Forget the n tokens read last, which must not be all."""
        ...


@runtime_checkable
class Reorderable(Autoregressive, Protocol):
    """An Autoregressive model whose samples can branch, as beam search needs."""

    def reorder(self, state: Any, index: Tensor) -> None:
        """Let row i of a state go on from what row index[i], int64 (batch,), has read; both have the same conditions and
        padding. Changes the state in place."""
        ...


@runtime_checkable
class Capturable(Autoregressive, Protocol):
    """An Autoregressive model whose step can be captured as a CUDA graph."""

    def fix(self, state: Any) -> bool:
        """Fix the state after the prompt, for a CUDA graph; returns False if this state cannot be.

        From here on `next` runs the same operations on the same memory whatever the position, and never waits for the
        device.
        """
        ...


class Prediction(NamedTuple):
    """A denoiser's output (B, ...) in parts, so that one fused pass can finish it: x0 = p x + q (u + w (out - u))."""

    out: Tensor
    out_uncond: Tensor | None = None
    w: float = 1.0
    p: float = 0.0
    q: float = 1.0

    def x0(self, x: Tensor, clip: float | None = None) -> Tensor:
        """Return x0 (B, ...), guided, converted and clipped to [-clip, clip]; x is the state of the prediction."""
        out = self.out if self.out_uncond is None else self.out_uncond.lerp(self.out, self.w)
        x0 = self.p * x + self.q * out
        return x0 if clip is None else x0.clamp(-clip, clip)


class Denoiser(Protocol):
    """A function `(x, t) -> Prediction` with one time t for the whole batch; its conditions are bound to it
    beforehand."""

    def __call__(self, x: Tensor, t: float, /) -> Prediction: ...


class Sampler(Protocol):
    """A function `(model, seeds, cond, on_step) -> Batch` whose sample i depends on seeds[i] alone. See
    `for_models`."""

    def __call__(
        self, model: nn.Module, seeds: Tensor, cond: Batch | None = None, on_step: OnStep | None = None
    ) -> Batch: ...


Called = TypeVar("Called", bound=Callable)


def for_models(*kinds: type, **parts: type) -> Callable[[Called], Called]:
    """Mark a sampler, or a likelihood, with the types of models that it takes: classes, or runtime-checkable protocols.

    `parts` names those of its arguments that are models of other checkpoints. The marks are the attributes
    `model_types` and `model_parts` of a function, or of a class of callables; without the first it is for any model.
    """

    def mark(function: Called) -> Called:
        function.model_types, function.model_parts = kinds, parts  # type: ignore[attr-defined]
        return function

    return mark


def model_parts(sampler: Callable) -> Mapping[str, type]:
    """Return the arguments of a sampler that are models of other checkpoints, with their required type."""
    while isinstance(sampler, functools.partial):
        sampler = sampler.func
    return getattr(sampler, "model_parts", {})


def check_sampler(sampler: Callable, model: nn.Module, key: str = "sampler") -> None:
    """Raise UserError if a sampler is marked `for_models` of other types; `key` is the config key that chose it."""
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


def with_items(sampler: Callable, items: Callable[..., Tensor]) -> Callable:
    """Bind `items(split, index) -> Tensor`, see `Data.items`, to a sampler that starts from items of the data; return others
    unchanged."""
    takes = "items" in inspect.signature(sampler).parameters
    return functools.partial(sampler, items=items) if takes else sampler
