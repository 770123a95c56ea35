import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfq.prepare.grid import range_to_scale, to_grid
from dfq.prepare.observer import EmaMinMax
from dfq.prepare.quantizer import Quantizer
from dfq.types import InputError, QuantSpec

SPECS = [
    pytest.param(QuantSpec(4), id="symmetric"),
    pytest.param(QuantSpec(3, signed=False), id="unsigned"),
    pytest.param(QuantSpec(4, symmetric=False), id="asymmetric"),
    pytest.param(QuantSpec(2, midrise=True), id="midrise"),
    pytest.param(QuantSpec(4, axis=0), id="per-channel"),
    pytest.param(QuantSpec(2, axis=0, midrise=True), id="midrise-per-channel"),
]


def _ready(spec, channels=6):
    """A learned quantizer whose grid is narrower than a normal tensor."""
    channels = 1 if spec.axis is None else channels
    quantizer = Quantizer(spec, channels)
    ends = torch.linspace(0.7, 1.3, channels)
    quantizer.set_qparams(*range_to_scale(-ends, ends, spec))
    return quantizer


def _composite(x, scale, zero_point, spec):
    """LSQ in float64 by autograd: rounding passes the gradient, the clamp stops it."""
    if spec.axis is not None:
        scale, zero_point = scale[:, None], zero_point[:, None]
    half = 0.5 if spec.midrise else 0.0
    position = x / scale - half
    rounded = position + (position.round() - position).detach()
    codes = (rounded + zero_point).clamp(spec.quant_min, spec.quant_max)
    return (codes - zero_point + half) * scale


