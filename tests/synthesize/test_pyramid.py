import pytest
import torch
import torch.nn.functional as F

from dfq.synthesize.pyramid import Pyramid, interpolation
from dfq.types import DataSpec

DATA = DataSpec((3, 16, 12), 4, mean=(0.5,) * 3, std=(0.25,) * 3)


def _pyramid(data=DATA, levels=3, gain=1.5):
    return Pyramid(32, data, levels, gain, rng=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "new_size"), [(4, 8), (3, 8), (5, 5), (1, 7), (4, 13)])
def test_interpolation_is_that_of_pytorch(size, new_size):
    x = torch.randn(2, 3, size)
    expected = F.interpolate(x, new_size, mode="linear")
    torch.testing.assert_close(x @ interpolation(size, new_size).T, expected)


def test_one_level_is_pixels():
    pyramid = _pyramid(levels=1)
    images = pyramid()
    assert [tuple(m.shape) for m in pyramid.maps] == [(32, 3, 16, 12)]
    free = (pyramid.maps[0] > -2) & (pyramid.maps[0] < 2)
    torch.testing.assert_close(images[free], pyramid.maps[0][free])


def test_images_are_the_sum_of_their_maps():
    pyramid = _pyramid(data=DataSpec((3, 16, 12), 4, mean=(0.5,) * 3, std=(0.01,) * 3))
    ups = [F.interpolate(m, (16, 12), mode="bilinear") for m in pyramid.maps]
    expected = sum(1.5**k * up for k, up in enumerate(ups)) / (1 + 1.5**2 + 1.5**4) ** 0.5
    torch.testing.assert_close(pyramid(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("data", [DATA, DataSpec((3, 16, 12), 4)])
def test_images_hold_only_what_images_can(data):
    low, high = data.value_range
    images = _pyramid(data)()
    assert low <= images.min()
    assert images.max() <= high
    assert images.std() > (high - low) / 8


def test_coarse_maps_make_smooth_images():
    rough, smooth = (_pyramid(levels=levels)().diff(dim=3).abs().mean() for levels in (1, 3))
    assert smooth < 0.7 * rough


def test_small_and_odd_images_have_fewer_levels():
    pyramid = _pyramid(DataSpec((1, 5, 9), 2), levels=6)
    assert [tuple(m.shape[2:]) for m in pyramid.maps] == [(5, 9), (3, 5)]
    assert pyramid().shape == (32, 1, 5, 9)


def test_every_map_learns():
    pyramid = _pyramid()
    pyramid().square().sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in pyramid.maps)
