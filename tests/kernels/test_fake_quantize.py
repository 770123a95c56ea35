"""fake_quantize: every backend against the reference, bit for bit, and the reference's maths."""

import math
import os
import subprocess
import sys

import hypothesis
import pytest
import torch
from conftest import BACKENDS
from fake_quantize_cases import (
    DTYPE_IDS,
    DTYPES,
    EVERYTHING,
    ON_BACKENDS,
    ROOT,
    assert_parity,
    assert_same,
    backward,
    forward,
    of_layout,
    tensors,
)
from hypothesis import strategies as st

from dfq_kernels import fake_quantize
from dfq_kernels.fake_quantize import fake_quantize_backward_reference, fake_quantize_reference

EXAMPLES = {"compiled": 250, "triton": 40, "cuda": 50}
GRIDS = [(-8, 7, 0.0), (0, 255, 128.0), (-2, 1, -1.0)]
GRIDS_ON_BACKENDS = [
    (backend, grid) for backend in BACKENDS for grid in GRIDS[: 1 if backend == "triton" else None]
]


def _grid(draw, channels, rng):
    """scale, zero_point and the bounds: symmetric or not, 2 to 8 bits."""
    bits = draw(st.integers(2, 8))
    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if draw(st.booleans()) else (0, 2**bits - 1)
    scale = torch.rand(channels, generator=rng) + 2**-8
    zero_point = torch.zeros(channels)
    if draw(st.booleans()):
        zero_point = (torch.rand(channels, generator=rng) * 2 - 1) * 2 ** (bits - 1)
    return scale, zero_point, *bounds


def test_equals_reference(backend):
    @hypothesis.given(data=st.data())
    @hypothesis.settings(deadline=None, max_examples=EXAMPLES[backend], derandomize=True)
    def check(data):
        draw = data.draw
        rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        dtype = draw(st.sampled_from(DTYPES))
        x = draw(tensors(dtype, rng))
        axis = draw(st.sampled_from([None, *range(x.ndim)]))
        grid = _grid(draw, 1 if axis is None else x.shape[axis], rng)
        drop = draw(st.sampled_from([0.0, 0.25, 1.0]))
        seed = torch.tensor(draw(st.integers(-(2**63), 2**63 - 1))) if drop else None
        grad = torch.randn(x.shape, generator=rng).to(dtype)
        if draw(st.booleans()):
            grad = torch.empty_like(x).copy_(grad)
        assert_parity(grad, (x, *grid, axis, drop, seed))

    check()


