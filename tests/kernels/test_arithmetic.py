"""csrc/core/arithmetic.h, through pybind11, against NumPy and exact fractions; it is the spec."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dfq_kernels.fake_quantize import fake_quantize_backward_reference, philox

arithmetic = pytest.importorskip(
    "dfq_kernels._arithmetic", reason="compile it with `python -m dfq_kernels.build`"
)
GRIDS = [  # scale, zero_point, quant_min, quant_max
    (1.0, 0.0, -8, 7),
    (0.25, 3.0, 0, 15),
    (0.3, -1.0, -2, 1),
    (2.0**-14, 128.0, 0, 255),
    (1e-40, 0.0, -128, 127),
    (3e38, 0.0, -128, 127),
]


def _every(dtype):
    """All 65536 values of a 16-bit type, as float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).float().numpy()


def _codes(x, scale, zero_point, quant_min, quant_max):
    """The definition, clamped after rounding and in float64: nothing there can overflow."""
    with np.errstate(all="ignore"):
        ratio = x * (np.float32(1) / np.float32(scale))
        code = np.rint(ratio).astype(np.float64) + np.rint(zero_point)
    return np.where(np.isnan(code), quant_min, np.clip(code, quant_min, quant_max))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_value(dtype, grid):
    x = _every(dtype)
    assert np.isnan(x).any()
    assert np.isinf(x).any()
    expected = _codes(x, *grid) - grid[1]
    np.testing.assert_array_equal(arithmetic.quantize(x, *grid), expected)
    with np.errstate(over="ignore"):
        values = expected.astype(np.float32) * np.float32(grid[0])
    np.testing.assert_array_equal(arithmetic.fake_quantize(x, *grid), values)


@pytest.mark.parametrize("exponent", range(-20, 21, 5))
def test_every_tie(exponent):
    """(k + 1/2) * scale is exact for these scales, and so is the ratio: each goes to even."""
    scale = 2.0**exponent
    k = np.arange(-300, 300)
    x = ((k + 0.5) * scale).astype(np.float32)
    even = np.where(k % 2 == 0, k, k + 1)
    np.testing.assert_array_equal(arithmetic.quantize(x, scale, 0, -128, 127), even.clip(-128, 127))
    for towards, nearest in ((-np.inf, k), (np.inf, k + 1)):  # one bit off is no tie
        beside = np.nextafter(x, np.float32(towards))
        codes = arithmetic.quantize(beside, scale, 0, -128, 127)
        np.testing.assert_array_equal(codes, nearest.clip(-128, 127))


def test_the_product_is_rounded_before_it_is_rounded():
    """A fused multiply-add would round x * inverse + shift once: other codes for some inputs."""
    scale = np.float32(0.1)
    inverse = Fraction(float(np.float32(1) / scale))
    k = np.arange(-120, 120)
    x = ((k + 0.5) * float(scale)).astype(np.float32)
    once = [round(Fraction(float(value)) * inverse) for value in x]
    twice = np.rint(x * np.float32(inverse)).astype(int)
    assert (np.array(once) != twice).any()  # or the test could not tell
    np.testing.assert_array_equal(arithmetic.quantize(x, scale, 0, -128, 127), twice)


def test_round_half_even_up_to_its_limit():
    rng = np.random.default_rng(0)
    halves = np.concatenate([np.arange(-(2**22), -(2**22) + 4000), np.arange(-4000, 4000)]) / 2
    values = np.concatenate([halves, -halves, rng.uniform(-(2**22), 2**22, 100_000)])
    values = values.astype(np.float32)
    np.testing.assert_array_equal(arithmetic.round_half_even(values), np.rint(values))
    assert not np.signbit(arithmetic.round_half_even(np.float32([-0.0, -0.25, -0.5]))).any()


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 2.0**20, 2.0**24, -(2.0**30), 2.5, -1.5]
)
def test_zero_point_is_rounded_and_bounded(value):
    bound = 2.0**20
    zero = -bound if np.isnan(value) else np.rint(np.clip(value, -bound, bound))
    ends = arithmetic.quantize(np.float32([-np.inf, np.inf]), 1, value, -8, 7)
    np.testing.assert_array_equal(ends, [-8 - zero, 7 - zero])


@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
def test_gradients_of_every_half(grid):
    x = _every(torch.float16)
    grad = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    steps = _codes(x, *grid) - grid[1]
    with np.errstate(all="ignore"):
        ratio = x * (np.float32(1) / np.float32(grid[0]))
        rounded = np.rint(ratio) + grid[1]
    inside = (rounded >= grid[2]) & (rounded <= grid[3])
    np.testing.assert_array_equal(
        arithmetic.gradient_of_x(grad, x, *grid), np.where(inside, grad, 0)
    )
    terms = grad * (steps.astype(np.float32) - np.where(inside, ratio, 0))
    np.testing.assert_array_equal(arithmetic.gradient_of_scale(grad, x, *grid), terms)
    clamped = np.where(inside, 0, grad)
    np.testing.assert_array_equal(arithmetic.gradient_if_clamped(grad, x, *grid), clamped)


def test_gradients_are_those_of_the_reference():
    x, grad = torch.randn(1000) * 3, torch.randn(1000)
    args = (torch.tensor([0.3]), torch.tensor([1.0]), -8, 7, None, 0.0, None, True, True, True)
    _, dscale, dzero_point = fake_quantize_backward_reference(grad, x, *args)
    numbers = (grad.numpy(), x.numpy(), 0.3, 1.0, -8, 7)
    scale = arithmetic.gradient_of_scale(*numbers).astype(np.float64).sum()
    clamped = arithmetic.gradient_if_clamped(*numbers).astype(np.float64).sum()
    assert np.float32(scale) == dscale.numpy()
    assert np.float32(-np.float32(0.3) * clamped) == dzero_point.numpy()


KNOWN = [  # Random123 1.14, kat_vectors: philox4x32 10: counter, key, words
    ((0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**64 - 1, 2**64 - 1), 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x85A308D3243F6A88, 0x0370734413198A2E),
        0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, words):
    low, high = (np.uint64(half) for half in counter)
    ours = arithmetic.philox(np.uint64(key), low, high, np.arange(4))
    assert [f"{word:08x}" for word in ours] == words.split()


def test_philox_of_the_reference():
    assert [f"{word:08x}" for word in philox(torch.tensor(0), torch.zeros(1).long())[0]] == (
        KNOWN[0][2].split()
    )
    seeds = torch.randint(-(2**63), 2**63 - 1, (20,))
    counters = torch.randint(0, 2**62, (50,))
    for seed in seeds:
        ours = arithmetic.philox(
            seed.numpy().view(np.uint64), counters.numpy().view(np.uint64)[:, None], 0, np.arange(4)
        )
        np.testing.assert_array_equal(ours, philox(seed, counters).numpy())


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
def test_dropped_compares_24_bits(drop):
    threshold = int(drop * 2**24 + 0.5)
    edges = np.array([threshold - 1, threshold]).clip(0, 2**24 - 1)
    words = np.concatenate([edges << 8, (edges << 8) | 255, [0, 2**32 - 1]])
    expected = (words >> 8) < threshold
    np.testing.assert_array_equal(arithmetic.dropped(words.astype(np.uint32), drop), expected)
