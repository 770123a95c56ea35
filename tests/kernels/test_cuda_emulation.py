"""The CUDA kernels on the CPU: that the emulation tells faults, and that no order changes a bit."""

import ctypes
import re

import cuda_emulation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq_kernels import _backend
from dfq_kernels.fake_quantize import fake_quantize_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def emulation():
    with cuda_emulation.use():
        yield cuda_emulation.load()


def _op(name):
    return getattr(torch.ops.dfq_emulated, name)


FAULTS = {
    "misaligned": "no multiple of 16",
    "divergent_barrier": "waits at .*faults.cpp.* for threads that do not come",
    "two_barriers": "for threads that do not come",
    "divergent_shuffle": "for threads that do not come",
    "part_of_a_warp": "no GPU runs such blocks",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told(fault, emulation):
    function = emulation[fault]
    function.restype = ctypes.c_char_p
    for _ in range(2):  # the emulation is as good as new afterwards
        assert re.search(FAULTS[fault], function().decode())


def _filled(function, size):
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    values = torch.zeros(size)
    assert function(values.data_ptr()) is None
    return values


def test_unwritten_shared_memory_is_nan(emulation):
    for _ in range(2):  # also where the block before has written
        values = _filled(emulation.unwritten_shared, 64)
        assert values[0] == 1
        assert values[1:].isnan().all()


def test_what_nobody_waited_for_has_not_come(emulation):
    assert _filled(emulation.unawaited_copy, 64).isnan().all()


@pytest.mark.parametrize(("kernel", "size"), [("race_in_a_block", 64), ("race_of_blocks", 1)])
def test_a_race_shows_in_the_other_order(kernel, size, emulation):
    forwards = _filled(emulation[kernel], size)
    with cuda_emulation.backwards():
        backwards = _filled(emulation[kernel], size)
    assert not torch.equal(forwards, backwards)


LAYOUTS = {  # each way of cutting: shape, dimensions from the slowest, axis
    "flat": ((70_001,), (0,), None),
    "planes 7x7": ((9, 6, 7, 7), (0, 1, 2, 3), 1),
    "planes 8x8": ((9, 40, 8, 8), (0, 1, 2, 3), 1),
    "long rows": ((3, 9000), (0, 1), 0),
    "channels_last, 5": ((9, 5, 11, 13), (0, 2, 3, 1), 1),
    "channels_last, 64": ((4, 64, 9, 9), (0, 2, 3, 1), 1),
    "channels_last, 2500": ((3, 2500, 3, 1), (0, 2, 3, 1), 1),
}


def _tensor(layout, dtype, every=1):
    shape, order, axis = LAYOUTS[layout]
    x = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])
    x = torch.empty_like(x).copy_(x * 2 + 0.5).to(dtype)
    if every > 1:
        x = x.repeat_interleave(every, -1)[..., ::every]
    return x, axis


