"""What the tests of fake_quantize share: strides, layouts, and equality with the reference."""

from pathlib import Path

import numpy as np
import torch
from conftest import BACKENDS
from hypothesis import strategies as st

from dfq_kernels import _backend
from dfq_kernels.fake_quantize import fake_quantize_backward_reference, fake_quantize_reference

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]
EVERYTHING = (True, True, True)  # all three gradients


def forward(*args):
    """The op of the backend in force, past the checks of the public function."""
    return _backend.implementation("fake_quantize", "cpu")(*args)


def backward(*args):
    return _backend.implementation("fake_quantize_backward", "cpu")(*args)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert actual.stride() == expected.stride()


def assert_parity(grad, args):
    """Forward and backward of the backend in force give what the reference gives."""
    assert_same(forward(*args), fake_quantize_reference(*args))
    dx, dscale, dzero_point = backward(grad, *args, *EVERYTHING)
    expected = fake_quantize_backward_reference(grad, *args, *EVERYTHING)
    assert_same(dx, expected[0])
    _, scale, zero_point, quant_min, quant_max, *_ = args
    # each term is at most |grad| times the longest way from zero_point: 4 roundings of their sum
    longest = max(abs(quant_min), abs(quant_max)) + max(zero_point.abs().tolist(), default=0) + 1
    terms = grad.double().abs().sum().item()
    torch.testing.assert_close(dscale, expected[1], rtol=2**-23, atol=2**-22 * terms * longest)
    largest = max(scale[scale.isfinite()].tolist(), default=0)
    torch.testing.assert_close(
        dzero_point, expected[2], rtol=2**-23, atol=2**-22 * terms * largest, equal_nan=True
    )


@st.composite
def tensors(draw, dtype, rng):
    """Any strides: a base tensor that is stepped through, permuted and expanded."""
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    if shape and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 17, 33, 70]))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    base = torch.randn([n * step for n, step in zip(shape, steps, strict=True)], generator=rng)
    x = (base * 2).to(dtype)[tuple(slice(None, None, step) for step in steps)]
    x = x.permute(draw(st.permutations(range(len(shape)))))
    if x.numel() and x.ndim and draw(st.integers(0, 4)) == 0:
        d = draw(st.integers(0, x.ndim - 1))
        x = x.narrow(d, 0, 1).expand(*(5 if i == d else -1 for i in range(x.ndim)))
    return x


LAYOUTS = {  # name: shape, axis, dimensions from the slowest; every path, the borders of its blocks
    "two tiles and a rest": ((2 * 4096 + 5,), None, (0,)),
    "many planes of 7x7": ((17, 6, 7, 7), 1, (0, 1, 2, 3)),
    "planes of 36x30": ((2, 3, 36, 30), 1, (0, 1, 2, 3)),
    "channels_last, 133": ((2, 133, 5, 3), 1, (0, 2, 3, 1)),
    "one": ((1,), None, (0,)),
    "flat, one short of a segment": ((4095,), None, (0,)),
    "flat, one over a segment": ((4097,), None, (0,)),
    "flat, many chunks": ((70_001,), None, (0,)),
    "rows shorter than a vector": ((70, 9), 0, (0, 1)),
    "rows of 7x7 planes": ((4, 6, 7, 7), 1, (0, 1, 2, 3)),
    "rows of several segments": ((3, 9001), 0, (0, 1)),
    "channels_last, 3": ((2, 3, 31, 33), 1, (0, 2, 3, 1)),
    "channels_last, 10": ((2, 10, 9, 9), 1, (0, 2, 3, 1)),
    "channels_last, 64": ((2, 64, 21, 20), 1, (0, 2, 3, 1)),
    "channels_last, 1031": ((2, 1031, 5, 3), 1, (0, 2, 3, 1)),
    "channels_last, 5000": ((3, 5000, 2, 1), 1, (0, 2, 3, 1)),
    "channels between": ((5, 7, 11), 1, (0, 1, 2)),
}


# The interpreter takes milliseconds for each program: for it those of 20 at most.
LONG = {
    "flat, many chunks",
    "channels_last, 5000",
    "channels_last, 1031",
    "rows of several segments",
}
ON_BACKENDS = [
    (backend, layout)
    for backend in BACKENDS
    for layout in LAYOUTS
    if backend != "triton" or layout not in LONG
]


def of_layout(name, dtype):
    """x, the axis and how many channels it has."""
    shape, axis, order = LAYOUTS[name]
    x = torch.randn([shape[d] for d in order]).permute(*np.argsort(order).tolist()).to(dtype)
    return x, axis, 1 if axis is None else shape[axis]
