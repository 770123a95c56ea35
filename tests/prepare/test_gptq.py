"""Rounding that makes up for its errors, by what it promises and by a slower way to it."""

import pytest
import torch
from tiny import network
from torch import nn

from dfq.prepare import QConv2d, QLinear, calibrate, prepare
from dfq.prepare.gptq import BLOCK, DAMPING, compensate_rounding, compensated_codes, second_moments
from dfq.prepare.layers import quantized_layers
from dfq.prepare.pairs import some
from dfq.prepare.sensitivity import quantizing_only
from dfq.prepare.squant import balance_rounding
from dfq.types import DataSpec, InputError, QuantSpec

WEIGHTS = QuantSpec(4, axis=0)


def _correlated(size, rng, groups=1):
    """[groups, size, size], of inputs that go together."""
    inputs = torch.randn(groups, 4 * size, size, generator=rng) @ torch.randn(
        groups, size, size, generator=rng
    )
    return inputs.transpose(1, 2) @ inputs / inputs.shape[1]


def _column_by_column(steps, moments, quant_min, quant_max):
    """The same from the definition: after each rounding the best of all that is left is found."""
    steps, moments = steps.double().clone(), moments.double().clone()
    moments += DAMPING * moments.diagonal().mean() * torch.eye(len(moments)).double()
    order = moments.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros_like(steps)
    while order:
        k = order.pop(0)
        codes[:, k] = steps[:, k].round().clamp(quant_min, quant_max)
        error = steps[:, k] - codes[:, k]
        if order:  # least squares: the others take over what they can of the k-th input's part
            share = torch.linalg.solve(moments[order][:, order], moments[order, k])
            steps[:, order] += error[:, None] * share
    return codes


@pytest.mark.parametrize("size", [1, 9, 40])
def test_after_each_rounding_the_rest_is_the_best_there_is(size):
    rng = torch.Generator().manual_seed(size)
    steps = torch.randn(2, 5, size, generator=rng) * 4
    moments = _correlated(size, rng, groups=2)
    codes = compensated_codes(steps, moments, -8, 7)
    for group in range(2):
        expected = _column_by_column(steps[group], moments[group], -8, 7)
        assert torch.equal(codes[group].double(), expected)
    assert codes.dtype == torch.float32


def test_blocks_change_nothing():
    rng = torch.Generator().manual_seed(0)
    size = 2 * BLOCK + 3
    steps = torch.randn(1, 3, size, generator=rng) * 4
    moments = _correlated(size, rng)
    codes = compensated_codes(steps, moments, -8, 7)
    expected = _column_by_column(steps[0], moments[0], -8, 7)
    assert (codes[0].double() != expected).float().mean() < 0.01  # but for the order of sums


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest():
    steps = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)) * 5
    codes = compensated_codes(steps, torch.eye(16)[None] * 3, -8, 7)
    assert torch.equal(codes, steps.round().clamp(-8, 7))


def test_of_two_equal_inputs_the_second_takes_the_error_of_the_first():
    codes = compensated_codes(torch.tensor([[[0.4, 0.4]]]), torch.ones(1, 2, 2), -8, 7)
    assert codes.tolist() == [[[0.0, 1.0]]]


def test_inputs_that_are_always_zero_do_no_harm():
    steps = torch.tensor([[[0.4, 1.6, -2.7]]])
    for moments in (torch.zeros(1, 3, 3), torch.diag(torch.tensor([1.0, 0.0, 2.0]))[None]):
        assert compensated_codes(steps, moments, -8, 7).tolist() == [[[0.0, 2.0, -3.0]]]


def test_outputs_change_less_than_to_the_nearest_and_the_grid_holds():
    rng = torch.Generator().manual_seed(0)
    steps, moments = torch.randn(1, 64, 32, generator=rng) * 4, _correlated(32, rng)
    codes = compensated_codes(steps, moments, -8, 7)
    nearest = steps.round().clamp(-8, 7)
    assert codes.min() >= -8
    assert codes.max() <= 7

    def lost(codes):
        errors = (codes - steps)[0]
        return float(((errors @ moments[0]) * errors).sum())

    assert lost(codes) < 0.6 * lost(nearest)


