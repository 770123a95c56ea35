import math

import pytest
import torch

from dfq.synthesize.crops import random_crops
from dfq.types import InputError


def _places(height=32, width=48, count=400):
    """[count, 2, height, width]: each pixel tells its column and its row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((columns, rows)).float().expand(count, -1, -1, -1)


def _sides(crops, edge):
    """Width and height of every part, from how far apart its pixels lie; [count] each."""
    inner = crops[:, :, edge:-edge, edge:-edge]  # the border repeats itself
    height, width = crops.shape[2:]
    across = inner[:, 0].diff(dim=2).mean((1, 2)) * width
    down = inner[:, 1].diff(dim=1).mean((1, 2)) * height
    return across, down


def test_parts_have_the_area_and_the_proportions_that_they_should():
    crops = random_crops(_places(count=2000), 0.3, torch.Generator().manual_seed(0))
    across, down = _sides(crops, 2)
    width, height = across / 48, down / 32
    area, proportions = width * height, width / height
    assert 0.3 * (1 - 1e-4) <= area.min() < 0.31
    assert 0.97 < area.max() <= 1 + 1e-4
    assert abs(area.mean() - 0.65) < 0.04  # less for sides that were cut
    assert 3 / 4 * (1 - 1e-4) <= proportions.min() < 0.76
    assert 1.31 < proportions.max() <= 4 / 3 * (1 + 1e-4)


def test_parts_lie_anywhere_and_show_nothing_from_beyond():
    crops = random_crops(_places(), 0.3, torch.Generator().manual_seed(0))
    middle = crops[:, :, 15:17, 23:25].mean((2, 3))  # [count, 2]: where each part's middle lies
    width, height = _sides(crops, 2)
    for place, side, whole in ((middle[:, 0], width, 48), (middle[:, 1], height, 32)):
        assert (place - side / 2 > -0.5 - 1e-2).all()
        assert (place + side / 2 < whole - 0.5 + 1e-2).all()
        left = (place + 0.5 - side / 2) / (whole - side).clamp(min=1e-3)
        assert abs(left[side < 0.9 * whole].mean() - 0.5) < 0.06
        assert left[side < 0.9 * whole].std() > 0.25  # 0.29 if even
    assert crops.min() >= 0
    assert crops[:, 0].max() <= 47


def test_a_part_is_interpolated_between_pixels():
    crops = random_crops(_places(count=8), 0.5, torch.Generator().manual_seed(1))
    for crop, dim in ((crops[:, 0], 2), (crops[:, 1], 1)):  # columns, rows
        steps = crop[:, 2:-2, 2:-2].diff(dim=dim)
        assert torch.allclose(steps, steps[:, :1, :1].expand_as(steps), atol=1e-3)


def test_the_whole_is_left_alone_and_draws_nothing():
    images, rng = torch.randn(2, 3, 8, 8), torch.Generator().manual_seed(0)
    state = rng.get_state()
    assert random_crops(images, 1, rng) is images
    assert torch.equal(rng.get_state(), state)


def test_the_seed_says_which_parts():
    images = torch.randn(4, 3, 8, 8)
    first, again, other = (
        random_crops(images, 0.3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("area", [0, -0.5, 1.5, math.nan])
def test_an_area_that_is_none_is_refused(area):
    with pytest.raises(InputError, match="least_area must be above 0 and at most 1"):
        random_crops(torch.zeros(1, 3, 8, 8), area, torch.Generator())
