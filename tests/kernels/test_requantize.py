"""requantize on every backend: every integer of int8, against quantize(dequantize)."""

import pytest
import torch

from dfq_kernels import dequantize
from dfq_kernels.integer import Int8Grid
from dfq_kernels.quantize import quantize_reference
from dfq_kernels.requantize import requantize, requantize_reference

EVERY = torch.arange(-128, 128).to(torch.int8)
SCALES = [0.031, 0.25, 1.0, 0.7, 3.0]
GRIDS = [Int8Grid(0, 0, 15), Int8Grid(-128, -128, 127), Int8Grid(3, -4, 11), Int8Grid(0, -2, 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("zero", [0, -128, 40])
def test_it_is_quantize_of_dequantize(backend, zero, grid):
    for scale in SCALES:
        for new in SCALES:
            before, after = torch.tensor([scale]), torch.tensor([new])
            values = dequantize(EVERY, before, torch.tensor([float(zero)]))
            new_zero = torch.tensor([float(grid.zero)])
            expected = quantize_reference(values, after, new_zero, grid.low, grid.high, 0)
            found = requantize(EVERY, (before.item(), after.item()), zero, grid)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (16,), (8192,), (8208,), (2, 70_001)])
def test_any_size(backend, shape):
    """Also where codes begin at an odd address."""
    every = torch.randint(-128, 128, (torch.Size(shape).numel() + 1,), dtype=torch.int8)
    for codes in (every[:-1].view(shape), every[1:].view(shape)):
        expected = requantize_reference(codes, 0.3, 0.7, 5, -3, -100, 90)
        torch.use_deterministic_algorithms(True)  # fills what is empty
        found = requantize(codes, (0.3, 0.7), 5, Int8Grid(-3, -100, 90))
        torch.use_deterministic_algorithms(False)
        assert torch.equal(found, expected)


def test_the_memory_layout_stays(backend):
    codes = torch.randint(-128, 128, (2, 5, 4, 3), dtype=torch.int8)
    by_pixel = codes.contiguous(memory_format=torch.channels_last)
    args = ((0.3, 0.7), 0, GRIDS[0])
    found = requantize(by_pixel, *args)
    assert found.stride() == by_pixel.stride()
    assert torch.equal(found, requantize(codes, *args))


@pytest.mark.parametrize(
    ("codes", "ratio", "grid", "message"),
    [
        (EVERY.int(), (1.0, 1.0), GRIDS[0], "codes must be int8"),
        (EVERY[::2], (1.0, 1.0), GRIDS[0], "contiguous or channels_last"),
        (EVERY, (1.0, 0.0), GRIDS[0], "scales must be positive"),
        (EVERY, (1.0, 1.0), Int8Grid(0, 0, 255), "must be an int8, got 255"),
        (EVERY, (1.0, 1.0), Int8Grid(0, 5, 4), "must not be empty"),
    ],
)
def test_bad_arguments_are_named(codes, ratio, grid, message):
    with pytest.raises(ValueError, match=message):
        requantize(codes, ratio, 0, grid)


def test_op_contract():
    torch.library.opcheck(torch.ops.dfq.requantize.default, (EVERY, 0.3, 0.7, 0, 0, 0, 15))
