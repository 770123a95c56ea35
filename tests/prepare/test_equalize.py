import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfq.prepare import QConv2d, calibrate, prepare
from dfq.prepare.dropping import activation_quantizers
from dfq.prepare.equalize import FAR, _steps, _turn, equalize_channels
from dfq.prepare.pairs import Pair, Seen, find_pairs
from dfq.prepare.quantizer import Quantizer
from dfq.types import DataSpec, QuantSpec

DATA = DataSpec((3, 8, 8), classes=5)
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))


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
    assert equalize_channels(student, IMAGES) == 2
    with torch.no_grad():
        torch.testing.assert_close(student(x), _model()(x), rtol=1e-4, atol=1e-4)


def test_only_what_is_positively_homogeneous_lets_a_scale_pass():
    before, student = _student(), _student()
    equalize_channels(student, IMAGES)
    changed = {
        name
        for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True)
        if new.isfinite().all() and not torch.equal(new, old)
    }
    norms = {f"norm{i}.{part}" for i in (1, 4) for part in ("weight", "bias")}
    # norm2 is behind a ReLU6, norm3 and norm5 are before dense layers
    assert changed == norms | {"depth.weight", "twofold.weight"}


@pytest.mark.parametrize(("deviations", "turned"), [(FAR + 0.1, True), (FAR - 0.1, False)])
def test_a_channel_far_below_zero_is_turned_over(deviations, turned):
    """Behind a LeakyReLU; the network computes what it did all the same."""
    x = IMAGES[:4]
    student = _student()
    with torch.no_grad():
        student.norm1.bias[::2] = -deviations * student.norm1.weight[::2]
        student.norm1.running_var[::2] *= 100  # so that the images keep below zero
    _bypassed(student)
    expected, weights = student(x), student.depth.weight.clone()
    equalize_channels(student, IMAGES)
    signs = torch.tensor([-1.0 if turned else 1.0, 1.0] * 4)
    assert torch.equal(student.norm1.weight.sign(), signs)
    assert torch.equal(student.norm1.bias.sign(), torch.tensor([1.0 if turned else -1.0, 1.0] * 4))
    assert torch.equal(student.depth.weight.sign(), weights.sign() * signs.reshape(8, 1, 1, 1))
    torch.testing.assert_close(student(x), expected, rtol=1e-4, atol=1e-4)


def test_a_channel_is_not_turned_that_images_show_above_zero():
    student = _student()
    with torch.no_grad():
        student.norm1.bias[::2] = -(FAR + 0.1) * student.norm1.weight[::2]
        student.norm1.running_var[::2] /= 100
    equalize_channels(student, IMAGES)
    assert (student.norm1.weight > 0).all()


class Way(nn.Sequential):
    """From a BatchNorm to a depthwise layer."""

    def __init__(self, *between):
        torch.manual_seed(0)
        stem, depthwise = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4, padding=1)
        norm = nn.BatchNorm2d(4)
        nn.init.constant_(norm.bias, -5.0)
        super().__init__(stem, norm, *between, depthwise, nn.Flatten(), nn.LazyLinear(5))
        self(IMAGES)


