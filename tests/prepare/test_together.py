"""All weights quantized by one op at the beginning of a forward."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.prepare import calibrate, prepare
from dfq.prepare.layers import QConv2d, QLinear


class _Calls(TorchDispatchMode):
    """How often each of our ops ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("dfq", "dfq_C"):
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def _student(bits="w4a4", layout=torch.contiguous_format):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(8 * 4 * 4, 5)).to(memory_format=layout)
    student = prepare(model.eval(), bits, edge_bits=8)
    calibrate(student, torch.randn(16, 3, 8, 8))
    return student


def _alone(student):
    """The same student without the hooks."""
    other = copy.deepcopy(student)
    other._forward_pre_hooks.clear()
    other._forward_hooks.clear()
    return other


def _ready(student):
    layers = [m for m in student.modules() if isinstance(m, QConv2d | QLinear)]
    return [layer.quantized_weight is not None for layer in layers]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_each_layer_alone(layout):
    student = _student(layout=layout)
    other = _alone(student)
    x = torch.randn(6, 3, 8, 8)
    outputs = [model(x) for model in (student, other)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6)


def test_one_op_for_all_weights_each_way():
    student = _student()
    x = torch.randn(2, 3, 8, 8)
    with _Calls() as calls:
        student(x).sum().backward()
    for op in ("fake_quantize_all", "fake_quantize_all_backward"):
        assert calls.names.count(op) == 1
    # the inputs of the second and third layer; the first gets an image, on a fixed grid
    assert calls.names.count("fake_quantize_backward") == 2 + 1
    assert calls.names.count("fake_quantize") == 3


def test_two_bit_weights_go_their_own_way():
    """Their grid has no zero: only the two edge layers go together."""
    student = _student("w2a4")
    x = torch.ones(1, 3, 8, 8)
    expected = _alone(student)(x)
    ready = []
    student[3].register_forward_pre_hook(lambda *_: ready.extend(_ready(student)))
    assert torch.equal(student(x), expected)
    assert ready == [True, False, True]


def test_nothing_is_left_behind():
    student = _student()
    student(torch.randn(2, 3, 8, 8))
    assert not any(_ready(student))
    with pytest.raises(RuntimeError):
        student(torch.randn(2, 4, 8, 8))
    assert not any(_ready(student))


def test_a_layer_called_alone_sees_its_newest_weight():
    student = _student()
    student(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        student[3].weight.zero_()
    bias = student[3].bias.view(1, -1, 1, 1)
    assert torch.equal(student[3](torch.randn(2, 8, 5, 5)), bias.expand(2, -1, 3, 3))


def test_copies_have_hooks_of_their_own():
    student = _student()
    x = torch.randn(2, 3, 8, 8)
    expected = student(x)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        with torch.no_grad():
            student[5].weight.zero_()
        assert torch.equal(other(x), expected)
        assert not any(_ready(other))
