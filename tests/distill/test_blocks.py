import pytest
import torch
from torch import fx, nn

from dfq.distill.blocks import find_units
from dfq.types import InputError


def _conv(inputs, outputs, *args, **kwargs):
    return nn.Conv2d(inputs, outputs, *args, bias=False, **kwargs)


def _deep(channels):
    return _conv(channels, channels, 3, 1, 1, groups=channels)


class Cifar(nn.Module):
    """A BasicBlock whose shortcut has no parameters and halves the map."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = _conv(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = _conv(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.relu2(out + short)


class Bottleneck(nn.Module):
    """As torchvision writes it: one ReLU module for all, ``+=``, an optional projection."""

    def __init__(self, inputs, width, project):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 8, 1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(_conv(inputs, 8, 1), nn.BatchNorm2d(8)) if project else None

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Inverted(nn.Module):
    """MobileNetV2: expansion, depthwise, projection; a shortcut if shapes allow."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.shortcut = inputs == outputs
        self.conv = nn.Sequential(
            nn.Sequential(_conv(inputs, 12, 1), nn.BatchNorm2d(12), nn.ReLU6()),
            nn.Sequential(_conv(12, 12, 3, 1, 1, groups=12), nn.BatchNorm2d(12), nn.ReLU6()),
            _conv(12, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class Network(nn.Module):
    """Stem, body and classifier, with the functions that networks use in between."""

    def __init__(self, *body, stem=4, features=8):
        super().__init__()
        self.stem = nn.Sequential(_conv(3, stem, 3, 1, 1), nn.BatchNorm2d(stem), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(features, 4)

    def forward(self, x):
        x = self.body(self.pool(self.stem(x)))
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


class Joined(nn.Module):
    """A module that adds two values."""

    def forward(self, first, second):
        return first + second


class Gated(nn.Module):
    """Squeeze and excitation inside of a residual block whose add is a leaf module."""

    def __init__(self):
        super().__init__()
        self.conv, self.squeeze, self.join = _conv(8, 8, 3, 1, 1), _conv(8, 8, 1), Joined()

    def forward(self, x):
        out = self.conv(x)
        return self.join(out * torch.sigmoid(self.squeeze(out.mean((2, 3), keepdim=True))), x)


class Nested(nn.Module):
    """A residual add inside of another's stretch: the smallest comes out whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = _conv(8, 8, 1), _conv(8, 8, 1), _conv(8, 8, 1)

    def forward(self, x):
        inside = self.first(x)
        return x + self.last(inside + self.second(inside))


class Forked(nn.Module):
    """A depthwise layer that two others read."""

    def __init__(self):
        super().__init__()
        self.deep, self.left, self.right = _deep(4), _conv(4, 4, 1), _conv(4, 4, 1)

    def forward(self, x):
        x = self.deep(x)
        return torch.cat((self.left(x), self.right(x)), 1)


class Tapped(nn.Module):
    """The value inside of the residual stretch is used outside of it: no unit can hold it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = _conv(4, 4, 1), _conv(4, 4, 1), _conv(8, 8, 1)

    def forward(self, x):
        inside = torch.relu(self.first(x))
        return self.last(torch.cat((self.second(inside) + x, inside), 1))


def _plain():
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Dropout(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, 4))


BOTTLENECK = ("conv1", "conv2", "conv3")
CASES = {
    "cifar": (Network(Cifar()), [("body.0.conv1", "body.0.conv2")]),
    "bottleneck": (
        Network(Bottleneck(4, 6, True), Bottleneck(8, 6, False)),
        [
            (*(f"body.0.{n}" for n in BOTTLENECK), "body.0.downsample.0"),
            tuple(f"body.1.{n}" for n in BOTTLENECK),
        ],
    ),
    "inverted residual": (
        Network(Inverted(4, 8), Inverted(8, 8)),
        [
            ("body.0.conv.0.0",),
            ("body.0.conv.1.0", "body.0.conv.2"),
            ("body.1.conv.0.0", "body.1.conv.1.0", "body.1.conv.2"),
        ],
    ),
    "depthwise separable": (
        Network(
            _deep(4), nn.BatchNorm2d(4), nn.LeakyReLU(), _conv(4, 6, 1), _deep(6), _conv(6, 8, 1)
        ),
        [("body.0", "body.3"), ("body.4", "body.5")],
    ),
    "depthwise in a row": (
        Network(_deep(4), _deep(4), _conv(4, 8, 1)),
        [("body.0", "body.1"), ("body.2",)],
    ),
    "depthwise, not read by a layer": (
        Network(_deep(4), nn.MaxPool2d(2), _conv(4, 8, 1)),
        [("body.0",), ("body.2",)],
    ),
    "depthwise, read twice": (
        Network(Forked()),
        [("body.0.deep",), ("body.0.left",), ("body.0.right",)],
    ),
    "depthwise before a residual block": (
        Network(_deep(4), Cifar()),
        [("body.0",), ("body.1.conv1", "body.1.conv2")],
    ),
    "gated": (Network(Gated(), stem=8), [("body.0.conv", "body.0.squeeze")]),
    "nested": (
        Network(Nested(), stem=8),
        [("body.0.first",), ("body.0.second",), ("body.0.last",)],
    ),
    "tapped": (Network(Tapped()), [("body.0.first",), ("body.0.second",), ("body.0.last",)]),
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Joined) or super().is_leaf_module(m, module_qualified_name)


def _layers(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _plan(model, layers=None):
    model = model.eval()
    return find_units(_Tracer().trace(model), model, layers or _layers(model))


def _run(plan, model, images):
    """Every value of the network, step by step; the last one is the network's output."""
    values = {plan.images: images}
    for step in plan.steps:
        values[step.output] = step.module(model)(*(values[name] for name in step.inputs))
    return values, values[plan.steps[-1].output]


@pytest.mark.parametrize("name", CASES)
def test_residual_blocks_come_out_whole_and_separable_layers_in_pairs(name):
    model, body = CASES[name]
    units = [step.layers for step in _plan(model).steps if step.layers]
    assert units == [("stem.0",), *body, ("fc",)]
    assert _plan(model).units == len(units)


@pytest.mark.parametrize("name", CASES)
def test_the_steps_together_are_the_network(name):
    model = CASES[name][0].eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(_run(_plan(model), model, x)[1], model(x))


def test_a_plain_network_is_cut_behind_its_activations():
    model = _plain()
    plan = _plan(model)
    assert [step.layers for step in plan.steps] == [("0",), (), ("5",), (), (), ("9",)]
    assert [step.output for step in plan.steps] == ["_3", "_4", "_6", "_7", "_8", "_9"]


def test_a_unit_ends_behind_the_activation_and_has_one_input():
    model = CASES["bottleneck"][0]
    units = [step for step in _plan(model).steps if step.layers]
    assert all(len(step.inputs) == 1 for step in units)
    values, _ = _run(_plan(model), model.eval(), torch.randn(4, 3, 16, 16))
    for step in units[:-1]:
        assert values[step.output].amin() == 0


def test_a_module_shares_the_parameters_of_its_model():
    model = CASES["cifar"][0]
    step = next(step for step in _plan(model).steps if "body.0.conv2" in step.layers)
    parameters = dict(step.module(model).named_parameters())
    assert parameters["body.0.conv2.weight"] is model.body[0].conv2.weight


def test_only_wanted_layers_make_units_and_nothing_runs_behind_the_last():
    plan = _plan(CASES["cifar"][0], ["stem.0"])
    assert [step.layers for step in plan.steps] == [("stem.0",)]


def test_of_nested_adds_the_inner_one_ends_a_unit():
    plan = _plan(CASES["nested"][0])
    unit = next(step for step in plan.steps if step.layers == ("body.0.second",))
    assert [node.op for node in unit.graph.nodes][1:] == ["call_module", "call_function", "output"]


def test_a_layer_used_twice_belongs_to_its_first_unit():
    layer = _conv(3, 3, 1)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.MaxPool2d(2), _conv(3, 3, 1))
    plan = _plan(model)
    assert [step.layers for step in plan.steps] == [("0",), (), (), ("4",)]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(_run(plan, model, x)[1], model(x))


def test_parameters_outside_of_modules_are_found():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gain = _conv(3, 3, 1), nn.Parameter(torch.full((3, 1, 1), 0.1))
            self.last = _conv(3, 3, 1)

        def forward(self, x):
            return self.last(x + self.gain * self.conv(x))

    model, x = Scaled(), torch.randn(2, 3, 4, 4)
    plan = _plan(model)
    assert [step.layers for step in plan.steps] == [("conv",), ("last",)]
    assert torch.equal(_run(plan, model, x)[1], model(x))


def test_a_network_without_these_layers_is_refused():
    with pytest.raises(InputError, match="none of the layers"):
        _plan(_plain(), ["12"])
