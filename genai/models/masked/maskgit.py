"""MaskGIT: all codes of an image are predicted at once, and those of the highest confidence kept (Chang et al., 2022)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core import rng
from genai.core.errors import at_least, number
from genai.core.protocols import Batch, Losses, OnStep, for_models
from genai.models.masked.base import draw
from genai.nn.latent_space import LatentTokens
from genai.nn.text_image import TextImageModel, known
from genai.nn.transformer import Transformer


class MaskGIT(TextImageModel):
    """A bidirectional Transformer over the bytes of a caption and the codes of an image, of which a random share is masked.

    Args:
        field, length, latent, transformer, label_dropout, guidance, init: see `TextImageModel`.
        label_smoothing: share of a uniform distribution in the targets; the paper has 0.1.

    Raises UserError as `TextImageModel` does.
    """

    causal = False

    def __init__(
        self,
        field: str,
        length: int,
        latent: LatentTokens,
        transformer: Transformer,
        label_dropout: float = 0.1,
        guidance: float = 1.0,
        label_smoothing: float = 0.0,
        init: Callable[[nn.Module], None] | None = None,
    ):
        super().__init__(field, length, latent, transformer, label_dropout, guidance, init)
        self.label_smoothing = number(label_smoothing, "model.label_smoothing", 0, 1)

    def logits(self, caption: Tensor, codes: Tensor) -> Tensor:
        """Return logits (B, T, codes) of every code by captions int64 (B, length) and codes int64 (B, T), some of them `mask`."""
        x = self.transformer(self.embed(self.ids.sequence(caption, codes)))
        return self.head(x[:, self.ids.length + 2 :]).float()

    def forward(self, batch: Batch, step: int) -> Losses:
        """Return the mean of -ln p over the masked codes (eq. 1), and their number."""
        codes, (caption, _) = self.latent.encode(batch), self.captions(batch)
        masked = draw_masked(len(codes), self.length, codes.device)
        logits = self.logits(caption, torch.where(masked, self.ids.mask, codes))
        smoothing = self.label_smoothing if self.training else 0.0
        nats = F.cross_entropy(logits.mT, codes, reduction="none", label_smoothing=smoothing) * masked
        return Losses(nats.sum() / masked.sum(), masked.sum())


def draw_masked(n: int, length: int, device: torch.device) -> Tensor:
    """Draw which codes (n, length) are masked: ceil(length cos(pi r / 2)) random ones of each image (section 3.1).

    r is uniform on [0, 1); those of a batch are spread evenly.
    """
    r = (torch.rand((), device=device) + torch.arange(n, device=device) / n) % 1
    count = (length * torch.cos(r * math.pi / 2)).ceil().clamp_min(1)
    return torch.rand(n, length, device=device).argsort(1).argsort(1) < count[:, None]


@for_models(MaskGIT)
@torch.inference_mode()
def sample(
    model: MaskGIT,
    seeds: Tensor,
    cond: Batch | None = None,
    on_step: OnStep | None = None,
    *,
    steps: int = 8,
    guidance: float | None = None,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    image: Tensor | None = None,
    mask: Tensor | None = None,
) -> Batch:
    """Draw images of captions in a few steps, each of which draws all unknown codes and keeps the most confident (section 3.2).

    After step k of n, floor(length cos(pi k / (2 n))) codes are still masked, as in the authors' code: with the ceiling that the
    paper has, the first of eight steps would keep none of 49 codes. The confidence of a code is its ln p plus Gumbel noise times
    choice_temperature (1 - k / n).

    Args:
        cond: `caption` and `negative`, int64 (B, length); without a caption there is no guidance.
        steps: calls of the network.
        guidance: weight of classifier-free guidance; None is the model's, 1 for none.
        temperature: divides the logits that codes are drawn from; 0 takes the most probable code.
        choice_temperature: of the order in which codes are kept; 0 keeps the most confident.
        image: images (B, C, H, W) to complete.
        mask: their part that is kept, 1, and filled in, 0, (B, 1 or C, H, W); None keeps the upper half.

    Returns the images, with their codes as `tokens` int64 (B, T). Raises UserError for an argument out of range.
    """
    weight, device = model.guidance if guidance is None else guidance, model.embed.weight.device
    model.check_guidance(weight, "guidance")
    at_least(steps, 1, "sampler.steps")
    number(temperature, "sampler.temperature", 0)
    number(choice_temperature, "sampler.choice_temperature", 0)
    given = {name: value.to(device) for name, value in (cond or {}).items() if name in ("caption", "negative")}
    null = model.null()["caption"].expand(len(seeds), -1)
    captions = [given.get("caption", null)]
    if weight != 1 and "caption" in given:
        captions.append(given.get("negative", null))
    codes, begun = torch.full((len(seeds), model.length), model.ids.mask, device=device), known(model, image, mask)
    codes = codes if begun is None else torch.where(begun.kept, begun.codes, codes)
    seeds, total = seeds.to(device), (codes == model.ids.mask).sum(1, keepdim=True)
    for k in range(1, steps + 1):
        logits = model.logits(torch.cat(captions), codes.repeat(len(captions), 1))
        if len(captions) == 2:
            logits = torch.lerp(*reversed(logits.chunk(2)), weight)  # type: ignore[arg-type]
        u, gumbel = (rng.uniform(seeds, (model.length,), k, stream) for stream in (rng.TOKENS, rng.STEP))
        drawn = draw(logits, temperature, u)
        confidence = logits.log_softmax(-1).gather(2, drawn[..., None])[..., 0]
        confidence += choice_temperature * (1 - k / steps) * -(-gumbel.clamp(1e-7, 1 - 1e-7).log()).log()
        masked = (total * math.cos(math.pi / 2 * k / steps) + 1e-4).floor()
        order = confidence.masked_fill(codes != model.ids.mask, math.inf).argsort(1).argsort(1)
        codes = torch.where((codes == model.ids.mask) & (order >= masked), drawn, codes)
        if on_step is not None:
            on_step(k - 1, steps, {"tokens": codes})
    x = model.latent.decode(codes).clamp(-1, 1)
    return {model.field: x if begun is None else begun.restore(x), "tokens": codes}
