import pytest
import torch
from torch import nn

from dfq.prepare import QConv2d, QLinear, prepare
from dfq.prepare.channels import Reader, find_channels
from dfq.prepare.equalize import FAR
from dfq.prepare.pairs import some
from dfq.prepare.quantizer import Quantizer
from dfq.prepare.sizes import Noise, _noises, size_channels
from dfq.types import DataSpec, QuantSpec

DATA = DataSpec((3, 8, 8), classes=5)
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))
UNSIGNED = QuantSpec(8, symmetric=False, signed=False)


class Net(nn.Module):
    """One layer reads two BatchNorms side by side, another the first; one channel is a gate too."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.both, self.norm3 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.first, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        one, two = torch.relu(self.norm1(x)), torch.relu(self.norm2(x))
        x = torch.relu(self.norm3(self.both(torch.cat((one, two), 1))))
        return self.head((two[:, :1].sigmoid() * x + self.first(one)).mean((2, 3)))


def _student(model=None, **options):
    torch.manual_seed(3)
    model = (model or Net()).eval()
    with torch.no_grad():
        if isinstance(model, Net):
            model.norm1.bias += 0.5
            model.norm2.weight *= 20
            model.norm2.bias += 4
            model.both.weight[:, 8:] /= 20
    student = prepare(model, "w8a8", data=DATA, **options)
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.bypass = True
    return student


@torch.no_grad()
def _losses(student):
    """Logarithms of sizes -> what all layers lose."""
    channels = find_channels(student, IMAGES[:2])
    noises = _noises(student, channels, IMAGES)
    return lambda logs: float(torch.stack([noise(logs) for noise in noises]).sum().detach())


def _total(student):
    return _losses(student)(torch.zeros(16))


def test_all_layers_together_lose_less_and_the_network_computes_what_it_did():
    student, before = _student(), _student()
    assert size_channels(student, IMAGES) == 15
    assert torch.equal(student.norm2.weight[:1], before.norm2.weight[:1])
    with torch.no_grad():
        torch.testing.assert_close(student(IMAGES), before(IMAGES), rtol=1e-4, atol=1e-4)
    changed = {
        name
        for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True)
        if new.isfinite().all() and not torch.equal(new, old)
    }
    norms = {f"norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert changed == norms | {"both.weight", "first.weight"}  # what is added to has its size
    assert _total(student) < 0.5 * _total(before)


def test_no_other_sizes_near_by_are_much_better():
    student = _student()
    size_channels(student, IMAGES)
    losses = _losses(student)
    least = losses(torch.zeros(16))
    rng = torch.Generator().manual_seed(0)
    for deviation in (0.01, 0.1, 0.5):
        for _ in range(50):
            logs = deviation * torch.randn(16, generator=rng)
            assert losses(logs) > 0.95 * least


def _part(weight, spec, sizes, inputs):
    """A reader of ``inputs`` [C, N], and what its noise is with such sizes."""
    layer = QConv2d(
        *(weight.shape[1], weight.shape[0], 1),
        weight_spec=QuantSpec(8, axis=0),
        input_spec=UNSIGNED,
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
    names = torch.arange(1, len(inputs) + 1)
    spread = (weight.flatten(1) @ inputs).var(1, correction=0)
    low, high = inputs.aminmax(dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    noise = Noise(Reader(layer, spec, names), low, high, inputs.square().mean(1), spread)
    return noise(torch.cat((torch.zeros(1), sizes.log()))), spread


@pytest.mark.parametrize("sizes", [torch.ones(8), torch.linspace(1, 6, 8)])
def test_the_predicted_noise_is_that_of_rounding(sizes):
    rng = torch.Generator().manual_seed(0)
    inputs = torch.rand(8, 1 << 16, generator=rng) * torch.linspace(1, 9, 8)[:, None]
    weight = torch.randn(8, 8, 1, 1, generator=rng)
    predicted, spread = _part(weight, UNSIGNED, sizes, inputs)
    scaled, rows = inputs / sizes[:, None], (weight.flatten(1) * sizes).double()
    step = scaled.max() / 255
    on_grid = ((scaled / step).round() * step).double()
    row_step = rows.abs().amax(1, keepdim=True) / 127
    noise = torch.zeros(8, dtype=torch.float64)
    for _ in range(64):  # weights are few: each time they lie elsewhere between their codes
        lie = torch.rand(rows.shape, generator=rng).double() - 0.5
        wrong = (rows / row_step + lie).round() * row_step - lie * row_step
        noise += (wrong @ on_grid - rows @ scaled.double()).square().mean(1) / 64
    assert float(predicted) == pytest.approx(float((noise / spread).mean()), rel=0.05)


@pytest.mark.parametrize(
    ("spec", "step"),
    [
        (UNSIGNED, 5 / 255),
        (QuantSpec(8, symmetric=True, signed=False), 2 / 255),
        (QuantSpec(8, symmetric=True, signed=True), 6 / 255),
        (None, 0.0),
    ],
)
def test_a_grid_holds_all_that_it_can(spec, step):
    inputs = torch.tensor([[-3.0, 2.0, 0.0, 1.0]])
    weight = torch.full((1, 1, 1, 1), 2.0)
    predicted, spread = _part(weight, spec, torch.ones(1), inputs)
    of_weights = (2 / 127) ** 2 * inputs.square().mean()
    assert 12 * float(predicted * spread) == pytest.approx(float(4 * step**2 + of_weights))


def test_groups_and_dense_layers_have_the_noise_of_their_parts():
    """Of two groups the mean; of a dense layer that of a convolution with kernels of one."""
    rng = torch.Generator().manual_seed(0)
    student = _student(Grouped())
    channels = find_channels(student, IMAGES[:2])
    noises = _noises(student, channels, IMAGES)
    logs = 0.3 * torch.randn(channels.total, generator=rng)
    layers = [reader.layer for reader in channels.readers]
    assert [type(layer) for layer in layers] == [QConv2d, QConv2d, QLinear]
    with torch.no_grad():
        for reader, noise in zip(channels.readers, noises, strict=True):
            assert float(noise(logs)) == pytest.approx(
                _by_hand(student, reader, logs, FAR), rel=1e-4
            )


class Grouped(nn.Sequential):
    """Two groups of four channels, channels by themselves, a dense layer."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)),
            *(nn.Conv2d(8, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(8, 5)),
        )
        with torch.no_grad():
            for norm, least in ((self[1], -6), (self[4], -2), (self[7], -2)):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(least, 4)  # some reach beyond all that the images show


