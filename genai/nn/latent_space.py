"""The latents of a frozen first stage, for any model that works in them (Rombach et al. 2022, section 3.1)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from genai.core.errors import UserError
from genai.core.precision import KeepPrecision, full_precision, upcast
from genai.core.protocols import Batch, Codec


class FirstStage(KeepPrecision):
    """A frozen Codec, which is never trained and never runs in half precision: latents are the same wherever they are computed.

    Args:
        codec: any Codec of the kind of latents that the subclass names in `kind`.

    Raises UserError for a codec of another kind, or one that is to be trained.
    """

    kind: str
    """The latents of a suitable codec, and a model that has some, as text for an error."""

    def __init__(self, codec: nn.Module):
        super().__init__()
        if not isinstance(codec, Codec) or not self.suits(codec):
            raise UserError(f"codec= is a {type(codec).__name__}, which has no {self.kind} trains")
        if not getattr(getattr(codec, "pretrained_from", None), "frozen", True):
            raise UserError(
                "model.latent.codec.frozen=false would change latents while a model of them is trained: leave it out"
            )
        self.codec: nn.Module = codec.requires_grad_(False).eval()  # type: ignore[attr-defined]
        self.field, self.shape = codec.field, codec.latent_shape

    def suits(self, codec: Codec) -> bool:
        """Return True for a codec of this kind of latents."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "FirstStage":
        """The first stage stays as it is."""
        return super().train(False)

    def check(self, batch: Batch, field: str) -> None:
        """Raise UserError if the first stage takes other data than a batch's field."""
        shape, given = list(self.codec.shape), list(batch[field].shape[1:])  # type: ignore[arg-type]
        if (self.field, shape) != (field, given):
            raise UserError(
                f"the first stage takes {self.field} of shape {shape}, but this data is {field} of shape {given}: choose the "
                "data= it was trained on, or another codec.ckpt"
            )

    def latents_of(self, batch: Batch) -> Tensor:
        """Return the codec's own latents (B, *shape) of a batch's field, or those that it brings along as `latent`."""
        return batch["latent"] if "latent" in batch else self.codec.encode(upcast(batch[self.field]))  # type: ignore[operator]


class LatentTokens(FirstStage):
    """The token ids of a frozen Codec, int64 (B, T), each below `vocab_size`."""

    kind = "token ids: choose a codec such as model=vqvae"

    def __init__(self, codec: nn.Module):
        super().__init__(codec)
        self.vocab_size: int = self.codec.vocabulary  # type: ignore[assignment]

    def suits(self, codec: Codec) -> bool:
        return codec.vocabulary is not None

    def encode(self, batch: Batch) -> Tensor:
        """Return the token ids int64 (B, T) of a batch's field."""
        device = next(iter(batch.values())).device
        with full_precision(device):
            return self.latents_of(batch).long()

    def decode(self, tokens: Tensor) -> Tensor:
        """Map token ids int64 (B, T) to the field (B, *codec.shape)."""
        with full_precision(tokens.device):
            return self.codec.decode(tokens)  # type: ignore[operator]


class Latent(FirstStage):
    """The latents of a frozen Codec, each channel standardised to mean 0 and standard deviation 1.

    Mean and deviation of each channel are measured on the training split before the first step (section 4.3.2 of the
    paper rescales by one measured deviation), and are part of the weights.
    """

    kind = "continuous latents: choose an autoencoder such as model=autoencoder"
    mean: Tensor
    std: Tensor

    def __init__(self, codec: nn.Module):
        super().__init__(codec)
        per_channel = (self.shape[0], *[1] * (len(self.shape) - 1))
        self.register_buffer("mean", torch.zeros(per_channel))
        self.register_buffer("std", torch.ones(per_channel))

    def suits(self, codec: Codec) -> bool:
        return codec.vocabulary is None

    def encode(self, batch: Batch) -> Tensor:
        """Latents (B, *shape) of a batch's images, or those that it brings along as `latent`."""
        with full_precision(self.mean.device):
            return (self.latents_of(batch) - self.mean) / self.std

    def decode(self, z: Tensor) -> Tensor:
        with full_precision(self.mean.device):
            return self.codec.decode(upcast(z) * self.std + self.mean)  # type: ignore[operator]

    def downsample_mask(self, mask: Tensor) -> Tensor:
        """Map a mask of pixels (B, C, H, W), or as the codec maps it by a method of this name, to one of latents (B, *shape).

        A latent is kept as much as the least kept pixel in its field. Raises UserError for latents that are not a map.
        """
        if hasattr(self.codec, "downsample_mask"):
            return self.codec.downsample_mask(mask)  # type: ignore[operator]
        if len(self.shape) != 3:
            raise UserError(f"mask= needs latents that are a map, and this first stage's are {list(self.shape)}")
        lost = nn.functional.adaptive_max_pool2d(1 - mask.amin(1, keepdim=True), self.shape[1:])
        return (1 - lost).expand(-1, *self.shape)

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> None:
        """Set mean and std from batches of training data. Raises UserError if a channel never changes."""
        self.mean.zero_()
        self.std.fill_(1)
        z = torch.cat([self.encode(batch).double() for batch in batches])
        rest = [d for d in range(z.ndim) if d != 1]
        std, mean = torch.std_mean(z, rest, correction=0)
        if not (std > 0).all():
            raise UserError(
                f"channel {int((std <= 0).int().argmax())} of the first stage's latents is the same for all data: train "
                "codec.ckpt anew with fewer latents, or a smaller model.kl_weight"
            )
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(std.view_as(self.std))


class SpaceToDepth(nn.Module):
    """A first stage without training: each square of factor x factor pixels becomes one position of a smaller map.

    It is lossless, and a baseline for what a learned first stage gains.

    Args:
        field, shape: field of the images, and their shape (C, H, W).
        factor: a divisor of H and W.

    Raises UserError for data of another shape, or a factor that does not divide it.
    """

    vocabulary: int | None = None

    def __init__(self, field: str, shape: Sequence[int], factor: int = 2):
        super().__init__()
        if len(shape) != 3:
            raise UserError(
                f"codec.model=SpaceToDepth takes images of shape [C, H, W], got {list(shape)}: choose another data="
            )
        c, h, w = shape
        if h % factor or w % factor:
            raise UserError(f"codec.model.factor={factor} must divide {h} and {w}, the image's height and width")
        self.field, self.shape, self.factor = field, tuple(shape), factor
        self.latent_shape = (c * factor**2, h // factor, w // factor)

    def encode(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, C factor^2, H / factor, W / factor)."""
        return nn.functional.pixel_unshuffle(x, self.factor)

    def decode(self, z: Tensor) -> Tensor:
        """Invert `encode`."""
        return nn.functional.pixel_shuffle(z, self.factor)

    def reconstruct(self, batch: Batch) -> Tensor:
        """Return the field itself, since nothing is lost."""
        return batch[self.field]
