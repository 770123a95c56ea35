"""fake_quantize and fake_quantize_all on a GPU: the reference on the CPU, bit for bit."""

import pytest
import torch
from on_gpu import (
    DEVICE,
    DRY_RUN,
    LAYOUTS,
    MARKS,
    SHAPES,
    assert_same,
    backends,
    dtypes,
    layouts,
    reference,
    to_device,
    variant,
)

pytestmark = MARKS


def _fake_quantize_parity(backend, values, grads, args):
    """``values`` and ``grads``: each a pair, on the CPU and on the device, of the same layout."""
    forward, backward = (variant(f"fake_quantize{end}", backend) for end in ("", "_backward"))
    on_device = to_device(*args)
    y = forward(values[1], *on_device)
    assert_same(y, reference("fake_quantize", values[0], *args))
    assert y.stride() == torch.empty_like(values[1]).stride()
    needs = (True, True, True)
    dx, *sums = backward(grads[1], values[1], *on_device, *needs)
    expected = reference("fake_quantize_backward", grads[0], values[0], *args, *needs)
    assert_same(dx, expected[0])
    scale, zero_point, quant_min, quant_max = args[:4]
    longest = max(abs(quant_min), abs(quant_max)) + zero_point.abs().max().item() + 1
    terms = grads[0].double().abs().sum().item()
    for actual, wanted, factor in zip(sums, expected[1:], (longest, scale.max()), strict=True):
        atol = 2**-22 * terms * float(factor)
        torch.testing.assert_close(actual.cpu(), wanted, rtol=2**-22, atol=atol)


def _fake_quantize_case(shape, layout, dtype, axis, drop):
    x, grad = (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)
    channels = 1 if axis is None else shape[axis]
    scale, zero_point = torch.rand(channels) + 0.1, torch.randint(-4, 5, (channels,)).float()
    seed = torch.tensor([2**40 + 7]) if drop else None
    values, grads = ([LAYOUTS[layout](t), LAYOUTS[layout](t.to(DEVICE))] for t in (x, grad))
    if drop:  # now also a gradient of other strides than x
        grads = [grad, grad.to(DEVICE)]
    return values, grads, (scale, zero_point, -8, 7, axis, drop, seed)


@backends
@dtypes
@layouts
@pytest.mark.parametrize("drop", [0.0, 0.5], ids=["", "drop"])
def test_fake_quantize(backend, dtype, layout, drop):
    for shape in SHAPES:
        for axis in (None, 0, 1):
            if shape[axis or 0]:
                case = _fake_quantize_case(shape, layout, dtype, axis, drop)
                _fake_quantize_parity(backend, *case)


@backends
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_small_shapes(backend, layout):
    """Enough for a memory checker, which is slow."""
    for dtype in (torch.float32, torch.bfloat16):
        for axis in (None, 0, 1):
            case = _fake_quantize_case((2, 5, 7, 3), layout, dtype, axis, 0.5 * (axis == 1))
            _fake_quantize_parity(backend, *case)


@backends
@pytest.mark.parametrize("axis", [None, 1])
def test_sliced_and_expanded_scale(backend, axis):
    channels = 1 if axis is None else 5
    x, scale = torch.randn(4, 5, 6), (torch.rand(2 * channels) + 0.1)[::2]
    forward = variant("fake_quantize", backend)
    zero_point = torch.ones(1)
    y = forward(
        x.to(DEVICE),
        scale.repeat_interleave(2).to(DEVICE)[::2],
        zero_point.to(DEVICE).expand(channels),
        -4,
        3,
        axis,
        0.0,
        None,
    )
    args = (x, scale, zero_point.expand(channels), -4, 3, axis, 0.0, None)
    assert_same(y, reference("fake_quantize", *args))


SCALES = (1.0, 0.25, 0.1, 1 / 3, 3e-5, 2.0**-126, 1e-40, 1e30)


