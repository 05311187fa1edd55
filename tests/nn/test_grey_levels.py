"""Images as grey levels: lossless on the levels, means of squares else."""

import pytest
import torch

from genai.core.errors import UserError
from genai.core.protocols import Codec
from genai.nn.grey_levels import GreyLevels


@pytest.mark.parametrize("channels", [1, 3])
def test_levels_are_ids_and_back(channels):
    codec = GreyLevels("image", (channels, 4, 6), 5)
    level = torch.randint(5, (2, channels, 4, 6))
    x = level / 2 - 1
    ids = codec.encode(x)
    assert isinstance(codec, Codec) and ids.shape == (2, *codec.latent_shape) and ids.dtype == torch.int64
    assert torch.equal(ids, level.movedim(1, -1).flatten(1)) and torch.equal(codec.reconstruct({"image": x}), x)


def test_with_a_factor_pixels_are_means_of_squares():
    codec = GreyLevels("image", (1, 4, 4), 3, 2)
    x = torch.tensor([[-1.0, -1, 1, 1], [1, 1, 1, 1], [0, 0, -1, -1], [0, 0, -1, -1]])[None, None]
    assert codec.encode(x).tolist() == [[1, 2, 1, 0]]
    again = codec.reconstruct({"image": x})[0, 0]
    assert again.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, -1, -1], [0, 0, -1, -1]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (((8,), 3), "takes images on grey levels, got image of shape"),
        (((1, 4, 4), None), "takes images on grey levels"),
        (((1, 4, 4), 3, 3), r"codec\.model\.factor=3 must divide 4 and 4"),
    ],
)
def test_refuses(given, said):
    with pytest.raises(UserError, match=said):
        GreyLevels("image", *given)
