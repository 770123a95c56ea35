"""quantize against torch.quantize_per_tensor and the eager composite, from both layouts."""

from functools import partial

import pytest
import torch

from bench.harness import Baseline, Case, against_compile, choose, describe
from bench.settings import DEVICE
from dfq_kernels import quantize
from dfq_kernels.quantize import quantize_reference

LAYERS = {
    "images, NCHW": choose(tiny=(2, 3, 8, 8), usual=(8, 3, 224, 224), large=(256, 3, 224, 224)),
    "activation, channels_last": choose(
        tiny=(2, 16, 5, 5), usual=(8, 64, 56, 56), large=(256, 64, 56, 56)
    ),
}
CASES = [(name, shape) for name, shapes in LAYERS.items() for shape in shapes]


def composite(x, scale, zero_point, quant_min, quant_max, offset):
    code = (torch.round(x * (1 / scale)) + zero_point).clamp(quant_min, quant_max)
    return (code - offset).to(torch.int8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_quantize(measure, name, shape):
    x = torch.randn(shape, device=DEVICE)
    if "channels_last" in name:
        x = x.contiguous(memory_format=torch.channels_last)
    scale, zero_point = torch.tensor([0.03], device=DEVICE), torch.tensor([77.0], device=DEVICE)
    args = (x, scale, zero_point, 0, 255, 128)

    def check():
        torch.testing.assert_close(quantize(*args), quantize_reference(*args), rtol=0, atol=0)

    measure(
        Case(
            op="quantize",
            name=name,
            size=describe(x),
            run=partial(quantize, *args),
            check=check,
            baselines={
                "eager composite": Baseline(partial(composite, *args), 3),
                **against_compile(x, composite, lambda fast: partial(fast, *args)),
            },
            elements=x.numel(),
            bytes=5 * x.numel(),
        )
    )