@backends
@dtypes
@pytest.mark.parametrize("grid", [(-8, 7, 0.0), (0, 255, 128.0), (-2, 1, -1.5)], ids=str)
def test_values_that_are_hard_to_round(backend, dtype, grid):
    *bounds, zero_point = grid
    ties = torch.arange(-300, 300) + 0.5
    odd = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-45, 2.0**-126, 3e38, -6e4]
    forward = variant("fake_quantize", backend)
    for scale in SCALES[:3] if DRY_RUN else SCALES:
        x = torch.cat([ties * scale, ties.nextafter(ties + 1) * scale, torch.tensor(odd)])
        args = (torch.tensor([scale]), torch.tensor([zero_point]), *bounds, None, 0.0, None)
        y = forward(x.to(DEVICE, dtype), *to_device(*args))
        expected = reference("fake_quantize", x.to(dtype), *args)
        assert_same(y, expected)
        assert torch.equal(y.cpu().signbit(), expected.signbit()), "another zero"


@backends
def test_the_gradient_of_what_is_no_number(backend):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, -0.5, 7.5, -8.5, 1e-40])
    args = (torch.ones(1), torch.zeros(1), -8, 7, None, 0.0, None, True, False, False)
    dx, *_ = variant("fake_quantize_backward", backend)(*to_device(torch.ones(8), x, *args))
    assert_same(dx, reference("fake_quantize_backward", torch.ones(8), x, *args)[0])


@backends
@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1])
@pytest.mark.parametrize("drop", [2.0**-24, 0.25, 1.0])
def test_drops_what_the_cpu_drops(backend, seed, drop):
    x = torch.randn(100 if DRY_RUN else 100_003)
    args = (torch.ones(1), torch.zeros(1), -1, 1, None, drop, torch.tensor(seed))
    y = variant("fake_quantize", backend)(*to_device(x, *args))
    assert_same(y, reference("fake_quantize", x, *args))


def _weights(dtype=torch.float32):
    shapes = [(4, 3, 3, 3), (1, 1, 1, 1), (10, 70), (5,), (33, 17, 3, 3), (0, 4)]
    xs = [torch.randn(shape).to(dtype) for shape in shapes]
    xs[-2] = xs[-2].contiguous(memory_format=torch.channels_last)
    counts = [1 if i == 2 else len(x) for i, x in enumerate(xs)]
    scales = [torch.rand(count) + 0.1 for count in counts]
    zero_points = [torch.randint(-2, 3, (count,)).float() for count in counts]
    return [xs, scales, zero_points, [-8, 0, -2, -128, -8, -8], [7, 255, 1, 127, 7, 7]]


def _lists_to_device(lists):
    return [to_device(*values) for values in lists]


@backends
@dtypes
def test_fake_quantize_all(backend, dtype):
    lists = _weights(dtype)
    on_device = _lists_to_device(lists)
    ys = variant("fake_quantize_all", backend)(*on_device)
    for y, expected in zip(ys, reference("fake_quantize_all", *lists), strict=True):
        assert_same(y, expected)
    grads = [torch.randn(x.shape).to(dtype).as_strided(x.shape, x.stride()) for x in lists[0]]
    grads[0] = grads[0].contiguous(memory_format=torch.channels_last)  # other strides than x
    needs = (True, True, True)
    backward = variant("fake_quantize_all_backward", backend)
    results = backward(to_device(*grads), *on_device, *needs)
    expected = reference("fake_quantize_all_backward", grads, *lists, *needs)
    count = len(grads)
    for dx, wanted in zip(results[:count], expected[:count], strict=True):
        assert_same(dx, wanted)
    for i, (actual, wanted) in enumerate(zip(results[count:], expected[count:], strict=True)):
        terms = 256 * grads[i % count].double().abs().sum().item()
        torch.testing.assert_close(actual.cpu(), wanted, rtol=2**-22, atol=2**-22 * terms)
