import torch

from dfq.methods import SQuantConfig, squant
from dfq.prepare import QConv2d, QLinear, calibrate, prepare
from tests.methods.test_methods import DATA, _same, _teacher


def _round(seed=0):
    teacher = _teacher()
    student = prepare(teacher, "w3a8", data=DATA)
    rng = torch.Generator().manual_seed(seed)
    return teacher, *squant(teacher, student, DATA, SQuantConfig(images=32), rng=rng)


def test_outputs_are_nearer_to_the_teacher_than_rounded_to_the_nearest():
    teacher, student, images = _round()
    nearest = prepare(teacher, "w3a8", data=DATA)
    calibrate(nearest, images.images)
    x = (
        torch.randn(64, *DATA.shape, generator=torch.Generator().manual_seed(9)) + 1
    )  # not the noise
    errors = [(model(x) - teacher(x)).square().mean() for model in (student, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_weights_lie_on_their_grids():
    _, student, _ = _round()
    for layer in student.modules():
        if isinstance(layer, QConv2d | QLinear):
            kept = layer.weight_quantizer(layer.weight)
            torch.testing.assert_close(kept, layer.weight, rtol=1e-6, atol=1e-7)


def test_teacher_stays_and_a_seed_decides_the_student():
    teacher, student, images = _round()
    assert _same(teacher, _teacher())
    again = _round()
    assert _same(student, again[1])
    assert torch.equal(images.images, again[2].images)
    assert not _same(student, _round(seed=1)[1])
    assert torch.equal(images.labels, teacher(images.images).argmax(1))
