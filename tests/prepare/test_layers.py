import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfq.prepare import QConv2d, QLinear, QReLU, calibrate
from dfq.types import InputError, QuantSpec

WEIGHT = QuantSpec(4, axis=0)
INPUT = QuantSpec(4, symmetric=False, signed=False)


@pytest.mark.parametrize(("quantized", "parent"), [(QConv2d, nn.Conv2d), (QLinear, nn.Linear)])
def test_constructor_begins_with_that_of_the_float_layer(quantized, parent):
    expected = [(p.name, p.default) for p in inspect.signature(parent).parameters.values()]
    found = [(p.name, p.default) for p in inspect.signature(quantized).parameters.values()]
    assert found[: len(expected)] == expected


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 1), "padding": "same", "dilation": 2},
        {"kernel_size": 3, "groups": 4, "bias": False},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "groups": 2},
    ],
    ids=["1x1", "strided", "same dilated", "grouped", "reflect", "circular"],
)
def test_conv_is_the_float_conv_of_quantized_tensors(geometry):
    conv = nn.Conv2d(4, 8, **geometry)
    quantized = QConv2d.from_float(conv, WEIGHT, INPUT)
    x = torch.randn(2, 4, 9, 9)
    calibrate(quantized, x)
    assert len(quantized.weight_quantizer.scale) == conv.out_channels
    assert quantized.input_quantizer.zero_point.item() != 0
    with torch.no_grad():
        actual, inputs = quantized(x), quantized.input_quantizer(x)
        conv.weight.copy_(quantized.weight_quantizer(conv.weight))
        assert torch.equal(actual, conv(inputs))  # so padding is of true zeros
        assert not torch.equal(actual, conv(x))


def test_linear_takes_any_leading_shape():
    linear = nn.Linear(6, 5)
    quantized = QLinear.from_float(linear, WEIGHT, INPUT)
    x = torch.randn(2, 3, 6)
    calibrate(quantized, x)
    expected = F.linear(
        quantized.input_quantizer(x), quantized.weight_quantizer(linear.weight), linear.bias
    )
    assert quantized(x).shape == (2, 3, 5)
    assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(3, 4, bias=False)])
def test_from_float_shares_parameters_and_draws_nothing(layer):
    kind = QConv2d if isinstance(layer, nn.Conv2d) else QLinear
    layer.eval().requires_grad_(False)
    before = torch.get_rng_state()
    quantized = kind.from_float(layer, WEIGHT, INPUT)
    assert torch.equal(torch.get_rng_state(), before)
    assert quantized.weight is layer.weight
    assert quantized.bias is layer.bias
    assert not quantized.training
    assert all(not t.is_meta for t in quantized.state_dict().values())


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(3, 4)])
def test_state_dict_is_a_superset(layer):
    kind = QConv2d if isinstance(layer, nn.Conv2d) else QLinear
    quantized = kind.from_float(layer, WEIGHT, INPUT)
    extra = set(quantized.state_dict()) - set(layer.state_dict())
    assert extra == {
        "weight_quantizer.scale",
        "weight_quantizer.zero_point",
        "input_quantizer.scale",
        "input_quantizer.zero_point",
    }
    fresh = type(layer)(*([3, 4, 3] if kind is QConv2d else [3, 4]))
    missing, unexpected = quantized.load_state_dict(fresh.state_dict(), strict=False)
    assert set(missing) == extra
    assert not unexpected
    assert torch.equal(quantized.weight, fresh.weight)


def test_constructed_layer_works_like_a_converted_one():
    quantized = QConv2d(3, 4, 3, 1, 1, weight_spec=WEIGHT, input_spec=INPUT)
    conv = nn.Conv2d(3, 4, 3, 1, 1)
    conv.load_state_dict(quantized.state_dict(), strict=False)
    converted = QConv2d.from_float(conv, WEIGHT, INPUT)
    converted.load_state_dict(quantized.state_dict())
    x = torch.randn(2, 3, 5, 5)
    calibrate(quantized, x)
    calibrate(converted, x)
    assert torch.equal(quantized(x), converted(x))


def test_input_stays_float_without_a_spec():
    quantized = QLinear(4, 4, weight_spec=WEIGHT)
    x = torch.randn(3, 4)
    calibrate(quantized, x)
    expected = F.linear(x, quantized.weight_quantizer(quantized.weight), quantized.bias)
    assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()])
def test_relu_is_the_quantizer_of_the_float_relu(relu):
    quantized = QReLU.from_float(relu, INPUT)
    x = torch.linspace(-9, 9, 500)
    calibrate(quantized, x.clone()[None])
    outputs = quantized(x.clone())
    assert torch.equal(outputs, quantized.quantizer(relu(x.clone())))
    assert quantized.quantizer.zero_point.item() == 0  # nothing below zero: an unsigned grid
    assert outputs.unique().numel() == 16
    assert quantized.inplace == relu.inplace


@pytest.mark.parametrize(
    "make",
    [
        lambda: QConv2d(3, 4, 3, weight_spec=QuantSpec(4, axis=1)),
        lambda: QLinear(3, 4, weight_spec=WEIGHT, input_spec=QuantSpec(4, axis=1)),
        lambda: QReLU(QuantSpec(4, axis=1)),
    ],
)
def test_other_axes_are_refused(make):
    with pytest.raises(InputError, match="axis"):
        make()


def test_unknown_scales_are_refused():
    with pytest.raises(InputError, match="learned or minmax"):
        QLinear(3, 4, weight_spec=WEIGHT, scales="lsq")


def test_bfloat16_layer_runs_on_float32_scales():
    quantized = QConv2d(3, 4, 3, weight_spec=WEIGHT, input_spec=INPUT).to(torch.bfloat16)
    x = torch.randn(2, 3, 6, 6).to(torch.bfloat16)
    calibrate(quantized, x)
    quantized(x).float().sum().backward()
    assert quantized(x).dtype == torch.bfloat16
    assert quantized.weight.grad.dtype == torch.bfloat16
    assert quantized.weight_quantizer.log_scale.grad.dtype == torch.float32