@pytest.mark.parametrize("drop", [0.0, 0.5], ids=["", "drop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("backend", "layout"), ON_BACKENDS, indirect=["backend"])
def test_equals_reference_at_the_borders(layout, dtype, drop, backend):
    x, axis, channels = of_layout(layout, dtype)
    scale, zero_point = torch.rand(channels) + 0.05, torch.randint(-3, 4, (channels,)).float()
    seed = torch.tensor([2**40 + 7]) if drop else None
    assert_parity(torch.randn_like(x), (x, scale, zero_point, -8, 7, axis, drop, seed))


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["per-tensor", "axis0", "axis1"])
def test_sliced_rows(axis, backend):
    x = torch.randn(6, 50)[:, :37]
    channels = 1 if axis is None else x.shape[axis]
    args = (x, torch.rand(channels) + 0.1, torch.zeros(channels), -4, 3, axis, 0.0, None)
    assert_parity(torch.randn(6, 37), args)


def test_sliced_and_expanded_scale(backend):
    scale = (torch.rand(10) + 0.1)[::2]
    args = (torch.randn(4, 5, 6), scale, torch.ones(1).expand(5), -4, 3, 1, 0.0, None)
    assert_parity(torch.randn(4, 5, 6), args)


@pytest.mark.parametrize(("backend", "grid"), GRIDS_ON_BACKENDS, indirect=["backend"], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3, 2**-14, 1e-40, math.inf])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
def test_every_half_and_bfloat16(dtype, scale, grid, backend):
    """All 65536 bit patterns: NaN, inf, denormals, both zeros."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    quant_min, quant_max, zero_point = grid
    args = (x, torch.tensor([scale]), torch.tensor([zero_point]), quant_min, quant_max)
    if math.isfinite(scale):
        assert_parity(torch.ones_like(x), (*args, None, 0.0, None))
    else:  # 0 * inf: the same NaN
        assert_same(forward(*args, None, 0.0, None), fake_quantize_reference(*args, None, 0, None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-40, -1e-40, -0.0, 3e38])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 0.3, 3e38, -0.5, math.nan])
def test_strange_values(value, scale, backend):
    x = torch.tensor([value, 1.0] * 20)
    args = (x, torch.tensor([scale]), torch.tensor([1.0]), -8, 7, None, 0.0, None)
    assert_same(forward(*args), fake_quantize_reference(*args))
    grads = (torch.ones_like(x), *args, True, False, False)
    assert_same(backward(*grads)[0], fake_quantize_backward_reference(*grads)[0])


@pytest.mark.parametrize("zero_point", [math.nan, math.inf, -math.inf, 2.0**30, 0.5, 1.5, -2.5])
def test_strange_zero_points(zero_point, backend):
    x = torch.linspace(-3, 3, 100)
    args = (x, torch.tensor([0.3]), torch.tensor([zero_point]), -8, 7, None, 0.0, None)
    assert_same(forward(*args), fake_quantize_reference(*args))


@pytest.mark.parametrize("scale", [1.0, 0.25, 2**-10], ids=str)
def test_ties_go_to_even(scale, backend):
    steps = torch.arange(-130, 130).float()
    x = (steps + 0.5) * scale  # exact: every tie of the grid
    even = torch.where(steps % 2 == 0, steps, steps + 1).clamp(-128, 127)
    args = (torch.tensor([scale]), torch.zeros(1), -128, 127, None, 0.0, None)
    assert_same(forward(x, *args), even * scale)
    assert_same(fake_quantize_reference(x, *args), even * scale)


@pytest.mark.parametrize("zero_point", [0.0, 3.0, -7.0])
def test_levels_are_fixed_points(zero_point):
    levels = (torch.arange(-8, 8) - zero_point) * 0.3
    y = fake_quantize(levels, torch.tensor([0.3]), torch.tensor([zero_point]), -8, 7)
    assert torch.equal(y, levels)


def test_zero_has_no_sign(backend):
    x = torch.tensor([-0.1, -0.0, 0.1])
    for zero_point in (0.0, 3.0):
        args = (x, torch.ones(1), torch.tensor([zero_point]), -8, 7, None, 0.0, None)
        assert not forward(*args).signbit().any()
        assert not fake_quantize_reference(*args).signbit().any()


def test_nan_becomes_quant_min_and_inf_the_ends():
    x = torch.tensor([math.nan, math.inf, -math.inf])
    y = fake_quantize(x, torch.tensor([0.5]), torch.tensor([1.0]), -8, 7)
    assert torch.equal(y, torch.tensor([-4.5, 3.0, -4.5]))


def test_agrees_with_pytorch_on_whole_zero_points():
    x = torch.randn(4, 8, 5, 5) * 3
    scale, zero_point = torch.rand(8) + 0.05, torch.randint(-3, 4, (8,)).float()
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 1, -8, 7)
    assert torch.equal(fake_quantize(x, scale, zero_point, -8, 7, axis=1), expected)
    assert torch.equal(fake_quantize(x, scale, zero_point, -8, 7, axis=-3), expected)


def test_the_same_bits_twice(backend):
    x = torch.randn(3, 10, 31, 3)
    args = (x, torch.rand(10) + 0.1, torch.zeros(10), -8, 7, 1, 0.5, torch.tensor([3]))
    first, second = ((forward(*args), *backward(x, *args, *EVERYTHING)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def compiled():
    """The compiled backend, whatever others there are."""
    with BACKENDS["compiled"]():
        yield


@pytest.mark.parametrize(
    "layout", [((400_003,), None), ((300, 4001), 0), ((4, 48, 90, 90), 1)], ids=str
)
def test_threads_do_not_change_a_bit(layout, compiled):
    shape, axis = layout
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = 1 if axis is None else shape[axis]
    args = (x, torch.rand(channels) + 0.1, torch.zeros(channels), -8, 7, axis, 0.5)
    args, grad = (*args, torch.tensor([9])), torch.randn_like(x)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((forward(*args), *backward(grad, *args, *EVERYTHING)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


BITS_OF_EVERY_PATH = """
import hashlib, torch
from dfq_kernels import _backend
forward, backward = (_backend.variant(op, "compiled", "cpu") for op in
                     ("fake_quantize", "fake_quantize_backward"))
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x = torch.randn(3, 37, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, 1e-7])
    for layout in (torch.contiguous_format, torch.channels_last):
        for axis, drop in ((None, 0.0), (1, 0.0), (0, 0.3), (1, 0.7)):
            n = 1 if axis is None else x.shape[axis]
            args = (x.contiguous(memory_format=layout), torch.linspace(0.1, 0.9, n),
                    torch.linspace(-3, 3, n), -8, 7, axis, drop, torch.tensor([2**40 + 5]))
            for result in (forward(*args), *backward(args[0] * 0.1, *args, True, True, True)):
                digest.update(result.nan_to_num(7).float().numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(compiled):
    """v4, v3 and the baseline of x86-64; elsewhere there is one, and it agrees with itself."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", BITS_OF_EVERY_PATH],
            cwd=ROOT,
            env={**os.environ, "DFQ_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("v4", "v3", "v1")
    }
    assert len(digests) == 1
