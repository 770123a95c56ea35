import pytest
import torch
from torch import nn

from dfq.prepare.layers import QConv2d, QLinear
from dfq.prepare.observer import POWER, search_scale
from dfq.prepare.quantizer import Quantizer
from dfq.prepare.rounding import SoftRounding, soft_rounding
from dfq.types import InputError, QuantSpec

GRIDS = [
    QuantSpec(4, axis=0),
    QuantSpec(3),
    QuantSpec(2, axis=0, midrise=True),
    QuantSpec(4, symmetric=False, signed=False, axis=0),
]


def _layer(spec, calibrated=True):
    torch.manual_seed(4)
    layer = QConv2d(3, 8, 3, weight_spec=spec)
    if calibrated:
        layer.weight_quantizer.set_qparams(*search_scale(layer.weight, spec))
    return layer


def _column(values, layer):
    return values.detach().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_decided_up_and_down_it_is_ceil_and_floor(spec):
    layer = _layer(spec)
    quantizer = layer.weight_quantizer
    soft = SoftRounding(layer.weight, quantizer)
    half = 0.5 if spec.midrise else 0.0
    scale, zero = _column(quantizer.scale, layer), _column(quantizer.zero_point, layer)
    steps = layer.weight.detach() / scale - half
    for decision, rounded in ((100.0, steps.floor() + 1), (-100.0, steps.floor())):
        soft.logits.data.fill_(decision)
        codes = (rounded + zero).clamp(spec.quant_min, spec.quant_max)
        expected = (codes - zero + half) * scale
        torch.testing.assert_close(soft(layer.weight), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(soft.hard(), expected, rtol=1e-6, atol=1e-7)
        assert soft.penalty(2.0).item() == 0


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_it_starts_at_the_weight_itself_inside_the_grid_and_hard_at_nearest(spec):
    layer = _layer(spec)
    soft = SoftRounding(layer.weight, layer.weight_quantizer)
    nearest = layer.weight_quantizer(layer.weight).detach()
    levels = layer.weight_quantizer.levels.reshape(-1, 2**spec.bits)
    low, high = levels[:, :1], levels[:, -1:]
    rows = layer.weight.detach().flatten(1)
    inside = (rows > low) & (rows < high)
    assert inside.float().mean() > 0.5
    start = soft(layer.weight).detach().flatten(1)
    torch.testing.assert_close(start[inside], rows[inside], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(soft.hard(), nearest, rtol=1e-6, atol=1e-7)


def test_the_base_does_not_move_with_the_scale():
    """One code of AdaRound jumps when its scale does; here w^ is proportional to the scale."""
    layer = _layer(GRIDS[0])
    soft = SoftRounding(layer.weight, layer.weight_quantizer)
    base, before = soft.base.clone(), soft.hard()
    with torch.no_grad():
        layer.weight_quantizer.log_scale += 0.4  # over half a step for codes of 2 and more
    assert torch.equal(soft.base, base)
    torch.testing.assert_close(soft.hard(), before * torch.e**0.4)


def test_scale_and_rounding_learn_together():
    """The gradient of the scale's logarithm is the quantized weight itself."""
    layer = _layer(GRIDS[0])
    soft = SoftRounding(layer.weight, layer.weight_quantizer)
    value = soft(layer.weight)
    value.sum().backward()
    gradient = layer.weight_quantizer.log_scale.grad
    torch.testing.assert_close(gradient, value.detach().sum((1, 2, 3)))
    share = torch.sigmoid(soft.logits.detach())
    slope = 1.2 * share * (1 - share)
    codes = soft.base + soft.share().detach()
    slope[(codes < -8) | (codes > 7)] = 0
    scale = _column(layer.weight_quantizer.scale, layer)
    torch.testing.assert_close(soft.logits.grad, slope * scale)


def test_penalty_counts_the_undecided():
    layer = _layer(GRIDS[0])
    soft = SoftRounding(layer.weight, layer.weight_quantizer)
    soft.logits.data.zero_()  # h = 1/2 everywhere
    assert soft.penalty(2.0).item() == layer.weight.numel()
    undecided = SoftRounding(layer.weight, layer.weight_quantizer)
    assert undecided.penalty(20.0).item() > undecided.penalty(2.0).item() > 0


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_afterwards_the_layers_own_quantizer_gives_the_rounded_weight(spec):
    layer, x = _layer(spec), torch.randn(2, 3, 6, 6)
    quantizer, names = layer.weight_quantizer, list(layer.state_dict())
    nearest = quantizer(layer.weight).detach()
    with soft_rounding([layer]) as (soft,):
        soft.logits.data.uniform_(-3, 3)
        quantizer.log_scale.data += 0.05
        hard = soft.hard()
        assert not torch.equal(layer(x), nn.functional.conv2d(x, hard, layer.bias))
    assert layer.weight_quantizer is quantizer
    assert list(layer.state_dict()) == names
    assert torch.equal(quantizer(layer.weight), layer.weight)  # on the grid, exactly
    torch.testing.assert_close(layer.weight.detach(), hard, rtol=1e-6, atol=1e-7)
    assert not torch.equal(layer.weight, nearest)


def test_after_an_error_the_layer_is_as_it_was():
    layer = _layer(GRIDS[0])
    quantizer, weight = layer.weight_quantizer, layer.weight.detach().clone()
    with pytest.raises(KeyError), soft_rounding([layer]):
        raise KeyError
    assert layer.weight_quantizer is quantizer
    assert torch.equal(layer.weight, weight)


def test_it_wants_a_learned_scale():
    layer = QLinear(4, 2, weight_spec=QuantSpec(4, symmetric=False, axis=0), scales="minmax")
    with pytest.raises(InputError, match="learned"):
        SoftRounding(layer.weight, layer.weight_quantizer)
    layer = _layer(GRIDS[0], calibrated=False)
    with pytest.raises(InputError, match="calibrate"):
        SoftRounding(layer.weight, layer.weight_quantizer)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_the_initial_scale_beats_the_full_range_in_its_own_metric(spec):
    layer = _layer(spec)
    weight = layer.weight.detach()
    searched = layer.weight_quantizer(weight)
    full = Quantizer(spec, layer.weight_quantizer.zero_point.numel(), mode="dynamic")(weight)
    errors = [(value - weight).abs().pow(POWER).flatten(1).sum(1) for value in (searched, full)]
    if spec.axis is None:
        errors = [error.sum() for error in errors]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.98 * errors[1].sum()
