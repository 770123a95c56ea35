"""Rounding whose errors cancel, by what the paper promises of it and by search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import network

from dfq.prepare import QConv2d, QLinear, calibrate, prepare
from dfq.prepare.squant import balance_rounding, balanced_codes
from dfq.types import InputError


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(3, 5, 9), (4, 7, 1), (1, 1, 25), (2, 64, 9)]))
def test_sums_of_errors_stay_small(seed, shape):
    steps = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 3
    codes = balanced_codes(steps, -100, 100)
    errors = codes - steps
    assert torch.equal(codes, codes.round())
    assert errors.abs().max() <= 1
    assert errors.sum(2).abs().max() <= 1 + 1e-9
    assert errors.sum((1, 2)).abs().max() <= 0.5 + 1e-9


def test_moves_what_was_nearest_to_the_other_side():
    steps = torch.tensor([[[0.6, 0.7, 0.8, 0.45]]])  # to the nearest: 0.4 + 0.3 + 0.2 - 0.45
    assert balanced_codes(steps, -8, 7).tolist() == [[[1, 1, 1, 0]]]
    steps = torch.tensor([[[0.6, 0.7, 0.8, 0.9]]])  # 0.4 + 0.3 + 0.2 + 0.1 = 1
    assert balanced_codes(steps, -8, 7).tolist() == [[[0, 1, 1, 1]]]


def test_kernel_changes_as_little_as_its_sum_allows():
    """Among all roundings up or down with a sum within 1/2, the squared error is the smallest."""
    steps = torch.rand(20, 1, 6, generator=torch.Generator().manual_seed(0)).double()
    for kernel, codes in zip(steps, balanced_codes(steps, -8, 7), strict=True):
        errors = [
            torch.tensor(up).double() - kernel[0] for up in itertools.product((0, 1), repeat=6)
        ]
        allowed = [error.square().sum() for error in errors if error.sum().abs() <= 0.5]
        assert (codes - kernel).square().sum() <= min(allowed) + 1e-9


def test_ends_of_the_grid_hold():
    steps = torch.tensor([[[1.4, 1.4, 1.4], [-1.6, -2.4, 1.45]]])
    codes = balanced_codes(steps, -2, 1)
    assert codes.min() == -2
    assert codes.max() == 1


@pytest.mark.parametrize("bits", ["w4a8", "w2a8"])  # 2 bits: a grid without zero
def test_weights_of_a_student_lie_on_their_grids(bits):
    student = prepare(network().eval(), bits)
    calibrate(student, torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    layers = {n: m for n, m in student.named_modules() if isinstance(m, QConv2d | QLinear)}
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    balance_rounding(student)
    changed = 0
    for name, layer in layers.items():
        quantizer = layer.weight_quantizer
        torch.testing.assert_close(quantizer(layer.weight), layer.weight, rtol=1e-6, atol=1e-7)
        nearest = quantizer.codes(before[name])
        changed += int((quantizer.codes(layer.weight) != nearest).sum())
        rows = ((layer.weight - before[name]).flatten(1).sum(1) / quantizer.scale).abs()
        clipped = (nearest == quantizer.spec.quant_min) | (nearest == quantizer.spec.quant_max)
        assert (rows[~clipped.flatten(1).any(1)] <= 0.51).all()
    assert changed > 0


def test_needs_scales():
    with pytest.raises(InputError, match="call calibrate first"):
        balance_rounding(prepare(network().eval(), "w4a4"))
