"""Mean and variance of batch_norm on every backend: how far from float64."""

import pytest
import torch
from batch_norm_cases import (
    DTYPES,
    HALF_ULP,
    LAYOUTS,
    assert_as_good,
    reference,
    run,
    statistics64,
    tensors,
)

from dfq_kernels import batch_norm, batch_norm_statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "every second"])
def test_statistics_are_those_of_batch_norm(backend, layout, dtype):
    x, parameters = tensors((9, 20, 12, 12) if backend == "compiled" else (9, 3, 6, 6))
    x = LAYOUTS[layout](x.to(dtype))
    _, *expected = batch_norm(x, *parameters)
    torch.testing.assert_close([*batch_norm_statistics(x, parameters[0])], expected, rtol=0, atol=0)


@pytest.mark.parametrize("guess", [1000.0, 999.5, 0.0, -3000.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_statistics_far_from_zero(backend, layout, guess):
    shape = (16, 24, 40, 40) if backend == "compiled" else (4, 2, 28, 28)
    x = LAYOUTS[layout](torch.randn(shape) + 1000)
    exact = statistics64(x)
    measured = batch_norm_statistics(x, torch.full((shape[1],), guess))
    for value, true in zip(measured, exact, strict=True):
        assert ((value - true) / true).abs().max() <= 2e-7


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_variance_of_what_begins_elsewhere(backend, layout):
    """The first image lies far from all others: no guess by what comes first is a good one."""
    x, (running_mean, *_) = tensors((24, 2, 12, 12))
    x[0] += 300
    x = LAYOUTS[layout](x)
    measured = run("batch_norm_statistics", x, running_mean)
    expected = reference("batch_norm_statistics", x, running_mean)
    for value, from_reference, exact in zip(measured, expected, statistics64(x), strict=True):
        assert_as_good(value, from_reference, exact)


@pytest.mark.parametrize("two_values", [True, False], ids=["two values", "normal"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rounding_of_equal_values_does_not_add_up(backend, layout, dtype, two_values):
    """Many 16-bit values are equal, and so would be what is lost in taking a mean from them."""
    x = torch.randn((1031, 40) if backend == "compiled" else (231, 6))
    x = torch.where(x > 0, 64, -63) if two_values else x * 2 + 0.5
    x = LAYOUTS[layout](x.to(dtype))
    exact_mean, _ = statistics64(x)
    mean, _ = batch_norm_statistics(x, torch.zeros_like(x[0], dtype=torch.float32))
    assert ((mean - exact_mean) / exact_mean).abs().max() <= 2 * HALF_ULP


def test_statistics_of_a_constant_are_exact(backend):
    x = torch.full((4, 3, 50, 50) if backend == "compiled" else (7, 3, 10, 11), 0.1)
    mean, var = batch_norm_statistics(x, torch.zeros(3))
    torch.testing.assert_close(mean, x[0, :, 0, 0], rtol=0, atol=0)
    torch.testing.assert_close(var, torch.zeros(3), rtol=0, atol=0)