@pytest.mark.parametrize("spec", SPECS)
def test_forward_is_the_grid_at_exactly_the_scale(spec):
    quantizer = _ready(spec)
    x = torch.randn(6, 50)
    scale = quantizer.scale.detach()
    assert torch.equal(quantizer(x), to_grid(x, scale, quantizer.zero_point, spec))


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_lsq(spec):
    quantizer = _ready(spec)
    x = torch.randn(6, 50, requires_grad=True)
    upstream = torch.randn(6, 50)
    quantizer(x).backward(upstream)

    x64 = x.detach().double().requires_grad_()
    scale64 = quantizer.scale.detach().double().requires_grad_()
    values = _composite(x64, scale64, quantizer.zero_point.double(), spec)
    values.backward(upstream.double())
    factor = (x.numel() / scale64.numel() * spec.quant_max) ** -0.5
    expected = scale64.grad * factor * scale64  # d scale / d log_scale = scale
    assert torch.equal(x.grad.double(), x64.grad)
    torch.testing.assert_close(quantizer.log_scale.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().min() > 1e-4


@pytest.mark.parametrize("spec", SPECS)
def test_levels_are_fixed_points_and_all_there_is(spec):
    quantizer = _ready(spec)
    levels = quantizer.levels.detach()
    channels = 6 if spec.axis == 0 else 1
    assert levels.shape == (channels, 2**spec.bits)
    assert torch.equal(quantizer(levels), levels)
    values = quantizer(torch.linspace(-9, 9, 1000).expand(channels, 1000)).detach()
    assert all(torch.equal(v.unique(), row) for v, row in zip(values, levels, strict=True))


@pytest.mark.parametrize("step", [-1e3, -5.0, 5.0])
def test_scale_stays_positive_whatever_the_optimizer_does(step):
    quantizer = _ready(QuantSpec(4))
    with torch.no_grad():
        quantizer.log_scale.add_(step)
    x = torch.randn(100)
    assert quantizer.scale.item() > 0
    assert (1 / quantizer.scale).isfinite().all()
    assert quantizer(x).isfinite().all()


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_a_step_of_adam_is_relative_to_the_scale(size):
    quantizer = Quantizer(QuantSpec(4))
    quantizer.set_qparams(torch.tensor([size]), torch.zeros(1))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    quantizer(size * torch.randn(100)).square().mean().mul(size**-2).backward()
    optimizer.step()
    assert abs(quantizer.scale.item() / size - 1) == pytest.approx(0.01, rel=0.02)


def test_no_scale_yet_is_an_error():
    with pytest.raises(InputError, match="calibrate"):
        Quantizer(QuantSpec(4))(torch.ones(3))


def test_state_dict_carries_the_scale_and_that_there_is_one():
    spec = QuantSpec(4, axis=0)
    quantizer, other = _ready(spec), Quantizer(spec, 6)
    state = quantizer.state_dict()
    assert set(state) == {"scale", "zero_point"}
    torch.testing.assert_close(state["scale"].float(), quantizer.scale.detach())
    other.load_state_dict(state)
    assert set(state) == {"scale", "zero_point"}
    x = torch.randn(6, 9)
    assert torch.equal(other(x), quantizer(x))
    other.load_state_dict(Quantizer(spec, 6).state_dict())
    with pytest.raises(InputError):
        other(x)


@given(st.floats(-60, 60, width=32))
def test_what_is_learned_survives_a_state_dict_bit_for_bit(value):
    quantizer, other = Quantizer(QuantSpec(4)), Quantizer(QuantSpec(4))
    torch.nn.init.constant_(quantizer.log_scale, value)
    other.load_state_dict(quantizer.state_dict())
    assert other.log_scale.item() == value or abs(value) < 1e-8  # a scale next to 1


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_scale_is_the_one_that_was_set(scale):
    quantizer = Quantizer(QuantSpec(4))
    quantizer.set_qparams(torch.tensor([scale]), torch.zeros(1))
    assert quantizer.scale.item() == pytest.approx(scale, rel=1e-5)


def test_dynamic_scale_follows_the_tensor():
    spec = QuantSpec(4, symmetric=False, axis=0)
    quantizer = Quantizer(spec, 3, mode="dynamic")
    for size in (1.0, 10.0):
        x = torch.randn(3, 40) * size
        expected = to_grid(x, *range_to_scale(x.amin(1), x.amax(1), spec), spec)
        assert torch.equal(quantizer(x), expected)
    assert not quantizer.state_dict()
    with pytest.raises(InputError, match="qparams"):
        _ = quantizer.levels


def test_dynamic_gradient_passes_everywhere():
    quantizer = Quantizer(QuantSpec(2, symmetric=False, axis=0), 2, mode="dynamic")
    x = torch.randn(2, 30, requires_grad=True)
    upstream = torch.randn(2, 30)
    quantizer(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_average_is_taken_while_observing_only():
    quantizer, average = Quantizer(QuantSpec(4, symmetric=False), mode="ema"), EmaMinMax()
    with pytest.raises(InputError):
        quantizer(torch.ones(3))
    quantizer.observing = True
    for _ in range(5):
        x = torch.randn(20)
        values = quantizer(x)
        average.update(x.amin().reshape(1), x.amax().reshape(1))
        expected = range_to_scale(average.low, average.high, quantizer.spec)
        torch.testing.assert_close((quantizer.scale, quantizer.zero_point), expected)
        assert torch.equal(values, to_grid(x, *quantizer.qparams(x), quantizer.spec))
    quantizer.observing = False
    quantizer(100 * torch.randn(20))
    torch.testing.assert_close((quantizer.scale, quantizer.zero_point), expected)


def test_average_passes_the_gradient_everywhere():
    quantizer = Quantizer(QuantSpec(4, symmetric=False), mode="ema")
    quantizer.observe(torch.randn(20))
    x = (100 * torch.randn(20)).requires_grad_()
    upstream = torch.randn(20)
    quantizer(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_average_continues_from_a_state_dict():
    quantizer = Quantizer(QuantSpec(4, symmetric=False), mode="ema")
    quantizer.observing = True
    quantizer(torch.randn(30))
    other = Quantizer(quantizer.spec, mode="ema")
    other.load_state_dict(quantizer.state_dict())
    other.observing = True
    x = 3 * torch.randn(30)
    assert torch.equal(other(x), quantizer(x))
    assert torch.equal(other.scale, quantizer.scale)


def test_bypass_returns_the_tensor_itself():
    quantizer = _ready(QuantSpec(4))
    quantizer.bypass = True
    x = torch.randn(5)
    assert quantizer(x) is x


def _tensors(module):
    return [*module.named_parameters(), *module.named_buffers()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["learned", "ema"])
def test_a_cast_of_the_model_leaves_the_scale_its_bits(dtype, mode):
    quantizer = Quantizer(QuantSpec(4), mode=mode)
    quantizer.set_qparams(torch.tensor([0.1234567]), torch.zeros(1))
    before = copy.deepcopy(dict(_tensors(quantizer)))
    quantizer.to(dtype)
    for name, value in _tensors(quantizer):
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    if mode == "learned":
        assert isinstance(quantizer.log_scale, torch.nn.Parameter)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "lsq"}, "mode must be"),
        ({"channels": 3}, "one scale"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        Quantizer(QuantSpec(4), **arguments)


def test_repr_says_the_grid():
    text = repr(Quantizer(QuantSpec(2, axis=0, midrise=True), 3))
    assert "2-bit symmetric signed midrise per channel of axis 0, learned scale" in text