@torch.no_grad()
def _by_hand(student, reader, logs, far):
    """As the docstring says it, output by output."""
    seen = []
    layer = reader.layer
    handle = layer.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    student(IMAGES)
    handle.remove()
    ((x, y),) = seen
    before = [m for m in student if isinstance(m, nn.BatchNorm2d)]
    norm = next(m for m in reversed(before) if list(student).index(m) < list(student).index(layer))
    x, sizes = x.transpose(0, 1).flatten(1), logs[reader.names].exp()
    reach = torch.maximum(norm.bias + far * norm.weight.abs(), norm.weight.abs())
    high = torch.maximum(x.amax(1).clamp(min=0), reach)
    step = ((high / sizes).max() - (x.amin(1).clamp(max=0) / sizes).min()) / 255
    weight = layer.weight[..., None].flatten(2)
    groups, total = getattr(layer, "groups", 1), 0.0
    per_group, inputs = len(weight) // groups, weight.shape[1]
    for o, row in enumerate(weight):
        part = slice(o // per_group * inputs, (o // per_group + 1) * inputs)
        s, power = sizes[part], x[part].square().mean(1)
        row_step = (row * s[:, None]).abs().max() / 127
        noise = step**2 * (s**2 * row.square().sum(1)).sum()
        noise += row_step**2 * row.shape[1] * (power / s**2).sum()
        total += float(noise / (12 * y[:, o].var(correction=0)) / len(weight))
    return total


def test_a_channel_reaches_further_than_the_images_show_but_one_deviation_at_least():
    student = _student(Grouped())
    with torch.no_grad():
        student[1].bias[:3] = torch.tensor([-50.0, 0.0, 50.0])
    weight = student[1].weight[:3].detach()
    high = _noises(student, find_channels(student, IMAGES[:2]), IMAGES)[0].high.flatten()
    assert torch.equal(high[0], weight[0])
    assert high[1] >= FAR * weight[1]
    assert high[2] >= 50 + FAR * weight[2]


def test_channels_that_are_fixed_have_the_size_they_have():
    student = _student()
    channels = find_channels(student, IMAGES[:2])
    noises = _noises(student, channels, IMAGES)
    logs = torch.randn(16, generator=torch.Generator().manual_seed(0))
    for reader, noise in zip(channels.readers, noises, strict=True):
        names = reader.names.clone()
        names[::2] = 0
        noise.names, other = names.reshape(noise.names.shape), names.where(names > 0, 16)
        with torch.no_grad():
            fixed = noise(logs)
            noise.names = other.reshape(noise.names.shape)
            assert torch.equal(fixed, noise(torch.cat((logs, torch.zeros(1)))))


def test_outputs_that_do_not_change_do_not_count():
    student, before = _student(), _student()
    for model in (student, before):
        with torch.no_grad():
            model.both.weight[0] = 0
    size_channels(student, IMAGES)
    assert _total(student) < 0.5 * _total(before) < 1


def test_images_from_all_over_are_shown():
    student, other = _student(), _student()
    images = torch.cat((IMAGES[:64], 3 * IMAGES))
    size_channels(student, images)
    size_channels(other, some(images))
    assert len(some(images)) == 64
    assert torch.equal(some(images)[32:], images[64::2])
    assert torch.equal(student.norm2.weight, other.norm2.weight)
    size_channels(third := _student(), IMAGES)
    assert not torch.equal(student.norm2.weight, third.norm2.weight)


def test_in_the_gdfq_protocol_the_grids_are_those_of_the_relus():
    student = _student(Grouped(), protocol="gdfq", edge_bits=8)
    specs = [reader.spec for reader in find_channels(student, IMAGES[:2]).readers]
    assert specs == [None, student[5].quantizer.spec, None]  # only behind a ReLU there is one


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_inputs_that_tell_nothing_change_nothing(value):
    student, before = _student(), _student()
    with torch.no_grad():
        for model in (student, before):
            model.stem.bias[0] = value
    assert size_channels(student, IMAGES) == 0
    assert torch.equal(student.norm2.weight, before.norm2.weight)


def test_a_model_without_free_channels_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 3))
    student = prepare(nn.Sequential(*model, nn.Flatten(), nn.Linear(64, 5)), "w8a8", data=DATA)
    before = [parameter.clone() for parameter in student.parameters()]
    assert size_channels(student, IMAGES) == 0
    for old, new in zip(before, student.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
