"""Layer by layer, for models whose graph cannot be told."""

import copy

import pytest
import torch
from torch import nn

from dfq.deploy import PackedConv2d, PackedLinear, freeze_layers
from dfq.prepare import calibrate, prepare
from tests.deploy.nets import NETS
from tests.deploy.test_freeze import assert_near, images, student_of
from tests.prepare.test_fusion import Untraceable


@pytest.mark.parametrize("options", [{}, {"scales": "minmax"}, {"protocol": "gdfq"}], ids=str)
@pytest.mark.parametrize("name", ["depthwise", "plain"])
def test_it_computes_what_the_student_does(name, options):
    student = student_of(name, **options)
    assert_near(freeze_layers(student), student, images())


@pytest.mark.parametrize("name", NETS)
def test_no_float_weights_are_left(name):
    packed = freeze_layers(student_of(name))
    heavy = [m for m in packed.modules() if isinstance(m, PackedConv2d | PackedLinear)]
    assert heavy
    assert not any(p.ndim > 1 for p in packed.parameters())
    assert not any(isinstance(m, nn.Conv2d | nn.Linear) for m in packed.modules())


def test_a_model_with_control_flow():
    torch.manual_seed(0)
    student = prepare(Untraceable().eval(), "w4a4")
    x = torch.randn(12, 8, 6, 6)
    calibrate(student, x)
    packed = freeze_layers(student)
    assert isinstance(packed, Untraceable)
    for each in (x, -x):
        with torch.no_grad():
            expected = student(each)
        off = (packed(each) - expected).abs() > 1e-4 * expected.abs().max()
        assert off.float().mean() < 0.02


def test_a_copy_computes_the_same():
    packed = freeze_layers(student_of("plain"))
    expected = packed(images())
    assert torch.equal(copy.deepcopy(packed)(images()), expected)
    assert torch.equal(packed.to("cpu")(images()), expected)


def test_a_shared_layer_stays_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.again = self.first
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.again(self.norm(self.first(x)))

    student = prepare(Twice().eval(), "w4a4")
    calibrate(student, images())
    packed = freeze_layers(student)
    assert packed.first is packed.again
