"""Residual additions on grids of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfq.prepare import calibrate, prepare
from dfq.prepare.adds import QAdd, quantize_adds
from dfq.prepare.quantizer import Quantizer
from dfq.types import QuantSpec
from tests.prepare.test_fusion import Block, OnlyInEval, Untraceable

SPEC = QuantSpec(8, symmetric=False, signed=False)


class Residual(nn.Module):
    """A stem, an identity block, and one whose shortcut has a layer; then pooling and a sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.block = Block()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block(self.pool(self.stem(x)))
        x = F.relu(self.norm(self.conv(x)) + self.down(x))
        x = x + F.max_pool2d(x, 1)
        return self.head(x.mean((2, 3))) + 1


def _student(model=Residual, **changes):
    torch.manual_seed(0)
    student = prepare(model().eval(), "w4a4", **changes)
    calibrate(student, _images(model))
    return student


def _images(model=Residual):
    return torch.randn(16, 3 if model is Residual else 8, 8, 8).abs()


def _adds(student):
    return {name: m for name, m in student.named_modules() if isinstance(m, QAdd)}


def test_every_addition_of_two_activations_is_found():
    adds = _adds(_student())
    assert list(adds) == ["block.add", "add", "add2"]
    assert [add.relu for add in adds.values()] == [True, True, False]


def test_a_carried_branch_gets_a_grid_only_if_it_is_on_none():
    """The pooled stem is on none, nor is the shortcut's layer; the last branches are on the sum's.

    In the second addition it is the shortcut that is computed last.
    """
    adds = _adds(_student())
    assert [add.carried_quantizer is None for add in adds.values()] == [False, False, True]


def test_sums_and_carried_branches_lie_on_their_grids():
    student = _student()
    seen = []
    for add in _adds(student).values():
        add.register_forward_hook(lambda add, args, output: seen.append((add, args, output)))
    student(_images())
    assert len(seen) == 3
    for add, (carried, computed), output in seen:
        assert torch.isin(output, add.quantizer.levels).all()
        if add.carried_quantizer is not None:
            carried = add.carried_quantizer(carried)
        total = carried + computed
        expected = add.quantizer(total.relu() if add.relu else total)
        assert torch.equal(output, expected)


def test_with_the_grids_let_through_it_computes_what_the_model_did():
    torch.manual_seed(0)
    model = Residual().eval()
    student = prepare(model, "w8a8")
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.bypass = True
    x = _images()
    torch.testing.assert_close(student(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_state_dict_keeps_its_names():
    before = set(Residual().state_dict())
    student = _student()
    added = set(student.state_dict()) - before
    assert before < set(student.state_dict())
    assert all("quantizer" in name for name in added)
    other = prepare(Residual().eval(), "w4a4")
    other.load_state_dict(student.state_dict())
    x = _images()
    assert torch.equal(other(x), student(x))


def test_scales_of_sums_learn():
    student = _student()
    student(_images()).square().sum().backward()
    for add in _adds(student).values():
        assert add.quantizer.log_scale.grad.abs() > 0


@pytest.mark.parametrize("model", [Untraceable, OnlyInEval])
def test_a_model_whose_graph_cannot_be_told_stays_as_it_is(model):
    student = prepare(model().eval(), "w4a4")
    assert isinstance(student, model)
    assert quantize_adds(student, SPEC) is student


def test_protocol_gdfq_leaves_additions_float():
    assert not _adds(prepare(Residual().eval(), "w4a4", protocol="gdfq"))


def test_a_copy_is_the_same_and_its_own():
    student = _student()
    other = copy.deepcopy(student)
    x = _images()
    expected = student(x)
    with torch.no_grad():
        student.head.weight.zero_()
    assert torch.equal(other(x), expected)
