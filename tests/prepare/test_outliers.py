import pytest
import torch
from torch import nn

from dfq.prepare import prepare
from dfq.prepare.outliers import _noise, _sizes, _step, shrink_outliers
from dfq.prepare.pairs import Pair, Seen, find_pairs
from dfq.prepare.quantizer import Quantizer
from dfq.types import DataSpec, QuantSpec

DATA = DataSpec((3, 8, 8), classes=5)
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Of four BatchNorms only the first is read by one dense layer alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.point, self.norm2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.depth, self.norm3 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.grouped, self.norm4 = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(self.norm2(self.point(x)))
        x = torch.relu(self.norm3(self.depth(x)))
        x = torch.relu(self.norm4(self.grouped(x)))
        return self.head((self.last(x) + x).mean((2, 3)))


def _student(bits="w8a8", large=20.0):
    """The channels 2 and 5 of the first BatchNorm are ``large``, and their weights small."""
    torch.manual_seed(3)
    model = Net().eval()
    with torch.no_grad():
        model.norm1.bias.fill_(0.1)
        model.norm1.weight[[2, 5]] *= large
        model.point.weight[:, [2, 5]] /= large
    student = prepare(model, bits, data=DATA)
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.bypass = True
    return student


def test_large_channels_are_shrunk_and_the_network_computes_what_it_did():
    student, before = _student(), _student()
    assert shrink_outliers(student, IMAGES) == 1
    torch.testing.assert_close(student(IMAGES), before(IMAGES), rtol=1e-4, atol=1e-5)
    changed = {
        name
        for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True)
        if new.isfinite().all() and not torch.equal(new, old)
    }
    assert changed == {"norm1.weight", "norm1.bias", "point.weight"}
    shrunk = before.norm1.weight / student.norm1.weight
    assert (shrunk >= 1).all()
    assert set(shrunk.argsort(descending=True)[:2].tolist()) == {2, 5}
    assert shrunk[[2, 5]].min() > 5


def _seen(inputs, weight):
    """``inputs`` [C, N] and what a layer of one pixel makes of them."""
    return Seen(inputs, (weight.flatten(1) @ inputs).var(1, correction=0))


def _pair(weight, spec):
    """Of that layer at 8 bits, and a grid of ``spec``."""
    (pair,) = find_pairs(_student(), lambda layer: layer.groups == 1)
    with torch.no_grad():
        pair.layer.weight.copy_(weight)
    return Pair(pair.norm, pair.layer, Quantizer(spec))


@pytest.mark.parametrize("sizes", [torch.ones(8), torch.linspace(1, 6, 8)])
def test_the_predicted_noise_is_that_of_rounding(sizes):
    rng = torch.Generator().manual_seed(0)
    inputs = torch.rand(8, 1 << 16, generator=rng) * torch.linspace(1, 9, 8)[:, None]
    weight = torch.randn(8, 8, 1, 1, generator=rng)
    pair, seen = _pair(weight, QuantSpec(8, symmetric=False, signed=False)), _seen(inputs, weight)
    scaled, rows = inputs / sizes[:, None], (weight.flatten(1) * sizes).double()
    step = scaled.max() / 255
    on_grid = ((scaled / step).round() * step).double()
    row_step = rows.abs().amax(1, keepdim=True) / 127
    noise = torch.zeros(8, dtype=torch.float64)
    for _ in range(64):  # weights are few: each time they lie elsewhere between their codes
        lie = torch.rand(rows.shape, generator=rng).double() - 0.5
        wrong = (rows / row_step + lie).round() * row_step - lie * row_step
        noise += (wrong @ on_grid - rows @ scaled.double()).square().mean(1) / 64
    with torch.no_grad():
        predicted = _noise(pair, seen, sizes)
    assert predicted == pytest.approx(12 * float((noise / seen.spread).sum()), rel=0.05)


def test_the_bound_is_the_best_of_those_between_the_largest_and_the_smallest_channel():
    rng = torch.Generator().manual_seed(0)
    inputs = (
        torch.rand(8, 4096, generator=rng) * torch.tensor([50.0, 20, 3, 2, 2, 1, 1, 1])[:, None]
    )
    weight = torch.randn(8, 8, 1, 1, generator=rng)
    pair, seen = _pair(weight, QuantSpec(8, symmetric=False, signed=False)), _seen(inputs, weight)
    largest = inputs.amax(1)
    with torch.no_grad():
        sizes = _sizes(pair, seen)
        chosen = _noise(pair, seen, sizes)
        others = [
            _noise(pair, seen, (largest / bound).clamp(min=1))
            for bound in torch.logspace(0, largest[0].log10().item(), 100)
        ]
    bound = largest[0] / sizes[0]
    torch.testing.assert_close(sizes, (largest / bound).clamp(min=1))
    assert 1.5 < bound < 40
    assert chosen < 0.5 * others[-1]  # nothing shrunk
    assert chosen < 1.02 * min(others)


def test_channels_of_one_size_stay_as_they_are():
    pair = _pair(torch.ones(8, 8, 1, 1), QuantSpec(8, symmetric=False, signed=False))
    inputs = torch.linspace(0, 1, 100).repeat(8, 1)
    with torch.no_grad():
        assert torch.equal(_sizes(pair, Seen(inputs, torch.ones(8))), torch.ones(8))


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_inputs_that_tell_nothing_change_nothing(value):
    pair = _pair(torch.ones(8, 8, 1, 1), QuantSpec(8, symmetric=False, signed=False))
    seen = Seen(torch.full((8, 100), value), torch.ones(8))
    assert torch.equal(_sizes(pair, seen), torch.ones(8))


@pytest.mark.parametrize(
    ("spec", "step"),
    [
        (QuantSpec(8, symmetric=False, signed=False), 5 / 255),
        (QuantSpec(8, symmetric=True, signed=False), 2 / 255),
        (QuantSpec(8, symmetric=True, signed=True), 6 / 255),
    ],
)
def test_a_grid_holds_all_that_it_can(spec, step):
    pair = _pair(torch.ones(8, 8, 1, 1), spec)
    assert _step(pair, torch.tensor([-3.0, 2.0])) == pytest.approx(step)
    assert _step(pair, torch.tensor([1.0, 2.0])) == pytest.approx(
        (4 if spec.symmetric and spec.signed else 2) / 255
    )


def test_a_model_without_such_layers_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 3))
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(64, 5)).eval()
    student = prepare(model, "w8a8", data=DATA)
    before = [parameter.clone() for parameter in student.parameters()]
    assert shrink_outliers(student, IMAGES) == 0
    for old, new in zip(before, student.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
