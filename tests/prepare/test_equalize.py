import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfq.prepare import QConv2d, calibrate, prepare
from dfq.prepare.dropping import activation_quantizers
from dfq.prepare.equalize import equalize_channels
from dfq.types import DataSpec

DATA = DataSpec((3, 8, 8), classes=5)


class Net(nn.Module):
    """Every way a scale can pass, and ways that it cannot."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.leaky = nn.LeakyReLU(0.1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2, self.relu6 = nn.BatchNorm2d(8), nn.ReLU6()
        self.second = nn.Conv2d(8, 8, 1, groups=8, bias=False)
        self.norm3, self.point = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1, bias=False)
        self.norm4, self.pool = nn.BatchNorm2d(12), nn.MaxPool2d(2)
        self.twofold = nn.Conv2d(12, 24, 1, groups=12, bias=False)
        self.norm5, self.head = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.leaky(self.norm1(self.stem(x)))
        x = self.second(self.relu6(self.norm2(self.depth(x))))
        x = self.pool(F.relu(self.norm4(self.point(F.relu(self.norm3(x))))))
        x = F.adaptive_avg_pool2d(F.relu(self.norm5(self.twofold(x))), 1)
        return self.head(torch.flatten(x, 1))


def _model():
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        for norm in (model.norm1, model.norm4):
            size = 10 ** torch.empty(norm.num_features).uniform_(-2, 1)
            norm.weight.copy_(size)
            norm.bias.copy_(0.5 * size)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model(torch.randn(64, 3, 8, 8))  # a small channel is amplified by the next BatchNorm
    return model.eval()


def _student(bits="w4a4"):
    return prepare(_model(), bits, data=DATA)


def _bypassed(student):
    for module in student.modules():
        if hasattr(module, "bypass"):
            module.bypass = True
    return student


def test_the_network_computes_what_it_did():
    x = torch.randn(4, 3, 8, 8)
    student = _bypassed(_student())
    assert equalize_channels(student) == 2
    with torch.no_grad():
        torch.testing.assert_close(student(x), _model()(x), rtol=1e-4, atol=1e-4)


def test_only_what_is_positively_homogeneous_lets_a_scale_pass():
    before, student = _student(), _student()
    equalize_channels(student)
    changed = {
        name
        for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True)
        if new.isfinite().all() and not torch.equal(new, old)
    }
    norms = {f"norm{i}.{part}" for i in (1, 4) for part in ("weight", "bias")}
    # norm2 is behind a ReLU6, norm3 and norm5 are before dense layers
    assert changed == norms | {"depth.weight", "twofold.weight"}


def test_channels_before_a_depthwise_layer_get_one_range():
    student = _student()
    equalize_channels(student)
    high = student.norm1.bias + 3 * student.norm1.weight
    torch.testing.assert_close(high, high[:1].expand(8))


def test_a_channel_that_hardly_ever_passes_its_relu_is_not_blown_up():
    student = _student()
    with torch.no_grad():
        student.norm4.weight.fill_(0.5)
        student.norm4.bias.fill_(2.0)
        student.norm4.bias[0] = -2.0
    equalize_channels(student)
    ranges = student.norm4.weight * torch.tensor([1.0] + [7.0] * 11)  # in deviations
    torch.testing.assert_close(ranges, ranges[:1].expand(12))


def test_a_dead_channel_neither_divides_by_zero_nor_grows():
    student = _student()
    with torch.no_grad():
        student.norm1.weight[2] = student.norm1.bias[2] = 0.0
        student.norm4.bias.zero_()
        student.norm4.weight.zero_()
    equalize_channels(student)
    assert all(p.isfinite().all() for m in student.modules() for p in _tensors(m))


def _tensors(module):
    norm = isinstance(module, nn.BatchNorm2d | QConv2d)
    return [module.weight] if norm else []


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_quantized_outputs_come_nearer(bits):
    """By the grids of the tensors that are equalized; all others are left out."""
    x = torch.randn(64, 3, 8, 8)
    errors = []
    for equalized in (False, True):
        student = _student(bits)
        if equalized:
            equalize_channels(student)
        calibrate(student, x)
        for quantizer in activation_quantizers(student):
            quantizer.bypass = True
        with torch.no_grad():
            expected = student(x)
            for layer in (student.depth, student.twofold):
                layer.input_quantizer.bypass = False
            errors.append((student(x) - expected).square().mean())
    assert errors[1] < 0.3 * errors[0]


def test_a_model_without_a_graph_stays_as_it_is():
    class Untraceable(Net):
        def forward(self, x):
            return super().forward(x) if x.mean() > -100 else x

    torch.manual_seed(3)
    model = Untraceable().eval()
    student = prepare(model, "w4a4", data=DATA)
    assert equalize_channels(student) == 0
    assert torch.equal(student.depth.weight, model.depth.weight)


def test_a_layer_that_is_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.stem(self.norm(self.stem(x))).mean((2, 3))

    student = prepare(Twice().eval(), "w4a4")
    assert equalize_channels(student) == 0