def test_no_channel_is_turned_where_a_maximum_would_choose_another():
    ways = {
        "slope": (nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.LeakyReLU(0.5)),
        "linear": (nn.Identity(),),
        "largest": (nn.LeakyReLU(0.2), nn.MaxPool2d(2)),
        "relu": (nn.ReLU(),),
    }
    slopes = {}
    for name, way in ways.items():
        student = prepare(Way(*way).eval(), "w4a4", data=DATA)
        (pair,) = find_pairs(student)
        slopes[name] = pair.slope
        equalize_channels(student, IMAGES)
        assert (pair.norm.weight.sign() == (-1 if pair.slope > 0 else 1)).all()
    assert slopes == {"slope": pytest.approx(0.1), "linear": 1, "largest": 0, "relu": 0}


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda x: F.max_pool2d(x, 2), 0),
        (lambda x: torch.max_pool2d(x, 2), 0),
        (lambda x: F.adaptive_max_pool2d(x, 1), 0),
        (lambda x: x.relu(), 0),
        (lambda x: F.avg_pool2d(x, 2), 1),
        (lambda x: F.adaptive_avg_pool2d(x, 1), 1),
        (lambda x: F.dropout(x, training=False), 1),
        (lambda x: torch.dropout(x, 0.5, False), 1),
    ],
)
def test_a_step_is_known_by_its_function_too(function, slope):
    student = prepare(Way(Call(function)).eval(), "w4a4", data=DATA)
    (pair,) = find_pairs(student)
    assert pair.slope == slope
    expected = _bypassed(student)(IMAGES)
    equalize_channels(student, IMAGES)
    torch.testing.assert_close(student(IMAGES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [torch.tanh, lambda x: x + 1, lambda x: x.clamp(-1, 1)])
def test_a_function_that_no_scale_passes_ends_the_way(function):
    student = prepare(Way(Call(function)).eval(), "w4a4", data=DATA)
    assert not find_pairs(student)


def test_channels_that_differ_in_size_alone_get_one_size():
    student = _student()
    with torch.no_grad():
        for weight in (student.stem.weight, student.depth.weight):
            weight.copy_(weight[:1].expand_as(weight))
        sizes = 2.0 ** torch.arange(8)
        student.norm1.running_mean.zero_()
        student.norm1.running_var.fill_(1.0)
        student.norm1.weight.copy_(sizes)
        student.norm1.bias.copy_(0.5 * sizes)
    equalize_channels(student, IMAGES)
    weight = student.norm1.weight
    torch.testing.assert_close(weight, weight[:1].expand(8), rtol=1e-5, atol=0)


def _uniform(low, high):
    return torch.linspace(low, high, 2048)


def _steps_of(inputs, *, gains=1.0, deviation=0.1, spread=None, bits="w8a8", pair=0):
    """Of a layer whose weights have a sum of squares of ``gains`` for each channel."""
    norm, layer, quantizer, _ = find_pairs(_student(bits))[pair]
    with torch.no_grad():
        norm.weight.fill_(deviation)
        layer.weight.zero_()
        layer.weight[:, :, 0, 0] = torch.as_tensor(gains).sqrt().reshape(-1, 1)
        return _steps(Pair(norm, layer, quantizer), Seen(torch.stack(inputs), spread))


def test_a_channel_far_from_zero_takes_the_larger_side_of_the_grid():
    """As on the short side of a LeakyReLU: seven channels in 0..1, one in -1..-0.9."""
    inputs = [_uniform(0, 1)] * 7 + [_uniform(-1, -0.9)]
    steps = _steps_of(inputs, spread=torch.tensor([1.0] * 7 + [0.01]))
    z = min(range(1, 255), key=lambda z: 7 / (255 - z) ** 2 + 100 / z**2)
    assert z == 181  # of 256
    torch.testing.assert_close(steps, torch.tensor([1 / (255 - z)] * 7 + [1 / z]))


def test_a_channel_that_was_turned_over_takes_the_side_of_the_others():
    """All of the grid is above zero then."""
    (pair, _), spread = find_pairs(_student("w8a8")), torch.ones(8)
    inputs = torch.stack([_uniform(0, 1)] * 7 + [_uniform(-1, -0.9)])
    with torch.no_grad():
        pair.norm.weight.fill_(0.1)
        pair.norm.bias[7] = -9.5  # times the slope of 0.1
        seen = _turn(pair, Seen(inputs, spread))
        torch.testing.assert_close(_steps(pair, seen), torch.full((8,), 1 / 255))
    assert pair.norm.bias[7].item() == pytest.approx(0.95)
    assert torch.equal(seen.spread, spread)


def test_channels_that_a_layer_amplifies_decide_where_zero_lies():
    inputs = [_uniform(0, 1)] * 4 + [_uniform(-1, 0)] * 4
    steps = _steps_of(inputs, gains=torch.tensor([900.0] * 4 + [1.0] * 4), spread=torch.ones(8))
    z = min(range(1, 255), key=lambda z: 900 / (255 - z) ** 2 + 1 / z**2)
    assert z == 24
    torch.testing.assert_close(steps, torch.tensor([1 / (255 - z)] * 4 + [1 / z] * 4))


def test_channels_above_zero_get_all_of_the_grid_and_so_does_a_deviation():
    """A channel that hardly ever passes its ReLU passes it some day."""
    inputs = [_uniform(0, 0)] + [_uniform(0, 2)] * 11
    steps = _steps_of(inputs, deviation=0.5, spread=torch.ones(24), bits="w4a4", pair=1)
    torch.testing.assert_close(steps, torch.tensor([0.5 / 15] + [2 / 15] * 11))


def test_an_output_that_never_changes_does_not_decide():
    inputs = [_uniform(0, 1)] * 4 + [_uniform(-1, 0)] * 4
    gains = torch.tensor([1.0] * 4 + [900.0] * 4)
    steps = _steps_of(inputs, gains=gains, spread=torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(steps, torch.tensor([1 / 254] * 4 + [1.0] * 4))
    assert _steps_of(inputs, spread=torch.zeros(8)).isfinite().all()


@pytest.mark.parametrize(("signed", "codes"), [(True, (128, 127)), (False, (255, 255))])
def test_a_symmetric_grid_has_its_zero_already(signed, codes):
    pair, _ = find_pairs(_student("w8a8"))
    grid = Quantizer(QuantSpec(8, symmetric=True, signed=signed))
    with torch.no_grad():
        pair.norm.weight.fill_(0.1)
        inputs = torch.stack([_uniform(0, 1)] * 7 + [_uniform(-2, 1)])
        steps = _steps(Pair(pair.norm, pair.layer, grid), Seen(inputs, torch.ones(8)))
    last = 2 / codes[0] if signed else 1 / codes[0]
    torch.testing.assert_close(steps, torch.tensor([1 / codes[1]] * 7 + [last]))


def test_only_the_first_images_are_shown_and_the_same_draw_is_made():
    students = [_student() for _ in range(3)]
    torch.manual_seed(0)
    equalize_channels(students[0], IMAGES)
    torch.manual_seed(1)
    equalize_channels(students[1], torch.cat((IMAGES, IMAGES * torch.nan)))
    equalize_channels(students[2], 2 * IMAGES)
    first, more, other = (student.norm1.weight for student in students)
    assert torch.equal(first, more)
    assert not torch.equal(first, other)


def test_the_grid_behind_a_relu_counts_where_the_layer_has_none():
    class Net(nn.Sequential):
        def __init__(self):
            torch.manual_seed(0)
            depthwise = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU()
            stem = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
            super().__init__(*stem, *depthwise, nn.Flatten(), nn.Linear(64, 5))

    student = prepare(Net().eval(), "w4a4", protocol="gdfq", data=DATA)
    (pair,) = find_pairs(student)
    assert pair.layer.input_quantizer is None
    assert pair.quantizer is student[2].quantizer
    assert equalize_channels(student, IMAGES) == 1


def test_a_dead_channel_neither_divides_by_zero_nor_grows():
    student = _student()
    with torch.no_grad():
        student.norm1.weight[2] = student.norm1.bias[2] = 0.0
        student.norm4.bias.zero_()
        student.norm4.weight.zero_()
    equalize_channels(student, IMAGES)
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
            equalize_channels(student, IMAGES)
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
    assert equalize_channels(student, IMAGES) == 0
    assert torch.equal(student.depth.weight, model.depth.weight)


def test_a_layer_that_is_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.stem(self.norm(self.stem(x))).mean((2, 3))

    student = prepare(Twice().eval(), "w4a4")
    assert equalize_channels(student, IMAGES) == 0
