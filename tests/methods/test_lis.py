from dataclasses import replace

import pytest
import torch

from dfq.distill.losses import kd_divergence
from dfq.distill.reconstruct import ReconstructionConfig
from dfq.methods import METHODS, LISConfig, lis
from dfq.methods.lis import LIS_EFFORTS, lis_images
from dfq.prepare import QConv2d, QLinear, Quantizer, calibrate, prepare
from dfq.synthesize.inversion import InversionConfig
from dfq.types import Images, InputError
from tests.methods.test_genie import DATA, _same, _teacher
from tests.methods.test_methods import _teacher as _other

TINY = LISConfig(
    InversionConfig(batch_size=16, batches=2, steps=4, shift=1),
    ReconstructionConfig(steps=6, batch_size=8),
)


def _train(config=TINY, seed=0, bits="w3a3", given=None, others=1, **options):
    teacher, lines = _teacher(), []
    student = prepare(teacher, bits, data=DATA, **options)
    student, images = lis(
        teacher,
        student,
        DATA,
        config,
        teachers=[_other() for _ in range(others)],
        given=given,
        rng=torch.Generator().manual_seed(seed),
        report=lambda stage, step, steps, **v: lines.append((stage, step, steps, v)),
    )
    return teacher, student, images, lines


def _images(count=None, config=TINY, others=1, seed=0):
    teachers = [_other() for _ in range(others)]
    rng = torch.Generator().manual_seed(seed)
    return lis_images(_teacher(), DATA, config, teachers=teachers, count=count, rng=rng)


def _change(part, **changes):
    return replace(TINY, **{part: replace(getattr(TINY, part), **changes)})


def test_it_trains_the_student_and_leaves_the_teachers_alone():
    teacher, student, images, _ = _train()
    assert _same(teacher, _teacher())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert torch.equal(student.get_submodule("1").running_mean, teacher[1].running_mean)
    assert images.images.shape == (32, 3, 8, 8)
    assert torch.bincount(images.labels).tolist() == [8, 8, 8, 8]
    for layer in student.modules():
        if isinstance(layer, QConv2d | QLinear):
            assert type(layer.weight_quantizer) is Quantizer
            assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_same_seed_gives_the_same_student_and_another_seed_another():
    first = _train()
    torch.manual_seed(1)
    second, other = _train(), _train(seed=1)
    assert _same(first[1], second[1])
    assert torch.equal(first[2].images, second[2].images)
    assert not _same(first[1], other[1])


def test_it_tells_every_step_of_both_stages():
    *_, lines = _train()
    assert [line[0] for line in lines] == ["synthesize"] * 8 + ["reconstruct"] * 18
    assert [line[1] for line in lines] == [*range(1, 9), *range(1, 19)]


def test_the_second_teacher_changes_images_and_student():
    alone, together = _train(others=0), _train()
    assert not torch.equal(alone[2].images, together[2].images)
    assert not _same(alone[1], together[1])


@pytest.mark.parametrize("changes", [{"mixed": 0.0}, {"levels": 1}])
def test_the_parts_of_the_inversion_change_the_student(changes):
    assert not _same(_train(_change("inversion", **changes))[1], _train()[1])


@pytest.mark.parametrize(
    "changes", [{"courses": (2, 1)}, {"per_batch": 1}, {"per_batch": 1, "mode": "step"}]
)
def test_courses_change_the_images(changes):
    plain, other = _images(others=2), _images(config=replace(TINY, **changes), others=2)
    assert not torch.equal(plain.images, other.images)


def test_courses_that_do_not_hold_all_teachers_are_refused_before_any_work():
    with pytest.raises(InputError, match="courses of 1 teachers do not hold 2 teachers"):
        _images(config=replace(TINY, courses=(1,)))


def test_it_makes_as_many_images_as_asked_for():
    images, labels = _images(37)
    assert len(images) == len(labels) == 37
    assert torch.equal(images[:32], _images().images)


def test_given_images_are_learned_from_instead():
    given = Images(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.int64))
    _, student, images, lines = _train(given=given)
    assert {line[0] for line in lines} == {"reconstruct"}
    assert images is given
    assert not _same(student, _train()[1])


def test_one_set_serves_every_model():
    """Images of two models bring a student of either nearer to its teacher than rounding does."""
    making = _change("inversion", batch_size=64, steps=20)
    given, fresh = _images(config=making), _images(config=making, seed=1).images
    learning = _change("reconstruction", steps=250, batch_size=16)
    for teacher in (_teacher(), _other()):
        student, nearest = (prepare(teacher, "w2a4", data=DATA) for _ in range(2))
        rng = torch.Generator().manual_seed(0)
        lis(teacher, student, DATA, learning, given=given, rng=rng)
        calibrate(nearest, given.images)
        with torch.no_grad():
            wanted = teacher(fresh)
            errors = [kd_divergence(m(fresh), wanted, 1.0).mean() for m in (student, nearest)]
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("effort", LIS_EFFORTS)
def test_every_effort_runs(effort):
    config = LIS_EFFORTS[effort]
    inversion = replace(config.inversion, batch_size=8, batches=2, steps=2)
    short = replace(
        config, inversion=inversion, reconstruction=replace(config.reconstruction, steps=2)
    )
    assert all(p.isfinite().all() for p in _train(short)[1].parameters())


def test_scales_that_are_not_learned_are_refused_before_any_work():
    with pytest.raises(InputError, match="scales"):
        _train(scales="minmax")


def test_it_is_a_method_that_takes_teachers():
    able = [name for name, method in METHODS.items() if method.takes_teachers]
    assert able == ["lis", "recipe"]
