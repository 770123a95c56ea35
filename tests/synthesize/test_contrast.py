import pytest
import torch

from dfq.synthesize.contrast import add_contrast
from dfq.types import DataSpec, Images, InputError

PLAIN = DataSpec((1, 1, 4), classes=10)
PIXELS = torch.tensor([0.0, 0.4, 0.5, 0.75])


def _images(values):
    return Images(values.reshape(1, -1, 1, 4), torch.tensor([7]))


def test_pixels_move_away_from_the_middle_and_stay_pixels():
    images, labels = add_contrast(_images(PIXELS), PLAIN, 1.5)
    assert torch.equal(images[0].flatten(), PIXELS)
    torch.testing.assert_close(images[1].flatten(), torch.tensor([0.0, 0.35, 0.5, 0.875]))
    assert labels.tolist() == [7, 7]
    images, _ = add_contrast(_images(PIXELS), PLAIN, 4)
    torch.testing.assert_close(images[1].flatten(), torch.tensor([0.0, 0.1, 0.5, 1.0]))


def test_normalized_images_have_the_contrast_of_their_pixels():
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.4)
    data = DataSpec((3, 1, 4), 10, mean, std)
    shift, size = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = torch.rand(5, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    images, repeated = add_contrast(Images((pixels - shift) / size, labels), data, 2)
    plain, _ = add_contrast(Images(pixels, labels), DataSpec((3, 1, 4), 10), 2)
    torch.testing.assert_close(images * size + shift, plain)
    assert torch.equal(repeated, torch.cat((labels, labels)))


def test_no_more_contrast_adds_nothing():
    images = _images(PIXELS)
    assert add_contrast(images, PLAIN, 1) is images


@pytest.mark.parametrize("factor", [0, -1.5, float("nan")])
def test_a_contrast_that_is_none_is_refused(factor):
    with pytest.raises(InputError, match="factor must be above 0"):
        add_contrast(_images(PIXELS), PLAIN, factor)
