"""ReLUs in the pass of the BatchNorm before them: the same student, in fewer passes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfq.prepare import calibrate, prepare
from dfq.prepare.frozen import Frozen
from tests.passes import Passes


class Block(nn.Module):
    """One ReLU module after a BatchNorm and after an add, as in torchvision's ResNets."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Branching(Block):
    """The output of bn1 also goes elsewhere, past the ReLU."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(F.relu(y))) + y


class Untraceable(Block):
    """What happens depends on the values."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class OnlyInEval(Block):
    """bn1 feeds the ReLU alone in eval mode, and an auxiliary output in training."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        out = self.relu(self.bn2(self.conv2(self.relu(y))) + x)
        return (out, y) if self.training else out


class Same(Block):
    """bn1 is used twice, and only once before a ReLU."""

    def forward(self, x):
        return self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


def _student(kind, protocol="brecq"):
    torch.manual_seed(0)
    model = kind().eval()
    for norm in (model.bn1, model.bn2):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.bias)
    student = prepare(model, "w4a4", protocol=protocol)
    calibrate(student, torch.randn(16, 8, 6, 6).abs())
    return student


def _apart(student):
    """The same student with every ReLU in a pass of its own."""
    other = copy.deepcopy(student)
    for module in other.modules():
        if isinstance(module, Frozen):
            module.rectifies = False
    return other


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        (Block, [True, False]),
        (Branching, [False, False]),
        (Untraceable, [False, False]),
        (OnlyInEval, [False, False]),
        (Same, [False]),  # bn2 is not used
    ],
)
def test_only_a_relu_that_gets_everything_is_fused(kind, fused):
    student = _student(kind)
    norms = [norm for norm in (student.bn1, getattr(student, "bn2", None)) if norm is not None]
    assert [norm.rectifies for norm in norms] == fused
    assert not student.training


@pytest.mark.parametrize("protocol", ["brecq", "gdfq"])
def test_values_and_gradients_are_those_of_a_relu_of_its_own(protocol):
    student = _student(Block, protocol)
    other = _apart(student)
    assert student.bn1.rectifies
    x = torch.randn(4, 8, 6, 6)
    outputs = [model(x) for model in (student, other)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_copies_stay_fused():
    student = _student(Block)
    x = torch.randn(2, 8, 6, 6)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert other.bn1.rectifies
        assert torch.equal(other(x), student(x))


def test_a_relu_works_on_what_a_hook_put_in_its_way():
    """A mark that gets lost costs a pass, not the result."""
    student = _student(Block)
    x = torch.randn(2, 8, 6, 6)
    expected = student(x)
    student.bn1.register_forward_hook(lambda module, args, output: output.clone() - 0.0)
    assert torch.equal(student(x), expected)


def test_a_student_in_half_precision_still_rectifies():
    student = _student(Block).half()
    assert (student.relu(student.bn1(torch.randn(2, 8, 3, 3).half())) >= 0).all()


def test_passes_of_a_training_step():
    """A block forward and backward: what walks over activations, nothing else does."""
    student = _student(Block)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    with Passes(x.numel()) as forward:
        y = student(x)
    with Passes(x.numel()) as backward:
        y.backward(torch.ones_like(y))
    layer = ["fake_quantize", "convolution", "batch_norm"]
    addition = ["fake_quantize", "add", "relu_", "fake_quantize"]  # of the branch, of the sum
    assert forward.names == [*layer, *layer, *addition]
    layer = ["batch_norm_backward", "convolution_backward", "fake_quantize_backward"]
    assert [name for name in backward.names if name != "ones_like"] == [
        "fake_quantize_backward",
        "threshold_backward",
        "fake_quantize_backward",
        *layer,
        *layer,
        "add",  # the shortcut's gradient
    ]
