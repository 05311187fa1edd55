"""Hidden pixels of an image to complete do not change the codes of the pixels that are kept."""

from types import SimpleNamespace

import pytest
import torch

from genai.nn.grey_levels import GreyLevels
from genai.nn.latent_space import LatentTokens
from genai.nn.text_image import known

SHAPE, LEVELS = (1, 4, 4), 9


class Wide(GreyLevels):
    """A first stage each of whose codes depends on the whole image."""

    def encode(self, x):
        return super().encode((x + x.mean((1, 2, 3), keepdim=True)) / 2)


def model(codec):
    return SimpleNamespace(
        field="image", grid=(4, 4), latent=LatentTokens(codec), embed=SimpleNamespace(weight=torch.zeros(1))
    )


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("codec", [GreyLevels, Wide])
def test_codes_that_are_kept_do_not_depend_on_what_is_not(codec, rows):
    torch.manual_seed(0)
    image = torch.rand(2, *SHAPE) * 2 - 1
    mask = None if rows is None else (torch.arange(4) < rows).float().view(1, 1, 4, 1).expand(2, 1, 4, 4)
    other = image.clone()
    other[:, :, rows or 2 :] = torch.rand(2, 1, 4 - (rows or 2), 4) * 2 - 1
    one, two = (known(model(codec("image", SHAPE, LEVELS)), x, mask) for x in (image, other))
    assert torch.equal(one.kept, two.kept) and one.kept.sum(1).tolist() == [4 * (rows or 2)] * 2
    assert torch.equal(one.codes, two.codes)


def test_the_codes_of_a_first_stage_without_neighbours_are_the_images_own():
    image = torch.linspace(-1, 1, 16).view(1, *SHAPE)
    codec = GreyLevels("image", SHAPE, LEVELS)
    found = known(model(codec), image, None)
    assert torch.equal(found.codes[found.kept], codec.encode(image)[found.kept])
    assert torch.equal(found.restore(torch.zeros(1, *SHAPE))[:, :, :2], image[:, :, :2])


def test_an_image_of_which_nothing_is_kept_is_grey():
    found = known(model(GreyLevels("image", SHAPE, LEVELS)), torch.ones(1, *SHAPE), torch.zeros(1, *SHAPE))
    assert not found.kept.any() and (found.codes == LEVELS // 2).all()
