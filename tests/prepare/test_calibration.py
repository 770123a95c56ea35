import pytest
import torch
from torch import nn

from dfq.prepare import Quantizer, calibrate, calibration, observing, prepare
from dfq.prepare.observer import EmaMinMax, search_scale
from dfq.types import InputError


def _state(student):
    return {n: v.clone() for n, v in student.state_dict().items() if "quantizer" in n}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("scales", ["learned", "minmax"])
@pytest.mark.parametrize("batch_size", [4, 64], ids=["batches", "one batch"])
def test_twice_gives_the_same_bits(net, images, scales, batch_size):
    student = prepare(net, "w4a4", scales=scales)
    calibrate(student, images, batch_size=batch_size)
    first = _state(student)
    assert all(v.isfinite().all() for v in first.values())
    calibrate(student, 5 * images, batch_size=batch_size)
    assert not _same(_state(student), first)
    calibrate(student, images, batch_size=batch_size)
    assert _same(_state(student), first)


def test_weights_are_searched_per_channel(net, images):
    student = prepare(net, "w3a3")
    calibrate(student, images)
    scale, _ = search_scale(net.grouped.weight, student.grouped.weight_quantizer.spec)
    torch.testing.assert_close(student.grouped.weight_quantizer.scale, scale, rtol=1e-6, atol=0)


def test_inputs_are_searched_behind_the_quantized_layers_before(net, images):
    student = prepare(net, "w2a2", edge_bits=2)
    calibrate(student, images)
    spec = student.grouped.input_quantizer.spec
    with torch.no_grad():
        quantized = student.relu(student.norm(student.stem(images)))
        flat = net.relu(net.norm(net.stem(images)))
    found, unlike = student.grouped.input_quantizer.scale, search_scale(flat, spec)[0]
    torch.testing.assert_close(found, search_scale(quantized, spec)[0], rtol=1e-6, atol=0)
    assert (found / unlike - 1).abs() > 0.01


def test_all_batches_count(net, images):
    student = prepare(net, "w4a4")
    calibrate(student, images, batch_size=3)
    stem = student.stem.input_quantizer  # its input does not depend on other scales
    scale, zero_point = search_scale(images, stem.spec)
    torch.testing.assert_close(stem.scale, scale, rtol=1e-6, atol=0)
    assert torch.equal(stem.zero_point, zero_point)


def test_what_goes_below_zero_gets_a_zero_point_and_what_does_not_does_not(net, images):
    student = prepare(net, "w4a4")
    calibrate(student, images)
    assert student.stem.input_quantizer.zero_point.item() > 0
    assert student.grouped.input_quantizer.zero_point.item() == 0


def test_averages_see_each_batch_once(net, images):
    student = prepare(net, "w4a4", protocol="gdfq", scales="minmax")
    calibrate(student, images, batch_size=4)
    average = EmaMinMax()
    with torch.no_grad():
        for batch in images.split(4):
            x = student.norm(student.stem(batch)).relu()
            average.update(x.amin().reshape(1), x.amax().reshape(1))
    assert torch.equal(student.relu.quantizer.range.high, average.high)
    before = _state(student)
    student(9 * images)
    assert _same(_state(student), before)
    with observing(student):
        student(9 * images)
    assert student.relu.quantizer.scale > before["relu.quantizer.scale"]


def test_a_layer_used_twice_gets_one_grid_for_both():
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(10 * self.layer(x))

    student = prepare(Twice(), "w8a8")
    x = torch.rand(64, 4)
    calibrate(student, x, batch_size=32)
    assert student.layer.input_quantizer.levels.max() > 5  # wide enough for the second use


def test_modes_and_hooks_are_as_before(net, images):
    student = prepare(net, "w4a4").train()
    before = [(module.training, len(module._forward_pre_hooks)) for module in student.modules()]
    calibrate(student, images)
    after = [(module.training, len(module._forward_pre_hooks)) for module in student.modules()]
    assert after == before
    assert not any(m.observing for m in student.modules() if isinstance(m, Quantizer))
    assert all(p.grad is None for p in student.parameters())


def test_dropout_is_off_meanwhile(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(), nn.Conv2d(4, 4, 1))
    calm, dropping = prepare(model.eval(), "w4a4"), prepare(model.train(), "w4a4")
    for student in (calm, dropping):
        calibrate(student, images)
    assert dropping[1].training
    assert _same(_state(calm), _state(dropping))


def test_samples_are_the_same_every_time_and_chance_is_not_touched(net, images, monkeypatch):
    monkeypatch.setattr(calibration, "SAMPLE", 40)  # far below the size of the tensors
    student = prepare(net, "w4a4")
    before = torch.get_rng_state()
    calibrate(student, images)
    assert torch.equal(torch.get_rng_state(), before)
    first = _state(student)
    torch.rand(1)
    calibrate(student, images)
    assert _same(_state(student), first)


def test_a_layer_that_is_never_reached_says_so(images):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x, spare=False):
            return self.spare(x) if spare else self.used(x)

    student = prepare(Model(), "w4a4")
    calibrate(student, images)
    student(images)
    with pytest.raises(InputError, match="no scale yet"):
        student(images, spare=True)


@pytest.mark.parametrize(
    ("model", "images", "words"),
    [
        (lambda net: net, torch.zeros(2, 3, 8, 8), "no quantizers"),
        (lambda net: prepare(net, "w4a4"), torch.zeros(0, 3, 8, 8), "0 images"),
        (lambda net: prepare(net, "w4a4"), torch.full((2, 3, 8, 8), torch.nan), "stem.*NaN"),
        (
            lambda net: prepare(net, "w4a4", protocol="gdfq", scales="minmax"),
            torch.full((2, 3, 8, 8), torch.nan),
            "relu.*NaN",
        ),
    ],
    ids=["not prepared", "no images", "NaN", "NaN average"],
)
def test_bad_input_is_refused(net, model, images, words):
    with pytest.raises(InputError, match=words):
        calibrate(model(net), images)


def test_weights_that_diverged_are_refused(net, images):
    student = prepare(net, "w4a4")
    torch.nn.init.constant_(student.head.weight, torch.inf)
    with pytest.raises(InputError, match=r"head\.weight_quantizer meets"):
        calibrate(student, images)


def test_better_than_the_plain_range(net, images):
    heavy = images**3
    searched, plain = prepare(net, "w3a3"), prepare(net, "w3a3", scales="minmax")
    calibrate(searched, heavy)
    calibrate(plain, heavy)
    expected = net(heavy)["logits"]
    gaps = [(s(heavy)["logits"] - expected).square().mean() for s in (searched, plain)]
    assert gaps[0] < gaps[1]
