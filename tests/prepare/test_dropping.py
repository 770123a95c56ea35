import pytest
import torch
from torch import nn

from dfq.prepare import calibrate, prepare
from dfq.prepare.dropping import activation_quantizers, dropping
from dfq.types import DataSpec

DATA = DataSpec(shape=(3, 8, 8), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)


def _student(protocol="brecq"):
    torch.manual_seed(5)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    student = prepare(nn.Sequential(*body, nn.Linear(128, 4)), "w2a2", protocol=protocol, data=DATA)
    calibrate(student, torch.randn(16, 3, 8, 8))
    return student


def _rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("protocol", "count"), [("brecq", 3), ("gdfq", 2)])
def test_activation_quantizers_are_all_but_the_weights(protocol, count):
    found = activation_quantizers(_student(protocol))
    assert len(found) == count
    assert all(quantizer.spec.axis is None for quantizer in found)


@pytest.mark.parametrize("mode", ["learned", "fixed"])
def test_half_of_the_elements_stay_float_and_pass_their_gradient(mode):
    student = _student()
    quantizer = student[0 if mode == "fixed" else 2].input_quantizer
    assert quantizer.mode == mode
    x = (torch.randn(1000) * 10).requires_grad_()
    plain = quantizer(x)
    assert (plain != x).all()
    with dropping(student, 0.5, _rng()):
        y = quantizer(x)
        y.sum().backward()
    stays = y == x
    assert 430 < stays.sum() < 570
    assert torch.equal(y[~stays], plain[~stays])
    assert (x.grad[stays] == 1).all()
    assert mode == "fixed" or (x.grad[~stays] == 0).any()  # clamped: a learned grid passes nothing


def test_each_draw_is_another_and_the_same_seed_draws_the_same():
    student, x = _student(), torch.randn(4, 3, 8, 8)

    def outputs():
        with dropping(student, 0.5, _rng()) as redraw:
            first = student(x)
            redraw()
            return first, student(x)

    first, second = outputs()
    assert not torch.equal(first, second)
    assert all(map(torch.equal, outputs(), (first, second)))


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_nothing_is_dropped_afterwards_nor_at_probability_zero(probability):
    student, x = _student(), torch.randn(4, 3, 8, 8)
    plain = student(x)
    with dropping(student, probability, _rng()):
        assert torch.equal(student(x), plain) == (probability == 0)
    assert torch.equal(student(x), plain)