def _all_bits(x, axis):
    """What every op makes of x, as one list of tensors."""
    channels = 1 if axis is None else x.shape[axis]
    grad = torch.randn_like(x)
    args = (x, torch.rand(channels) + 0.1, torch.randn(channels), -8, 7, axis, 0.3, torch.tensor(7))
    results = [
        _op("fake_quantize")(*args),
        *_op("fake_quantize_backward")(grad, *args, *[True] * 3),
    ]
    rows = axis in (None, 0) and x.is_contiguous()
    if rows:
        lists = ([x, x], [args[1]] * 2, [args[2]] * 2, [-8, 0], [7, 15])
        results += _op("fake_quantize_all")(*lists)
        results += _op("fake_quantize_all_backward")([grad, grad], *lists, *[True] * 3)
    if x.ndim > 2:
        channels = x.shape[1]
        affine = (torch.randn(channels), torch.rand(channels), None, torch.randn(channels), 1e-5)
        y, mean, var = _op("batch_norm")(x, *affine, True)
        results += [y, mean, var, *_op("batch_norm_statistics")(x, affine[0])]
        results += _op("batch_norm_backward")(grad, mean, var, x, mean, *affine, True, True)
        results.append(_op("batch_norm_statistics_backward")(mean, None, x, mean))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [1, 2], ids=["dense", "every second"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_threads_and_blocks_changes_no_bit(layout, every, dtype):
    x, axis = _tensor(layout, dtype, every)
    torch.manual_seed(1)
    forwards = _all_bits(x, axis)
    torch.manual_seed(1)
    with cuda_emulation.backwards():
        backwards = _all_bits(x, axis)
    for a, b in zip(forwards, backwards, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("every", [1, 2], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_value_is_stored_as_pytorch_stores_it(dtype, every):
    """All are their own image where QDrop drops all; on a fine grid all sums are rounded."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).repeat_interleave(every)[::every]
    seed = torch.tensor(0)
    same = _op("fake_quantize")(x, torch.ones(1), torch.zeros(1), -8, 7, None, 1.0, seed)
    torch.testing.assert_close(same, x.contiguous(), rtol=0, atol=0, equal_nan=True)
    for scale in (2.0**-26, 1e-7, 0.0123, 7.0):  # of denormals, and of what overflows
        args = (x, torch.tensor([scale]), torch.zeros(1), -(2**20), 2**20, None, 0.0, None)
        expected = fake_quantize_reference(*args)
        torch.testing.assert_close(_op("fake_quantize")(*args), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_a_tensor_that_begins_off_sixteen_bytes(shift):
    base = torch.randn(5000)
    x = base[shift:]
    args = (x, torch.tensor([0.1]), torch.zeros(1), -8, 7, None, 0.0, None)
    assert torch.equal(_op("fake_quantize")(*args), fake_quantize_reference(*args))


def test_more_tensors_than_a_launch_takes():
    """Over one table, of three types, empty ones and some whose gradient lies otherwise."""
    shapes = [(3, 5), (8, 16), (2, 4, 3, 3), (1, 7), (0, 4), (6, 5000)]
    xs = [torch.randn(shapes[i % 6]).to(DTYPES[i % 3]) for i in range(150)]
    scales = [torch.rand(x.shape[0] if i % 2 else 1) + 0.1 for i, x in enumerate(xs)]
    zeros = [torch.randn_like(scale) for scale in scales]
    grads = [torch.randn_like(x) for x in xs]
    grads[8] = torch.randn(1).expand(xs[8].shape).to(xs[8].dtype)
    lists = (xs, scales, zeros, [-8] * 150, [7] * 150)
    ys = _op("fake_quantize_all")(*lists)
    gradients = _op("fake_quantize_all_backward")(grads, *lists, *[True] * 3)
    for i, x in enumerate(xs):
        args = (x, scales[i], zeros[i], -8, 7, None if len(scales[i]) == 1 else 0, 0.0, None)
        assert torch.equal(ys[i], _op("fake_quantize")(*args))
        single = _op("fake_quantize_backward")(grads[i], *args, *[True] * 3)
        assert torch.equal(gradients[i], single[0])
        for ours, one in zip(gradients[150 + i :: 150], single[1:], strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-6, atol=1e-6)


def _check_blocks(emulation, *shape):
    """What is wrong with csrc/core/blocks.h for a shape, and how it cuts it."""
    numbers = (ctypes.c_int64 * 4)()
    emulation.check_blocks.restype = ctypes.c_char_p
    error = emulation.check_blocks(*map(ctypes.c_int64, shape[:3]), shape[3], numbers)
    return error.decode(), list(numbers)


CUTS = {  # (periods, channels, run, lanes): pieces, columns, splits, steps
    (1, 1, 40, 4): (1, 1, 1, 1),
    (1, 1, 70_001, 4): (1, 1, 69, 1),
    (8, 3, 49, 8): (1, 1, 1, 1),
    (40, 64, 49, 4): (1, 4, 40, 1),
    (2, 3, 9000, 4): (6, 1, 9, 1),
    (500, 1031, 1, 8): (1, 5, 8, 8),
    (3000, 64, 1, 4): (1, 1, 188, 1),
}


@pytest.mark.parametrize("shape", CUTS, ids=str)
def test_each_way_of_cutting(shape, emulation):
    assert _check_blocks(emulation, *shape) == ("", list(CUTS[shape]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    periods=st.one_of(st.integers(1, 12), st.integers(1, 400)),
    channels=st.one_of(st.integers(1, 12), st.integers(1, 3000)),
    run=st.one_of(st.integers(1, 12), st.integers(1, 9000)),
    lanes=st.sampled_from([4, 8]),
)
def test_blocks_hold_every_position_once(periods, channels, run, lanes):
    while periods * channels * run > 60_000:  # the check takes a while for each
        periods, channels, run = (max(1, n * 2 // 3) for n in (periods, channels, run))
    error, _ = _check_blocks(cuda_emulation.load(), periods, channels, run, lanes)
    assert error == ""


def test_every_op_with_cuda_kernels_is_emulated():
    for op in ("fake_quantize", "batch_norm", "batch_norm_statistics", "fake_quantize_all"):
        for name in (op, f"{op}_backward"):
            assert _backend.implementation(name, "cpu") == getattr(torch.ops.dfq_emulated, name)
