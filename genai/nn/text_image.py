"""A caption and the token ids of its image as one sequence (Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genai.core.errors import UserError, at_least, number
from genai.core.protocols import PAD, Batch
from genai.nn.latent_space import LatentTokens
from genai.nn.transformer import Transformer


class TextImageIds:
    """The ids of a sequence: begin of caption, the caption's bytes and padding, begin of image, then the codes of the image.

    The codes are 0, ..., codes - 1, a byte or `PAD` of a caption has the id codes + byte, and `mask` takes the place of an
    unknown code. No two ranges overlap.

    Args:
        codes: number of codes.
        length: bytes of a caption with its padding.
    """

    def __init__(self, codes: int, length: int):
        self.codes, self.length = codes, at_least(length, 1, "model.length")
        self.begin_text, self.begin_image = codes + PAD + 1, codes + PAD + 2
        self.mask = codes + PAD + 3
        self.vocab_size = self.mask + 1

    def sequence(self, caption: Tensor, codes: Tensor) -> Tensor:
        """Return the sequences int64 (B, length + 2 + T) of captions int64 (B, length) and codes int64 (B, T)."""
        ends = (torch.full_like(caption[:, :1], end) for end in (self.begin_text, self.begin_image))
        begin_text, begin_image = ends
        return torch.cat([begin_text, caption + self.codes, begin_image, codes], 1)


class TextImagePositions(nn.Module):
    """Learned position embeddings of such a sequence.

    There is one for each place of the caption; a code has that of its row plus that of its column.

    Args:
        width: of the embeddings.
        length: bytes of a caption with its padding.
        grid: rows and columns of the codes.

    Raises UserError for data without captions, whose length is None.
    """

    def __init__(self, width: int, length: int | None, grid: Sequence[int]):
        super().__init__()
        if length is None:
            raise UserError(
                "this model takes images with captions, and this data has none: choose such as data=digits_text"
            )
        self.grid, self.before = tuple(grid), length + 2
        self.length = self.before + math.prod(grid)
        self.text = nn.Embedding(self.before, width)
        self.row, self.column = (nn.Embedding(n, width) for n in self.grid)

    def forward(self, positions: Tensor, head_dim: int) -> tuple[Tensor | None, None]:
        """Return the embeddings (T, width) or (B, T, width) of positions (T,) or (B, T), and no rotation."""
        code = (positions - self.before).clamp_min(0)
        place = self.row(code // self.grid[1]) + self.column(code % self.grid[1])
        text = self.text(positions.clamp_max(self.before - 1))
        return torch.where((positions < self.before)[..., None], text, place), None


class TextImageModel(nn.Module):
    """The base of models of such sequences: their ids, networks and first stage, and captions that are dropped in training.

    Args:
        field: of the images.
        length: bytes of a caption with its padding.
        latent: the codes of images.
        transformer: with TextImagePositions, causal as the model is.
        label_dropout: probability of training an image on the empty caption, for classifier-free guidance.
        guidance: default weight of guidance when sampling; 1 switches it off.
        init: `init(model)` sets the first weights; None keeps torch's.

    Raises UserError for a transformer that does not fit, an argument out of range, and for guidance without label_dropout.
    """

    causal: bool
    """True for an autoregressive model, which predicts each token from those before it; False for a bidirectional one."""

    def __init__(
        self,
        field: str,
        length: int,
        latent: LatentTokens,
        transformer: Transformer,
        label_dropout: float,
        guidance: float,
        init: Callable[[nn.Module], None] | None,
    ):
        super().__init__()
        self.ids, self.length = TextImageIds(latent.vocab_size, length), math.prod(latent.shape)
        position: Any = transformer.position
        self.grid, before = tuple(getattr(position, "grid", ())), getattr(position, "before", None)
        if math.prod(self.grid) != self.length or before != length + 2:
            raise UserError(
                f"model.transformer.position must be TextImagePositions of length={length} with a grid of {self.length} codes, "
                f"got {type(position).__name__} of grid={list(self.grid)}: set grid to rows and columns of the codes"
            )
        if any(block.attention.causal != self.causal for block in transformer.blocks):  # type: ignore[union-attr]
            raise UserError(
                f"a {type(self).__name__} needs model.transformer.attention.causal={str(self.causal).lower()}: set it so"
            )
        self.field, self.latent, self.transformer, self.guidance = field, latent, transformer, guidance
        self.label_dropout = number(label_dropout, "model.label_dropout", 0, 1)
        self.check_guidance(guidance, "model.guidance")
        self.embed = nn.Embedding(self.ids.vocab_size, transformer.width)
        # a causal model predicts captions too
        self.head = nn.Linear(transformer.width, self.ids.begin_text if self.causal else self.ids.codes, bias=False)
        if init is not None:
            init(self)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of an image."""
        return tuple(self.latent.codec.shape)  # type: ignore[arg-type]

    @property
    def codec(self) -> nn.Module:
        """The frozen first stage, whose weights come from another checkpoint."""
        return self.latent.codec

    def nets(self) -> Mapping[str, nn.Module]:
        """Return the networks that `compile=true` compiles, by name."""
        return {"transformer": self.transformer}

    def null(self) -> Batch:
        """Return the empty caption, int64 (length,)."""
        return {"caption": torch.full((self.ids.length,), PAD, device=self.embed.weight.device)}

    def prepare(self, batches: Iterable[Batch]) -> Mapping[str, Any]:
        """Check the first batch, see `Preparable`; measures nothing.

        Raises UserError for data without captions, captions of another length, and data of another first stage.
        """
        batch = next(iter(batches))
        if "caption" not in batch or batch["caption"].shape[1] != self.ids.length:
            found = f"captions of {batch['caption'].shape[1]}" if "caption" in batch else "none"
            raise UserError(
                f"a {type(self).__name__} takes captions of model.length={self.ids.length} bytes, and this data has {found}: "
                "choose data with captions, such as data=digits_text, and set data.length"
            )
        self.latent.check(batch, self.field)
        return {}

    def check_guidance(self, w: float, key: str) -> None:
        """Raise UserError for a weight other than 1 of a model that was never trained on the empty caption, or always."""
        if number(w, key, 0) != 1 and not 0 < self.label_dropout < 1:
            raise UserError(
                f"{key}={w} needs a model that was trained with and without captions, and this has "
                f"model.label_dropout={self.label_dropout}: give {key}=1, which switches guidance off"
            )

    def captions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (captions int64 (B, length), empty where a batch has none and for a random share in training mode; which of them
        are kept, bool (B, 1))."""
        n, null = len(batch[self.field]), self.null()["caption"]
        caption = batch.get("caption", null.expand(n, -1))
        kept = torch.ones(n, 1, dtype=torch.bool, device=null.device)
        if self.training and self.label_dropout > 0:
            kept = torch.rand(n, 1, device=null.device) >= self.label_dropout
        return torch.where(kept, caption, PAD), kept


class Known(NamedTuple):
    """Images to complete: their codes, and the part of them that is kept."""

    codes: Tensor
    """int64 (B, T), those of the images."""
    kept: Tensor
    """bool (B, T), which codes the mask keeps wholly."""
    image: Tensor
    """(B, C, H, W)"""
    mask: Tensor
    """(B, 1 or C, H, W), 1 for what is kept."""

    def restore(self, x: Tensor) -> Tensor:
        """Return images (B, C, H, W) with what is kept as it was."""
        return torch.where(self.mask > 0.5, self.image.to(x), x)


def known(model: TextImageModel, image: Tensor | None, mask: Tensor | None) -> Known | None:
    """Encode images (B, C, H, W) of which a mask (B, 1 or C, H, W) of ones is kept, the upper half without a mask; None without.

    A first stage may look at pixels around those of a code: what is not kept becomes the mean of what is, so that it has no
    influence. Raises UserError for a mask without images.
    """
    if image is None:
        if mask is not None:
            raise UserError("mask= was given, but there is no image= to complete: give both, or leave mask= out")
        return None
    if mask is None:
        mask = torch.zeros_like(image[:, :1])
        mask[:, :, : image.shape[2] // 2] = 1
    lost = F.adaptive_max_pool2d(1 - mask.float().amin(1, keepdim=True), model.grid)
    device = model.embed.weight.device
    image, mask = image.to(device), mask.to(device)
    here = (mask > 0.5).expand_as(image)
    mean = (image * here).sum((2, 3), keepdim=True) / here.sum((2, 3), keepdim=True).clamp_min(1)
    codes = model.latent.encode({model.field: torch.where(here, image, mean)})
    return Known(codes, lost.flatten(1).to(device) == 0, image, mask)
