"""requantize against the two ops it replaces, on an activation of ResNet-18."""

from functools import partial

import pytest
import torch

from bench.harness import Baseline, Case, choose, describe
from bench.settings import DEVICE
from dfq_kernels import dequantize, quantize
from dfq_kernels.integer import Int8Grid
from dfq_kernels.requantize import requantize

SHAPES = choose(tiny=(2, 16, 5, 5), usual=(8, 64, 56, 56), large=(512, 64, 56, 56))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_requantize(measure, shape):
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    codes = codes.contiguous(memory_format=torch.channels_last)
    scales = [torch.tensor([value], device=DEVICE) for value in (0.011, 0.19)]
    zero = torch.zeros(1, device=DEVICE)
    ratio = (scales[0].item(), scales[1].item())
    run = partial(requantize, codes, ratio, 0, Int8Grid(0, 0, 15))

    def two_ops():
        return quantize(dequantize(codes, scales[0], zero), scales[1], zero, 0, 15)

    def check():
        torch.testing.assert_close(run(), two_ops(), rtol=0, atol=0)

    measure(
        Case(
            op="requantize",
            name="8 to 4 bits",
            size=describe(codes.float()).replace("fp32", "int8"),
            run=run,
            check=check,
            baselines={"quantize(dequantize)": Baseline(two_ops, 4)},
            elements=codes.numel(),
            bytes=2 * codes.nbytes,
        )
    )
