"""qlinear: every backend against the reference, every product, and sums at the int32 bound."""

import hypothesis
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from hypothesis import strategies as st
from integer_cases import (
    X_ZEROS,
    assert_same,
    epilogues,
    int8,
    need_backend,
    weights,
)

from dfq_kernels import _backend
from dfq_kernels.integer import Epilogue, Int8Grid, Residual, integer_weight, prepack
from dfq_kernels.qlinear import qlinear

EXAMPLES = {"compiled": 150, "triton": 15, "cuda": 60}
EVERY_INT8 = torch.arange(-128, 128).to(torch.int8)


@pytest.fixture(params=[*BACKENDS, "reference"])
def either(request):
    """Each implementation in turn is in force."""
    with BACKENDS.get(request.param, lambda: _backend.use("reference"))():
        need_backend("qlinear")
        yield request.param


def test_equals_reference(backend):
    need_backend("qlinear")

    @hypothesis.given(data=st.data())
    @hypothesis.settings(deadline=None, max_examples=EXAMPLES[backend], derandomize=True)
    def check(data):
        draw = data.draw
        rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        rows = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 13, 14, 15, 40]))
        inputs = draw(st.sampled_from([1, 3, 4, 16, 63, 64, 65, 200]))
        weight = draw(weights(rng, (draw(st.sampled_from([1, 10, 16, 17, 32, 40])), inputs)))
        epilogue = draw(epilogues(rng, weight, (rows, weight.shape[0])))
        x, x_zero = int8((rows, inputs), rng), draw(st.sampled_from(X_ZEROS))
        with _backend.use("reference"):
            expected = qlinear(x, weight, epilogue, x_zero=x_zero)
        assert_same(qlinear(x, weight, epilogue, x_zero=x_zero), expected)
        ready = prepack(weight)
        if ready.prepacked is not None:
            assert_same(qlinear(x, ready, epilogue, x_zero=x_zero), expected)

    check()


@pytest.mark.parametrize("x_zero", X_ZEROS)
def test_every_product(x_zero, either):
    """All 256 x 256, with every zero of the weights beside them."""
    for zero in (0, -128, 127):
        zeros = torch.full((256,), zero, dtype=torch.int8) if zero else None
        weight = integer_weight(EVERY_INT8[:, None], zeros)
        y = qlinear(EVERY_INT8[:, None], weight, Epilogue(torch.ones(256)), x_zero=x_zero)
        expected = (EVERY_INT8.int()[:, None] - x_zero) * (EVERY_INT8.int() - zero)
        assert torch.equal(y, expected.float())


BOUNDS = {  # K, x, x_zero, weight, its zero: the largest sums that int32 holds
    "largest": (65793, -128, 127, -128, None),
    "smallest": (65793, 127, -128, -128, None),
    "largest with zeros": (33025, 127, -128, 127, -128),
    "smallest with zeros": (33025, -128, 127, 127, -128),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_sums_at_the_bound(bound, either):
    size, x, x_zero, value, zero = BOUNDS[bound]
    zeros = None if zero is None else torch.tensor([zero], dtype=torch.int8)
    weight = integer_weight(torch.full((1, size), value, dtype=torch.int8), zeros)
    y = qlinear(
        torch.full((2, size), x, dtype=torch.int8),
        weight,
        Epilogue(torch.ones(1)),
        x_zero=x_zero,
    )
    expected = size * (x - x_zero) * (value - (zero or 0))
    assert abs(expected) <= 2**31 - 1
    assert y.tolist() == [[float(np.float32(expected))]] * 2
    if zero is None:
        longer = integer_weight(torch.zeros(1, size + 1, dtype=torch.int8))
        with pytest.raises(ValueError, match="may leave int32; at most 65793 are safe"):
            qlinear(torch.zeros(1, size + 1, dtype=torch.int8), longer, Epilogue(torch.ones(1)))


@pytest.mark.parametrize("sum_", [2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**25 + 2, 2**25 + 6])
def test_sums_beyond_2_to_24_round_to_even(sum_, either):
    """float32 holds none of these; the ties among them go to even."""
    quotient, rest = divmod(abs(sum_), 127 * 127)
    x = torch.full((1, quotient + 2), 127, dtype=torch.int8)
    weight = torch.full((1, quotient + 2), 127, dtype=torch.int8)
    x[0, -1], weight[0, -2] = 1, rest // 127
    weight[0, -1] = rest % 127
    weight = weight if sum_ > 0 else -weight
    y = qlinear(x, integer_weight(weight), Epilogue(torch.ones(1)))
    assert y.item() == float(np.float32(sum_))


def test_core_finishes_alike():
    arithmetic = pytest.importorskip("dfq_kernels._arithmetic")
    sums = np.random.default_rng(0).integers(-(2**31), 2**31, 10_000).astype(np.int32)
    multiplier, bias = np.float32(1.7e-8), np.float32(0.31)
    expected = sums.astype(np.float32) * multiplier + bias
    found = arithmetic.rescale(sums, multiplier, bias)
    np.testing.assert_array_equal(found, expected)
    added = np.arange(-255, 256).astype(np.float32)
    found = arithmetic.add_residual(expected[:511], added, np.float32(0.3))
    np.testing.assert_array_equal(found, expected[:511] + added * np.float32(0.3))


@pytest.mark.parametrize("grid", [(0, -128, 127), (-128, -128, 127), (5, -8, 7), (127, 0, 127)])
def test_core_requantizes_alike(grid):
    arithmetic = pytest.importorskip("dfq_kernels._arithmetic")
    zero, low, high = grid
    values = np.concatenate([np.arange(-600, 600) / 2, [1e30, -1e30, np.inf, -np.inf, np.nan]])
    with np.errstate(invalid="ignore"):
        expected = np.clip(np.rint(values) + zero, low, high)
    expected[-1] = low  # NaN
    found = arithmetic.requantize(values.astype(np.float32), zero, low, high)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("grid", [[], [0, -8, 7]], ids=["float", "int8"])
def test_opcheck(grid):
    weight = prepack(integer_weight(int8((6, 9), None, -8, 7), four_bits=True))
    values = (weight.values, int8((6,), None), weight.prepacked, 3)
    epilogue = (torch.rand(6), torch.rand(6), int8((2, 3, 6), None), 0.5, 1, True, grid)
    args = (int8((2, 3, 9), None), *values, *epilogue)
    torch.library.opcheck(torch.ops.dfq.qlinear.default, args)


X = torch.ones(3, 4, dtype=torch.int8)
WEIGHT = integer_weight(torch.ones(2, 4, dtype=torch.int8))
ONES = Epilogue(torch.ones(2))
MISTAKES = {
    "float x": ((X.float(), WEIGHT, ONES), "x must be int8, or .* got torch.float32"),
    "layout": ((X.T.contiguous().T, WEIGHT, ONES), "x must be contiguous"),
    "features": ((X[:, :3].contiguous(), WEIGHT, ONES), r"got \[3, 3\] and \[2, 4\]"),
    "bias": (
        (X, WEIGHT, Epilogue(torch.ones(2), torch.ones(2).int())),
        r"bias must be .* got torch\.int32",
    ),
    "residual": (
        (X, WEIGHT, Epilogue(torch.ones(2), residual=Residual(X, 1.0), grid=Int8Grid())),
        r"residual must be int8 of shape \[3, 2\]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    args, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        qlinear(*args)
