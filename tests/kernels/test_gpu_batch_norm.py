"""batch_norm and batch_norm_statistics on a GPU: y and gradients of x bit for bit."""

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

EPS = 1e-5
HALF_ULP = 2.0**-24
pytestmark = MARKS


def _assert_as_good(actual, expected, exact, terms):
    """The largest error is at most twice that of the reference, or two roundings of ``terms``."""
    of_reference = (expected.double() - exact).abs().max()
    allowed = torch.maximum(2 * of_reference, 4 * HALF_ULP * terms.abs().max())
    assert (actual.cpu().double() - exact).abs().max() <= allowed


def _batch_norm_case(shape, layout, dtype):
    base, grad = (torch.randn(shape) * 2 + 0.5).to(dtype), torch.randn(shape).to(dtype)
    running_mean, weight, bias = torch.randn(3, shape[1])
    parameters = (running_mean, torch.rand(shape[1]) + 0.1, weight, bias)
    return [[LAYOUTS[layout](t), LAYOUTS[layout](t.to(DEVICE))] for t in (base, grad)], parameters


def _dims(x):
    return [0, *range(2, x.ndim)]


def _assert_statistics(x, running_mean, results, expected):
    if not x.numel():
        return
    var, mean = torch.var_mean(x.double(), _dims(x), correction=0)
    _assert_as_good(results[0], expected[0], mean, x.double().abs().mean(_dims(x)))
    # a variance from sums about running_mean is the difference of two larger numbers
    about = (x.double() - running_mean.view(-1, 1, 1)).square().mean(_dims(x))
    _assert_as_good(results[1], expected[1], var, about)


def _batch_norm_parity(backend, pairs, parameters, relu):
    (x, x_device), (grad, grad_device) = pairs
    forward, backward = (variant(f"batch_norm{end}", backend) for end in ("", "_backward"))
    y, *statistics = forward(x_device, *to_device(*parameters), EPS, relu)
    expected_y, *expected = reference("batch_norm", x, *parameters, EPS, relu)
    assert_same(y, expected_y)
    assert y.stride() == torch.empty_like(x_device).stride()
    _assert_statistics(x, parameters[0], statistics, expected)
    mean, *grads = torch.randn(3, x.shape[1])
    rest = (*grads, x, mean, *parameters, EPS, relu, True)
    on_device = to_device(*grads, x_device, mean, *parameters, EPS, relu, True)
    dx, *sums = backward(grad_device, *on_device)
    expected_dx, *expected = reference("batch_norm_backward", grad, *rest)
    assert_same(dx, expected_dx)
    spread = (x.double() - parameters[0].view(-1, 1, 1)).abs().amax() if x.numel() else 0
    largest = float(spread / parameters[1].sqrt().min()) + 1
    terms = grad.double().abs().sum().item() * largest
    torch.testing.assert_close(
        [value.cpu() for value in sums], expected, rtol=2**-20, atol=2**-22 * terms
    )


@backends
@dtypes
@layouts
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_batch_norm(backend, dtype, layout, relu):
    for shape in SHAPES:
        _batch_norm_parity(backend, *_batch_norm_case(shape, layout, dtype), relu)


@backends
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_small_shapes(backend, layout):
    """Enough for a memory checker, which is slow."""
    for dtype in (torch.float32, torch.bfloat16):
        _batch_norm_parity(backend, *_batch_norm_case((2, 5, 7, 3), layout, dtype), True)


@backends
@dtypes
@layouts
def test_batch_norm_statistics(backend, dtype, layout):
    forward, backward = (
        variant(f"batch_norm_statistics{end}", backend) for end in ("", "_backward")
    )
    for shape in SHAPES:
        ((x, x_device), _), (running_mean, *_) = _batch_norm_case(shape, layout, dtype)
        results = forward(x_device, running_mean.to(DEVICE))
        expected = reference("batch_norm_statistics", x, running_mean)
        _assert_statistics(x, running_mean, results, expected)
        grads = torch.randn(3, shape[1])
        dx = backward(*to_device(*grads[:2], x_device, grads[2]))
        expected = reference("batch_norm_statistics_backward", *grads[:2], x, grads[2])
        assert_same(dx, expected)


@backends
def test_statistics_far_from_zero(backend):
    x = torch.randn(2, 3, 5, 5) if DRY_RUN else torch.randn(16, 24, 40, 40)
    x, channels = x + 1000, x.shape[1]
    forward = variant("batch_norm_statistics", backend)
    mean, var = forward(*to_device(x, torch.full((channels,), 999.5)))
    exact_var, exact_mean = torch.var_mean(x.double(), _dims(x), correction=0)
    assert ((mean.cpu() - exact_mean) / exact_mean).abs().max() <= 2e-7
    assert ((var.cpu() - exact_var) / exact_var).abs().max() <= 2e-7
