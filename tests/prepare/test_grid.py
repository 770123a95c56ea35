import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfq.prepare.grid import range_to_scale, to_codes, to_grid
from dfq.types import QuantSpec

bits = st.integers(2, 8)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
SPECS = [
    pytest.param(QuantSpec(4), id="symmetric"),
    pytest.param(QuantSpec(3, signed=False), id="unsigned"),
    pytest.param(QuantSpec(4, symmetric=False), id="asymmetric"),
    pytest.param(QuantSpec(8, symmetric=False, signed=False), id="asymmetric-unsigned-8"),
    pytest.param(QuantSpec(2, midrise=True), id="midrise"),
    pytest.param(QuantSpec(4, axis=0), id="per-channel"),
    pytest.param(QuantSpec(2, axis=1, midrise=True), id="midrise-per-channel"),
    pytest.param(QuantSpec(5, symmetric=False, axis=1), id="asymmetric-per-channel"),
]


def _scale(low, high, spec):
    return range_to_scale(torch.tensor([low]), torch.tensor([high]), spec)


@given(bits, floats, floats, st.booleans())
def test_asymmetric_grid_holds_zero_exactly(bits, low, high, signed):
    spec = QuantSpec(bits, symmetric=False, signed=signed)
    scale, zero_point = _scale(min(low, high), max(low, high), spec)
    assert 0 < scale.item() < float("inf")
    assert spec.quant_min <= zero_point.item() <= spec.quant_max
    assert zero_point.item() == round(zero_point.item())
    assert to_grid(torch.zeros(1), scale, zero_point, spec).item() == 0


@given(bits, st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_asymmetric_grid_covers_the_range(bits, low, high):
    spec = QuantSpec(bits, symmetric=False)
    low, high = min(low, high), max(low, high)
    scale, zero_point = _scale(low, high, spec)
    x = torch.linspace(low, high, 101)
    # the zero point is rounded to a code, so one end may lie half a step beyond the last level
    error = (x - to_grid(x, scale, zero_point, spec)).abs().max()
    assert error <= scale.item() * 0.5 * (1 + 1e-5) + 1e-5 * max(abs(low), abs(high))


@pytest.mark.parametrize(
    ("low", "high", "scale"),
    [(-1.0, 3.5, 0.5), (-8.0, 3.5, 1.0), (-8.0, -1.0, 1.0), (2.0, 7.0, 1.0)],
    ids=["upper end wider", "lower end wider", "all negative", "all positive"],
)
def test_symmetric_grid_is_the_finest_that_covers(low, high, scale):
    assert _scale(low, high, QuantSpec(4))[0].item() == scale


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [0.0, -3.0, 3.0], ids=["zero", "negative", "positive"])
def test_constant_channel_gets_a_positive_finite_scale(spec, value):
    scale, zero_point = _scale(value, value, spec)
    assert 0 < scale.item() < float("inf")
    assert (1 / scale).isfinite().all()
    quantized = to_grid(torch.full((1, 1), value), scale, zero_point, spec).item()
    if value >= 0 or spec.signed or not spec.symmetric:  # the unsigned symmetric grid has no -3
        assert quantized == pytest.approx(value, abs=1e-6)


def test_two_bit_midrise_has_four_even_levels():
    spec = QuantSpec(2, midrise=True)
    scale = torch.tensor([0.3])
    x = torch.linspace(-2, 2, 1001)
    levels = to_grid(x, scale, torch.zeros(1), spec).unique()
    assert torch.equal(levels, torch.tensor([-1.5, -0.5, 0.5, 1.5]) * scale)


@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_the_integers_behind_the_values(spec):
    x = torch.randn(5, 7, 3)
    channels = 1 if spec.axis is None else x.shape[spec.axis]
    scale, zero_point = range_to_scale(
        torch.full((channels,), -1.7), torch.linspace(0.5, 2.5, channels), spec
    )
    codes = to_codes(x, scale, zero_point, spec)
    assert codes.dtype == (torch.int8 if spec.signed else torch.uint8)
    assert codes.min() == spec.quant_min  # x reaches beyond both ends
    assert codes.max() == spec.quant_max
    shape = [1, 1, 1]
    shape[spec.axis or 0] = -1
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    half = 0.5 if spec.midrise else 0.0
    values = (codes.float() - zero_point + half) * scale
    assert torch.equal(values, to_grid(x, scale.flatten(), zero_point.flatten(), spec))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_values_keep_the_dtype(spec, dtype):
    x = torch.randn(4, 4).to(dtype)
    channels = 1 if spec.axis is None else 4
    scale = torch.full((channels,), 0.25)
    values = to_grid(x, scale, torch.zeros(channels), spec)
    assert values.dtype == dtype
    assert torch.equal(values.float(), to_grid(x.float(), scale, torch.zeros(channels), spec))