LAYERS = {
    "plain": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "padded": {"kernel_size": 3, "padding": 1, "stride": 2},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 1), "dilation": (1, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "grouped": {"kernel_size": 3, "groups": 3},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_second_moments_tell_the_mean_square_of_every_output(options, at_once, monkeypatch):
    monkeypatch.setattr("dfq.prepare.gptq.AT_ONCE", at_once)
    layer = QConv2d(6, 12, weight_spec=WEIGHTS, **options)
    x = torch.randn(5, 6, 9, 8) + torch.randn(6, 1, 1)
    moments = second_moments(layer, x)
    _check_squares(layer, moments, layer._conv_forward(x, layer.weight, None))


@pytest.mark.parametrize("shape", [(50, 6), (5, 7, 6)])
def test_second_moments_of_a_dense_layer(shape):
    layer = QLinear(6, 12, weight_spec=WEIGHTS)
    x = torch.randn(shape) + torch.randn(6)
    y = nn.functional.linear(x, layer.weight)
    _check_squares(layer, second_moments(layer, x), y.reshape(-1, 12, 1, 1))


@torch.no_grad()
def _check_squares(layer, moments, y):
    rows = layer.weight.reshape(len(moments), -1, moments.shape[1])
    squares = ((rows @ moments) * rows).sum(2).flatten()
    torch.testing.assert_close(squares, y.transpose(0, 1).flatten(1).square().mean(1))


DATA = DataSpec((1, 8, 8), 10)
IMAGES = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _student(bits):
    torch.manual_seed(0)
    student = prepare(network().eval(), bits, data=DATA)
    calibrate(student, IMAGES)
    return student


@pytest.mark.parametrize("bits", ["w4a8", "w2a8"])  # 2 bits: a grid without zero
def test_weights_of_a_student_lie_on_their_grids(bits):
    student, before = _student(bits), _student(bits)
    compensate_rounding(student, IMAGES)
    for name, layer in quantized_layers(student).items():
        weight, quantizer = layer.weight.detach(), layer.weight_quantizer
        torch.testing.assert_close(quantizer(weight).detach(), weight, rtol=1e-6, atol=1e-7)
        if quantizer.spec.bits < 8:
            assert not torch.equal(quantizer(before.get_submodule(name).weight), weight)


@torch.no_grad()
def _inputs(student, name):
    """What reaches a layer of ``student`` without quantizers of activations."""
    seen = []
    layer = student.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with quantizing_only(student, None):
        student.eval()(some(IMAGES))
    hook.remove()
    return seen[0]


def test_outputs_change_less_than_to_the_nearest():
    student, nearest, balanced = (_student("w4a8") for _ in range(3))
    compensate_rounding(student, IMAGES)
    balance_rounding(balanced)
    x, layer = _inputs(student, "3"), nearest[3]
    with torch.no_grad():
        rounded = student[3].weight, layer.weight_quantizer(layer.weight), balanced[3].weight
        lost = [
            float(layer._conv_forward(x, weight - layer.weight, None).square().mean())
            for weight in rounded
        ]
    assert lost[0] < 0.7 * min(lost[1:])


def test_each_layer_is_rounded_for_what_the_rounded_ones_before_it_put_out():
    student, before = _student("w4a8"), _student("w4a8")
    compensate_rounding(student, IMAGES)
    layer = before[3]
    moments = second_moments(layer, _inputs(student, "3"))
    scale = layer.weight_quantizer.scale.detach().reshape(-1, 1, 1, 1)
    steps = (layer.weight.detach() / scale).reshape(1, len(scale), -1)
    spec = layer.weight_quantizer.spec
    codes = compensated_codes(steps, moments, spec.quant_min, spec.quant_max)
    torch.testing.assert_close(
        codes.reshape(layer.weight.shape) * scale, student[3].weight.detach()
    )
    assert not torch.equal(moments, second_moments(layer, _inputs(before, "3")))


def test_a_student_in_training_stays_in_training_and_without_hooks():
    student = _student("w4a8").train()
    hooks = [dict(module._forward_pre_hooks) for module in student.modules()]
    compensate_rounding(student, IMAGES)
    assert student.training
    assert [dict(module._forward_pre_hooks) for module in student.modules()] == hooks


def test_needs_scales():
    with pytest.raises(InputError, match="call calibrate first"):
        compensate_rounding(prepare(network().eval(), "w4a4", data=DATA), IMAGES)
