"""DALL-E: captions and images as one sequence of tokens (Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021)."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, number
from genai.core.protocols import PAD, Batch, Losses, OnStep, for_models
from genai.models.autoregressive.decode import generate
from genai.nn.cache import Cache
from genai.nn.latent_space import LatentTokens
from genai.nn.text_image import TextImageModel, known
from genai.nn.transformer import Transformer


@dataclasses.dataclass
class State:
    """The decoding state of a DALLE."""

    cache: Cache
    """Keys and values of B sequences, or of 2 B with guidance: the second half has the captions to guide away from."""
    before: Tensor | None
    """int64 (B or 2 B, length + 1), the captions, which the first call reads before its tokens; None after it."""
    guidance: Tensor | None
    """(B, 1), the weight of each sample; None without guidance."""
    pad: Tensor | None
    """(B,) padding on the left of the prompts."""


class DALLE(TextImageModel):
    """A causal Transformer over the bytes of a caption and the codes of a frozen Codec, trained by maximum likelihood.

    Ids of captions are never predicted where a code is, nor the other way round.

    Args:
        field, length, latent, transformer, label_dropout, guidance, init: see `TextImageModel`.
        text_weight: share of the loss of captions, the rest is of images; 1/8 in the paper. Each is a mean over its own targets.

    Raises UserError as `TextImageModel` does.
    """

    causal = True

    def __init__(
        self,
        field: str,
        length: int,
        latent: LatentTokens,
        transformer: Transformer,
        text_weight: float = 1 / 8,
        label_dropout: float = 0.1,
        guidance: float = 1.0,
        init: Callable[[nn.Module], None] | None = None,
    ):
        super().__init__(field, length, latent, transformer, label_dropout, guidance, init)
        self.text_weight = number(text_weight, "model.text_weight", 0, 1)
        self.vocab_size, self.first = latent.vocab_size, self.ids.begin_image

    def logits(self, sequence: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits (B, T, codes + PAD + 1) of what follows each of `sequence` int64 (B, T): codes, then bytes."""
        return self.head(self.transformer(self.embed(sequence), cache)).float()

    def nats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return -ln p of each byte of the captions with the `PAD` that ends them (B, length), 0 after it and where the caption
        was dropped, and of each code (B, T)."""
        codes, (caption, kept) = self.latent.encode(batch), self.captions(batch)
        real = F.pad(caption[:, :-1] != PAD, (1, 0), value=True) & kept
        logits = self.logits(self.ids.sequence(caption, codes)[:, :-1])
        text, image = logits.split([self.ids.length + 1, self.length], 1)
        text = F.cross_entropy(text[:, :-1, self.ids.codes :].mT, caption, reduction="none")
        return text * real, F.cross_entropy(image[..., : self.ids.codes].mT, codes, reduction="none")

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the weighted mean of the losses of caption and image; logs both, in nats per byte and per code."""
        text, image = self.nats(batch)
        each, n = text.sum(1) / (text > 0).sum(1).clamp_min(1), len(text)
        losses = {"text": each.mean(), "image": image.mean()}
        total = self.text_weight * losses["text"] + (1 - self.text_weight) * losses["image"]
        return Losses(total, n, {name: (loss.detach(), n) for name, loss in losses.items()})

    def start(self, cond: Batch | None, batch: int, total: int, pad: Tensor | None = None) -> State:
        """Return the state of `batch` images before their first code, see `Autoregressive.start`.

        `cond` may hold `caption` int64 (batch, length), else they are empty, `negative`, as caption, to guide away from, and
        `guidance` float (batch,), the weight of each sample.
        """
        given, null = cond or {}, self.null()["caption"].expand(batch, -1)
        captions, weight = [given.get("caption", null)], given.get("guidance")
        if weight is not None:
            captions.append(given.get("negative", null))
            pad = None if pad is None else pad.repeat(2)
        caption = torch.cat(captions)
        before = self.ids.sequence(caption, caption[:, :0])[:, :-1]
        capacity = before.shape[1] + total
        cache = Cache(self.transformer, len(before), capacity, capacity, pad)
        return State(cache, before, None if weight is None else weight[:, None], pad)

    def next(self, tokens: Tensor, state: State) -> Tensor:
        """Read ids int64 (B, T), the begin of the image or codes -> logits float32 (B, codes) of the code after them.

        With guidance they are those of the empty caption plus the weight times the difference to those of the caption.
        """
        rows = tokens if state.guidance is None else tokens.repeat(2, 1)
        if state.before is not None:
            rows, n, state.before = torch.cat([state.before, rows], 1), state.before.shape[1], None
            if state.pad is not None:  # the padding comes before the caption
                at, pad = torch.arange(rows.shape[1], device=rows.device), state.pad[:, None]
                rows = rows.gather(1, torch.where(at < n + pad, at - pad, at).clamp_min(0))
        logits = self.logits(rows, state.cache)[:, -1, : self.vocab_size]
        if state.guidance is None:
            return logits
        given, null = logits.chunk(2)
        return torch.lerp(null, given, state.guidance)

    def fix(self, state: State) -> bool:
        """Make every later step the same work, for a CUDA graph."""
        state.cache.fix()
        return True


@for_models(DALLE)
@torch.inference_mode()
def sample(
    model: DALLE,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    guidance: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    cuda_graph: bool | None = None,
) -> Batch:
    """Draw images of captions, code by code, see `generate`.

    Args:
        cond: `caption` and `negative`, int64 (B, length); without a caption there is no guidance.
        guidance: weight of classifier-free guidance; None is the model's, 1 for none.
        image: images (B, C, H, W) to complete.
        mask: their part that is kept, 1, and completed, 0, (B, 1 or C, H, W); None keeps the upper half.

    Returns the images, with their codes as `tokens` int64 (B, T) and `log_prob` (B, T) as `generate` has it, 0 for codes that are
    kept. Raises UserError for an argument out of range, and for a mask that keeps anything after what is completed.
    """
    weight = model.guidance if guidance is None else guidance
    model.check_guidance(weight, "guidance")
    given, begun = dict(cond or {}), known(model, image, mask)
    if weight != 1 and "caption" in given:
        given["guidance"] = torch.full((len(seeds),), float(weight))
    kept = torch.zeros(len(seeds), 0, dtype=torch.int64, device=model.embed.weight.device)
    if begun is not None:
        kept = begun.codes[:, : beginning(begun.kept)]
        given |= {"tokens": F.pad(kept, (1, 0), value=model.first), "lead": torch.ones(len(seeds), dtype=torch.int64)}
    n = model.length - kept.shape[1]
    made = generate(model, seeds, given, on_step, n, temperature, top_k, top_p, min_p, cuda_graph=cuda_graph)
    tokens = torch.cat([kept, made["tokens"]], 1)
    x = model.latent.decode(tokens).clamp(-1, 1)
    log_prob = F.pad(made["log_prob"], (kept.shape[1], 0))
    return {model.field: x if begun is None else begun.restore(x), "tokens": tokens, "log_prob": log_prob}


def beginning(kept: Tensor) -> int:
    """Return the number of codes that are kept, bool (B, T), before all that are not.

    Raises UserError where one is kept after one that is not, where all are, and where images differ.
    """
    n = int(kept[0].sum())
    if n == kept.shape[1] or not torch.equal(
        kept, (torch.arange(kept.shape[1], device=kept.device) < n).expand_as(kept)
    ):
        raise UserError(
            "this model draws codes row by row, so that mask= can only fill in the end of an image, the same of each: keep rows "
            "at the top, or use a model such as model=maskgit"
        )
    return n
